# ruff: noqa: E501
"""Reading layers: off the log of TensorRT-RTX, from the inspector's JSON, and from what says nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantized import model

from hywu_export.engines.branches import find_branches
from hywu_export.engines.layers import from_inspector, from_log, memory_from_log

LINE = (
    "Name: a, b/MatMul_myl0_7, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,256], Strides: [256,1], "
    "StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major linear format }], Constants: [ { Name: c, "
    "Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row }], Outputs: [ { Name: y, "
    "Dimensions: [-1,256], Strides: [256,1], StrideOrder: [1,0], Datatype: Half, Format: (NHWC) Channel major format }], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: m/MatMul]\x1f[ONNX Layer: m/DQ][ONNX Layer: m/DQ_2]"
)  # fmt: skip


def test_a_listed_layer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        f"[V] {LINE}\n[V] Layers:\n{LINE}\n\nI/O Tensors:\n Name: x\n[I] Total Activation Memory: 42 bytes\n"
    )
    (layer,) = from_log(log) or []
    assert (layer.name, layer.kind, layer.precision) == ("a, b/MatMul_myl0_7", "gemm", "int8")
    assert (layer.inputs, layer.constants, layer.outputs) == (("int8",), ("fp32",), ("fp16",))
    assert layer.nodes == ("m/MatMul", "m/DQ", "m/DQ_2")
    assert memory_from_log(log) == {"activation_bytes": 42}


@pytest.mark.parametrize(
    "text", ["", "[V] Layers:\n", "[V] no layers here\n", "\x00\xff[V] Layers:\nName: cut"]
)
def test_a_log_without_layers(tmp_path: Path, text: str) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    assert from_log(log) is None


@pytest.mark.parametrize("value", ["", "[]", "{}", '{"Layers": ["names", "alone"]}', '{"Layers": []}', "{"])
def test_an_inspector_without_details(value: str) -> None:
    assert from_inspector(value) is None


def test_an_inspector_of_tensorrt() -> None:
    tensors = [{"Name": "x", "Dimensions": [1], "Format/Datatype": "Row major linear FP16 format"}]
    layer = {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Inputs": tensors,
        "Outputs": tensors,
        "Weights": {"Type": "Half", "Count": 9},
        "Metadata": "[ONNX Layer: a/Conv]\x1e[ONNX Layer: a/Add]",
    }
    (found,) = from_inspector(json.dumps({"Layers": [layer]})) or []
    assert (found.precision, found.is_product, found.constants) == ("fp16", True, ("fp16",))
    assert found.nodes == ("a/Conv", "a/Add")


def test_branches_of_a_quantized_graph() -> None:
    (branch,) = find_branches(model())
    assert (branch.module, branch.add, branch.base) == ("m", "m/Add", "m/MatMul")
    assert (branch.down, branch.up) == (("m/MatMul_2",), ("m/MatMul_3",))


def test_branches_of_convolutions_too(lora_bundle: Path) -> None:
    import onnx

    from hywu_runtime import Manifest

    graphs = ("prepare_step", "step")
    found = [
        branch
        for name in graphs
        for branch in find_branches(onnx.load(str(lora_bundle / f"{name}.onnx"), load_external_data=False))
    ]
    deltas = Manifest.read(lora_bundle).deltas
    assert deltas is not None
    assert {branch.module for branch in found} == {target.module for target in deltas.targets}
    for branch in found:
        assert branch.up, branch
        assert branch.down, branch
        assert branch.add is not None, branch
        assert branch.base is not None, branch
        assert branch.module in branch.base
