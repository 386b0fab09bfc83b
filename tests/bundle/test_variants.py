"""Graphs of a bundle as models, and back into it as a variant."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors import safe_open
from toy_bundle import rewrite, write_bundle

from hywu_export.bundle.variants import component_sizes, load_graph, write_variant
from hywu_export.passes import lint
from hywu_export.passes.half import to_half
from hywu_runtime import Bundle, Editor
from hywu_runtime.errors import BundleError


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "toy")
    return tmp_path / "toy"


def halves(bundle: Path, dtype: str = "fp16") -> dict[str, ir.Model]:
    opened = Bundle.open(bundle)
    return {graph: to_half(load_graph(opened, graph), dtype) for graph in opened.manifest.graphs}  # type: ignore[arg-type]


def photo() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (16, 24, 3), np.uint8)


def inputs() -> dict[str, np.ndarray]:
    return {"region": np.ones((1, 1, 4, 6), np.float32)}


def edit(bundle: Path, variant: str | None, strength: float = 1.0) -> np.ndarray:
    with Editor.load(bundle, variant=variant) as editor:
        return np.asarray(
            editor.edit(
                photo(), "hello", seed=3, steps=3, delta_strength=strength, inputs=inputs(), output="array"
            )
        )


def test_unchanged_models_give_the_same_pictures(toy: Path) -> None:
    opened = Bundle.open(toy)
    write_variant(toy, "same", "fp16", {g: load_graph(opened, g) for g in opened.manifest.graphs})
    Bundle.open(toy, verify=True)
    np.testing.assert_array_equal(edit(toy, "same"), edit(toy, None))


def test_half_precision_is_near_and_strength_0_is_its_base(toy: Path) -> None:
    write_variant(toy, "fp16", "fp16", halves(toy))
    difference = np.abs(edit(toy, "fp16").astype(int) - edit(toy, None))
    assert difference.max() <= 1
    assert (edit(toy, "fp16") != edit(toy, "fp16", 0.0)).any()
    again = load_graph(Bundle.open(toy), "step", "fp16")
    assert [v.dtype for v in again.graph.inputs] == [
        v.dtype for v in load_graph(Bundle.open(toy), "step").graph.inputs
    ]


def test_the_same_models_give_the_same_bytes(toy: Path, tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        write_variant(toy, "fp16", "fp16", halves(toy), {"note.txt": [b"x"]}, None)
        contents.append({p.name: p.read_bytes() for p in (toy / "variants").rglob("*") if p.is_file()})
    assert contents[0] == contents[1]


def test_graphs_share_weights_that_are_alike(toy: Path) -> None:
    opened = Bundle.open(toy)
    large = np.arange(4096, dtype=np.float32).reshape(64, 64)

    def with_weight(scale: float) -> ir.Model:
        model = load_graph(opened, "prepare")
        value = ir.Value(name="unet.w", shape=ir.Shape(large.shape), type=ir.TensorType(ir.DataType.FLOAT))
        value.const_value = ir.Tensor(large * scale, name="unet.w")
        model.graph.register_initializer(value)
        return model

    scales = {"prepare": 1, "words": 1, "marks": 2}
    write_variant(toy, "v", "fp16", {graph: with_weight(scale) for graph, scale in scales.items()})
    with safe_open(toy / "variants/v/weights/unet.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["unet.w", "unet.w@marks"]
        np.testing.assert_array_equal(file.get_tensor("unet.w@marks"), large * 2)
    for graph, scale in scales.items():
        value = load_graph(Bundle.open(toy), graph, "v").graph.initializers["unet.w"].const_value
        assert value is not None
        np.testing.assert_array_equal(value.numpy(), large * scale)
    assert component_sizes({"a": with_weight(1)})["unet"] == large.nbytes


def with_external_weight(bundle: Path, dtype: ir.DataType) -> np.ndarray:
    """A variant ``v`` with the weight ``unet.w``, which is in a file of its own."""
    large = np.random.default_rng(0).standard_normal((60, 50)).astype(dtype.numpy())
    model = load_graph(Bundle.open(bundle), "prepare")
    value = ir.Value(name="unet.w", shape=ir.Shape(large.shape), type=ir.TensorType(dtype))
    value.const_value = ir.Tensor(large, dtype, name="unet.w")
    model.graph.register_initializer(value)
    write_variant(bundle, "v", "fp16", {"prepare": model})
    return large


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8])
def test_hard_linked_files_are_read(toy: Path, tmp_path: Path, dtype: ir.DataType) -> None:
    large = with_external_weight(toy, dtype)
    copy = shutil.copytree(toy, tmp_path / "copy", copy_function=os.link)
    assert os.stat(copy / "variants/v/weights/unet.safetensors").st_nlink == 2
    tensor = load_graph(Bundle.open(copy), "prepare", "v").graph.initializers["unet.w"].const_value
    assert tensor is not None
    assert tensor.dtype == dtype
    assert not tensor.numpy().flags.owndata  # mapped, not read
    assert tensor.tobytes() == large.tobytes()
    write_variant(copy, "again", "fp16", {"prepare": load_graph(Bundle.open(copy), "prepare", "v")})
    parts = [(copy / "variants" / name / "weights/unet.safetensors").read_bytes() for name in ("v", "again")]
    assert parts[0] == parts[1]


def test_weights_that_are_not_where_the_graph_says(toy: Path) -> None:
    with_external_weight(toy, ir.DataType.FLOAT16)
    path = toy / "variants/v/prepare.onnx"
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == "unet.w")
    entries = {entry.key: entry for entry in tensor.external_data}
    for key, value, words in (
        ("offset", "999999", "is cut off"),
        ("location", "../../../secret", "the manifest does not list"),
        ("location", "/etc/passwd", "the manifest does not list"),
    ):
        entries[key].value = value
        onnx.save(model, path)
        rewrite(toy, lambda _: None)
        with pytest.raises(BundleError, match=rf"'unet.w' of variants/v/prepare.onnx .*{words}"):
            load_graph(Bundle.open(toy), "prepare", "v")


def test_a_damaged_graph(toy: Path) -> None:
    (toy / "step.onnx").write_bytes(b"no graph")
    rewrite(toy, lambda _: None)
    with pytest.raises(BundleError, match=r"step.onnx cannot be loaded"):
        load_graph(Bundle.open(toy), "step")


def test_a_full_disk_leaves_the_bundle_as_it_was(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = halves(toy)
    before = {p: p.read_bytes() for p in toy.rglob("*") if p.is_file()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="No space left"):
        write_variant(toy, "fp16", "fp16", models)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in toy.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_variants_keep_the_rules_and_tensorrt_parses_them(toy: Path, dtype: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    from hywu_export.engines.tensorrt import parser_errors

    models = halves(toy, dtype)
    opened = Bundle.open(toy)
    before = {g: {f.rule for f in lint(load_graph(opened, g), opened.manifest.axes)} for g in models}
    for graph, model in models.items():
        assert {f.rule for f in lint(model, opened.manifest.axes)} <= before[graph]
    write_variant(toy, dtype, dtype, models)  # type: ignore[arg-type]
    opened = Bundle.open(toy)
    for graph in models:
        assert parser_errors(opened.file(opened.graph_file(graph, dtype))) == []
