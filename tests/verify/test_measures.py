"""What `hywu verify` measures, and what it lets pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hywu_export.verify.measures import (
    EXACT,
    LEVEL,
    TORCH,
    Check,
    Measure,
    Report,
    TensorCheck,
    Tolerance,
    for_graph,
    for_picture,
)

FLOATS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("got", "failure"),
    [
        ([1, 10], None),
        ([1, 10.0009], None),
        ([1.0011, 10], "value"),
        ([1, np.nan], "value"),
        ([1, np.inf], "value"),
        ([[1, 10]], "shape"),
    ],
)
def test_numbers(got: list[Any], failure: str | None) -> None:
    expected = np.array([1, 10], np.float32)
    check = TensorCheck("o", TORCH).seen(np.array(got, np.float32), expected, {"batch": 1})
    assert check.failure == failure
    assert check.sizes == {"batch": 1}
    assert TensorCheck("o", TORCH).seen(np.array(got, np.float64), expected, {}).failure == "shape"


def test_levels_zeros_and_tokens() -> None:
    levels = np.array([0, 255, 7], np.uint8)
    for got, failure in (([0, 255, 7], None), ([1, 254, 7], None), ([2, 255, 7], "value")):
        assert TensorCheck("o", LEVEL).seen(np.array(got, np.uint8), levels, {}).failure == failure
    zeros = np.zeros(3, np.float32)
    assert TensorCheck("o", TORCH).seen(zeros, zeros, {}).failure is None
    assert TensorCheck("o", TORCH).seen(zeros + np.float32(0.5), zeros, {}).failure == "value"
    assert TensorCheck("o", EXACT).seen(levels + np.uint8(1), levels, {}).failure == "value"


@given(FLOATS, st.floats(0.5, 3), st.integers(0, 2**32 - 1))
def test_ratios_are_numpys(values: list[float], scale: float, seed: int) -> None:
    expected = np.array(values, np.float32)
    noise = np.random.default_rng(seed).normal(0, scale, len(values)).astype(np.float32)
    got = expected + noise
    difference = got.astype(np.float64) - expected
    measure = Measure.of(got, expected)
    assert measure.largest == np.abs(difference).max()
    assert measure.mean == pytest.approx(np.abs(difference).mean())
    signal, power = np.square(expected, dtype=np.float64).sum(), np.square(difference).sum()
    if power and signal > 1e-30:
        assert measure.sqnr_db == pytest.approx(10 * np.log10(signal / power))
        peak = np.abs(expected).max()
        assert measure.psnr_db == pytest.approx(
            10 * np.log10(float(peak) ** 2 / np.square(difference).mean())
        )


@given(FLOATS, FLOATS)
def test_measures_add_up(first: list[float], second: list[float]) -> None:
    a, b = np.array(first), np.array(second)
    parts = Measure.of(a * 1.5, a) + Measure.of(b + 0.25, b)
    whole = Measure.of(np.concatenate([a * 1.5, b + 0.25]), np.concatenate([a, b]))
    for name in ("largest", "mean", "signal", "noise", "peak", "count"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))


def test_a_picture_has_the_usual_psnr() -> None:
    a = np.zeros((4, 4), np.uint8)
    assert Measure.of(a + np.uint8(1), a).psnr_db == pytest.approx(48.1308, abs=1e-4)
    assert Measure.of(a, a).psnr_db == math.inf
    assert Measure.of(a, a).to_json()["psnr_db"] is None


def test_not_finite_meets_nothing() -> None:
    measure = Measure.of(np.array([np.nan, 1]), np.array([1.0, 1.0]))
    for kind in ("relative", "levels", "sqnr_db", "psnr_db", "equal"):
        assert not Tolerance(kind, -1e9 if kind.endswith("db") else 1e9).meets(measure)
        assert Tolerance(kind, 1).excess(measure) == math.inf
    assert math.isnan((measure + Measure.of(np.ones(3), np.ones(3))).largest)
    assert all(value is None for name, value in measure.to_json().items() if name != "count")


def test_which_tolerance() -> None:
    assert for_graph("int64", "int8") is EXACT
    assert for_graph("uint8", "int8").kind == "psnr_db"
    order = [for_graph("float32", precision).limit for precision in ("fp16", "int8-weights", "bf16", "int8")]
    assert order == sorted(order, reverse=True)
    assert for_graph("float32", None).limit == order[0]
    promised = for_picture("int8", 33.3)
    assert promised.limit == 27.3
    assert "report" in str(promised)
    assert for_picture("int8", None).limit == 20


def test_the_worst_tensor_is_named() -> None:
    one = np.ones(4, np.float32)
    checks = {
        "fine": TensorCheck("fine", TORCH).seen(one, one, {}),
        "bad": TensorCheck("bad", TORCH).seen(one * 2, one, {}),
        "worse": TensorCheck("worse", TORCH).seen(one * 3, one, {}),
        "shape": TensorCheck("shape", TORCH).seen(one[:2], one, {}),
    }
    assert Check("p", "g", tuple(checks.values())).worst.tensor == "shape"
    del checks["shape"]
    check = Check("p", "g", tuple(checks.values()))
    assert (check.worst.tensor, check.failure) == ("worse", "value")
    assert Report((check,)).failure == "value"
    assert Report(()).failure is None
