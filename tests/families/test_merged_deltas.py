"""Deltas merged into the weights once per request: the pictures of diffusers with the adapters in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import draws, largest, photos, random_deltas
from pix2pix_reference import Reference
from tiny_pairs import ONE_BLOCK, make_base

from hywu_export import ExportOptions, export
from hywu_runtime import Editor
from hywu_runtime.errors import InputError

SHAPE = (2, 4, 16, 16)


@pytest.fixture(scope="module")
def folder(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    def make(folder: Path) -> None:
        make_base(folder / "base", **ONE_BLOCK)
        options = ExportOptions(
            targets=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1"], max_rank=4, max_steps=4,
            deltas="merged",
        )  # fmt: skip
        export(folder / "bundle", folder / "base", options=options)

    return once("merged", make)


@pytest.fixture(scope="module")
def editor(folder: Path) -> Iterator[Editor]:
    with Editor.load(folder / "bundle") as editor:
        yield editor


def edit(editor: Editor, deltas: Any, strength: Any) -> list[np.ndarray]:
    requests = list(zip(photos(2), ["make it sepia", "a cat"]))
    pictures: list[np.ndarray] = editor.edit_batch(
        requests, deltas=deltas, delta_strength=strength, steps=2, latents=draws(1, SHAPE, seed=7)[0],
        noise=draws(2, SHAPE, seed=3), guidance=5.0, image_guidance=1.5, output="array",
    )  # fmt: skip
    return pictures


def test_no_step_reads_a_linear_delta(editor: Editor) -> None:
    manifest = editor.bundle.manifest
    assert manifest.deltas is not None
    linear = {target.module for target in manifest.deltas.targets if target.kind == "linear"}
    for name in ("step", "step_unguided"):
        read = {t.name.rpartition(".")[0] for t in manifest.graphs[name].inputs if ".lora_" in t.name}
        assert read  # convolutions stay low-rank
        assert not read & linear


def test_deltas_per_sample(editor: Editor, folder: Path) -> None:
    spec = editor.bundle.manifest.deltas
    sets = [random_deltas(spec, seed=seed) for seed in (1, 2)]
    strengths = [1.0, -0.5]
    got = edit(editor, sets, strengths)
    requests = list(zip(photos(2), ["make it sepia", "a cat"]))
    for sample, (deltas, strength) in enumerate(zip(sets, strengths)):
        adapted = Reference(folder / "base")
        adapted.add_adapter(deltas, strength=strength)
        expected = adapted(requests, steps=2, latents=draws(1, SHAPE, seed=7)[0], noise_seed=3)
        assert largest([got[sample]], [expected[sample]]) <= 1
    assert largest(got, edit(editor, sets, 0.0)) > 20


def test_one_set_for_the_batch_then_another(editor: Editor, folder: Path) -> None:
    spec = editor.bundle.manifest.deltas
    first, second = (random_deltas(spec, seed=seed) for seed in (1, 2))
    before = edit(editor, first, 1.0)
    assert largest(before, edit(editor, second, 1.0)) > 20
    assert largest(before, edit(editor, first, 1.0)) == 0
    requests = list(zip(photos(2), ["make it sepia", "a cat"]))
    plain = Reference(folder / "base")(requests, steps=2, latents=draws(1, SHAPE, seed=7)[0], noise_seed=3)
    assert largest(edit(editor, first, 0.0), plain) <= 1


def test_the_step_without_deltas_is_that_at_strength_0(editor: Editor, tmp_path: Path) -> None:
    """What ``hywu bench`` compares a step with: the base's own weights, as constants."""
    import onnx

    from hywu_export.benchmark.plain import _mapped, with_constants, without_deltas
    from hywu_runtime.backends.onnxruntime import OnnxRuntime

    bundle = editor.bundle
    paths = {name: bundle.file(bundle.graph_file(name)) for name in ("prepare_step", "step")}
    models = {name: onnx.load(path, load_external_data=False) for name, path in paths.items()}
    plain = with_constants(*(without_deltas(models[name]) for name in ("step", "prepare_step")))
    backend = OnnxRuntime("ort-cpu", 0, None)
    sizes = {"batch": 1, "delta_batch": 1, "latent_height": 4, "latent_width": 4}
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for name in models:
        for value in bundle.manifest.graphs[name].inputs:
            shape = [sizes[d] if isinstance(d, str) else d for d in value.shape]
            feeds.setdefault(value.name, np.asarray(0.1 * rng.standard_normal(shape), value.dtype))
    feeds["gate"] = np.zeros(1, np.float32)
    graphs = bundle.manifest.graphs
    for name, path in paths.items():
        inputs = {value.name: feeds[value.name] for value in graphs[name].inputs}
        feeds |= backend.load(path, bundle.initializers(bundle.graph_file(name))).run(inputs)
    file = tmp_path / "plain.onnx"
    file.write_bytes(plain.SerializeToString())
    used = {initializer.name for initializer in plain.graph.initializer}
    weights = {n: w for name in models for n, w in _mapped(models[name], paths[name]).items() if n in used}
    read = [value.name for value in plain.graph.input]
    assert not any("/Add" in name for name in read)  # the merged weights
    assert len(read) < len(graphs["step"].inputs)
    made = backend.load(file, weights).run({name: feeds[name] for name in read})
    for name, value in made.items():
        np.testing.assert_allclose(value, feeds[name], rtol=1e-4, atol=1e-5)


def test_merging_in_every_step_is_refused() -> None:
    with pytest.raises(InputError, match="Merging pays where it is done once per request"):
        ExportOptions(deltas="merged", hoist=False)
    with pytest.raises(InputError, match="Expected low-rank, merged, auto"):
        ExportOptions(deltas="merge")  # type: ignore[arg-type]  # which is the point
