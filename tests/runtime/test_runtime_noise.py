"""Noise against published Philox vectors, pure Python, and the vectors that we publish."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hywu_runtime import noise

VECTORS = json.loads((Path(__file__).parents[1] / "data/noise.json").read_text())


@pytest.mark.parametrize("case", VECTORS["philox"])
def test_philox_known_answers(case: dict[str, list[str]]) -> None:
    counter = np.array([int(word, 16) for word in case["counter"]], np.uint32).reshape(4, 1)
    words = noise.philox(counter, (int(case["key"][0], 16), int(case["key"][1], 16)))
    assert [f"{int(word):08x}" for word in words[:, 0]] == case["words"]


@pytest.mark.parametrize("case", VECTORS["normal"])
def test_published_vectors(case: dict[str, Any]) -> None:
    numbers = noise.normal((case["length"],), int(case["seed"]), case["sample"], case["draw"])
    found = [f"{word:08x}" for word in numbers.view(np.uint32).tolist()]
    expected = case["float32"]
    assert found[-len(expected) :] == expected


def scalar(index: int, seed: int, sample: int, draw: int) -> float:
    """One element by the words of docs/bundle.md, with Python's integers and math."""
    c, k = [index // 4, draw, sample, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    u = [(word + 0.5) / 2**32 for word in c]
    pair = 2 * (index % 4 // 2)
    turn = math.sin if index % 2 else math.cos
    value = math.sqrt(-2 * math.log(u[pair])) * turn(2 * math.pi * u[pair + 1])
    return float(struct.unpack("f", struct.pack("f", value))[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**16), st.integers(0, 2**16), st.integers(1, 300))
def test_equals_the_scalar_definition(seed: int, sample: int, draw: int, length: int) -> None:
    numbers = noise.normal((length,), seed, sample, draw)
    for index in {0, length // 2, length - 1}:
        assert abs(numbers[index] - scalar(index, seed, sample, draw)) <= np.spacing(
            np.float32(abs(numbers[index]))
        )


def test_chunks_and_shapes_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = noise.normal((3, 5, 7), 99)
    monkeypatch.setattr(noise, "_CHUNK", 5)
    np.testing.assert_array_equal(noise.normal((105,), 99).reshape(3, 5, 7), whole)


def test_is_standard_normal_and_independent() -> None:
    numbers = np.stack([noise.normal((40_000,), 5, sample, draw) for sample in range(2) for draw in range(2)])
    assert np.abs(numbers.mean(1)).max() < 0.02
    assert np.abs(numbers.std(1) - 1).max() < 0.02
    assert np.abs(np.corrcoef(numbers) - np.eye(4)).max() < 0.02
    assert np.abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02
