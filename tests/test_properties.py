"""Properties that every bundle has, whatever its models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from hywu_runtime import Deltas, Editor


@pytest.fixture(scope="module")
def editor(bundle: Path) -> Iterator[Editor]:
    with Editor.load(bundle) as editor:
        yield editor


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 24, 3), np.uint8)


@pytest.mark.parametrize("graph", ["step", "step_unguided"])
def test_gate_0_is_the_base_bit_for_bit(lora_bundle: Path, graph: str) -> None:
    with Editor.load(lora_bundle) as editor:
        manifest = editor.bundle.manifest
    assert manifest.deltas is not None
    session = ort.InferenceSession(
        lora_bundle / manifest.graphs[graph].file, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "delta_batch": 1, "latent_height": 8, "latent_width": 12}
    inputs = {
        tensor.name: rng.standard_normal([sizes.get(str(d), d) for d in tensor.shape]).astype(tensor.dtype)
        for tensor in manifest.graphs[graph].inputs
    }
    names = manifest.deltas.tensors.keys() & inputs.keys()
    assert any(name.startswith("down_blocks") for name in names)
    zeros = {name: np.zeros_like(inputs[name]) for name in names}
    huge = {name: inputs[name] * 1e6 for name in names}
    off, on = {"gate": np.zeros(2, np.float32)}, {"gate": np.ones(2, np.float32)}
    base = session.run(None, inputs | zeros | on)
    for got in (session.run(None, inputs | huge | off), session.run(None, inputs | zeros | off)):
        for have, want in zip(got, base):
            np.testing.assert_array_equal(have, want)
    changed = session.run(None, inputs | on)
    assert not np.allclose(changed[0], base[0])
    # One sample's gate is no other's.
    half = session.run(None, inputs | {"gate": np.array([0, 1], np.float32)})
    np.testing.assert_array_equal(half[0][0], base[0][0])
    np.testing.assert_array_equal(half[0][1], changed[0][1])


def test_a_then_b_then_a(editor: Editor) -> None:
    """Nothing of a request is left in the next, of the same kind or of another."""

    def edit(prompt: str, **options: object) -> np.ndarray:
        return np.asarray(editor.edit(photo(), prompt, steps=3, seed=5, output="array", **options))  # type: ignore[arg-type]

    first = edit("make it sepia")
    others = [edit("a cat"), edit("make it sepia", guidance=1.0), edit("make it sepia", delta_strength=0.0)]
    editor.edit_batch([(photo(1), "a cat"), (photo(2), "ugly")], steps=2)
    assert all((other != first).any() for other in others)
    np.testing.assert_array_equal(edit("make it sepia"), first)


def test_a_sample_does_not_depend_on_its_neighbours(editor: Editor) -> None:
    requests = [(photo(1), "make it sepia"), (photo(2), "a cat"), (photo(3), "blur the photo")]
    seeds = [1, 2, 3]
    together = editor.edit_batch(requests, seed=seeds, steps=3, output="array")
    for i, (image, prompt) in enumerate(requests):
        (alone,) = editor.edit_batch([(image, prompt)], seed=[seeds[i]], steps=3, output="array")
        assert np.abs(np.int16(alone) - np.int16(together[i])).max() <= 1
    other = [requests[0], (photo(8), "ugly"), (photo(9), "")]
    neighbours = editor.edit_batch(other, seed=[1, 8, 9], steps=3, output="array")
    np.testing.assert_array_equal(neighbours[0], together[0])


def test_generated_deltas_given_back_are_the_same_edit(editor: Editor, tmp_path: Path) -> None:
    edited = np.asarray(editor.edit(photo(), "a cat", steps=3, seed=1, output="array"))
    editor.generate(photo(), "a cat").save(tmp_path / "cat.safetensors")
    deltas = Deltas.load(tmp_path / "cat.safetensors")
    again = np.asarray(editor.edit(photo(), "a cat", steps=3, seed=1, deltas=deltas, output="array"))
    np.testing.assert_array_equal(again, edited)


def test_low_memory_gives_the_same_bytes(bundle: Path, editor: Editor) -> None:
    with Editor.load(bundle, low_memory=True) as frugal:
        for prompt in ("make it sepia", "a cat"):
            expected = np.asarray(editor.edit(photo(), prompt, steps=3, output="array"))
            np.testing.assert_array_equal(frugal.edit(photo(), prompt, steps=3, output="array"), expected)
