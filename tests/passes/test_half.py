"""Half precision and INT8 weights: against ONNX Runtime and NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hywu_export.passes.half import DTYPES, Half, emulate, to_half
from hywu_export.passes.weights8 import quantize_weights

IR_VERSION, OPSET = 10, 20


def model(op: str, weight: np.ndarray[Any, Any], **attributes: Any) -> ir.Model:
    """``y = softmax(product(x, weight))·2`` with a float32 signature."""
    shape = ("n", weight.shape[1]) if op != "MatMul" and attributes.get("transB") else ("n", weight.shape[0])
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    parameter = ir.Value(name="layer.weight", const_value=ir.Tensor(weight, name="layer.weight"))
    parameter.shape, parameter.type = ir.Shape(weight.shape), ir.TensorType(ir.DataType.FLOAT)
    two = ir.Value(name="two", const_value=ir.Tensor(np.float32([2]), name="two"))
    two.shape, two.type = ir.Shape([1]), ir.TensorType(ir.DataType.FLOAT)
    product = ir.node(op, [x, parameter], attributes, name="product")
    softmax = ir.node("Softmax", product.outputs, {"axis": -1}, name="softmax")
    doubled = ir.node("Mul", [softmax.outputs[0], two], name="doubled")
    last = ir.node("MatMul", [doubled.outputs[0], _square(doubled, weight, attributes)], name="last")
    for node in (product, softmax, doubled):
        node.outputs[0].name = node.name
    y = last.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["n", "m"]), ir.TensorType(ir.DataType.FLOAT)
    other = last.inputs[1]
    assert other is not None
    graph = ir.Graph(
        [x], [y], nodes=[product, softmax, doubled, last], initializers=[parameter, two, other],
        opset_imports={"": OPSET}, name="graph",
    )  # fmt: skip
    return ir.Model(graph, ir_version=IR_VERSION)


def _square(node: ir.Node, weight: np.ndarray[Any, Any], attributes: dict[str, Any]) -> ir.Value:
    size = weight.shape[0] if attributes.get("transB") else weight.shape[1]
    array = np.random.default_rng(1).normal(size=(size, 8)).astype(np.float32)
    value = ir.Value(name="second.weight", const_value=ir.Tensor(array, name="second.weight"))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
    return value


def run(one: ir.Model, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(ir.to_proto(one).SerializeToString())
    return np.asarray(session.run(None, {"x": x})[0])


def inputs(rows: int, columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


@given(rows=st.integers(1, 5), k=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 9))
def test_fp16_changes_no_value_beyond_its_own_rounding(rows: int, k: int, n: int, seed: int) -> None:
    weight = inputs(k, n, seed) / np.sqrt(k).astype(np.float32)
    x = inputs(rows, k, seed + 1)
    exact = run(model("MatMul", weight), x)
    half = to_half(model("MatMul", weight), "fp16")
    assert [(v.name, v.dtype) for v in (*half.graph.inputs, *half.graph.outputs)] == [
        ("x", ir.DataType.FLOAT),
        ("y", ir.DataType.FLOAT),
    ]
    scale = max(1.0, float(np.abs(exact).max()))
    np.testing.assert_allclose(run(half, x), exact, atol=8 * 2.0**-11 * scale)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_emulation_is_what_numpy_computes(dtype: Half) -> None:
    narrow = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}[dtype]

    def rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values.astype(narrow).astype(np.float32)

    weight, x = inputs(24, 32), inputs(3, 24, 1)
    one = model("MatMul", weight)
    second = one.graph.initializers["second.weight"].const_value
    assert second is not None
    product = rounded(rounded(x) @ rounded(weight))
    e = np.exp(product - product.max(-1, keepdims=True))
    doubled = rounded(rounded(e / e.sum(-1, keepdims=True)) * 2)
    expected = rounded(doubled @ rounded(second.numpy()))
    found = run(emulate(to_half(one, dtype)), x)
    # A sum in another order may round to the neighbour once.
    step = 2.0 ** (-10 if dtype == "fp16" else -7)
    np.testing.assert_allclose(found, expected, rtol=2 * step, atol=2 * step * float(np.abs(expected).max()))
    assert np.mean(found == expected) > 0.8


def test_every_node_has_one_floating_point_type() -> None:
    half = to_half(model("MatMul", inputs(24, 32)), "fp16")
    kinds = {"product": ir.DataType.FLOAT16, "softmax": ir.DataType.FLOAT, "last": ir.DataType.FLOAT16}
    import onnx

    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(half), check_type=True, strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    for node in half.graph:
        if node.name in kinds and node.name in types:
            assert types[node.name] == kinds[node.name]
    sources = [n.inputs[0] for n in half.graph if n.op_type == "Cast"]
    assert all(v is not None and (v.producer() is None or v.producer().op_type != "Cast") for v in sources)


def test_a_weight_beyond_fp16_keeps_its_layer_wide() -> None:
    weight = inputs(24, 32)
    weight[0, 0] = 1e5
    half = to_half(model("MatMul", weight), "fp16")
    stored = half.graph.initializers["layer.weight"].const_value
    assert stored is not None
    assert stored.dtype == ir.DataType.FLOAT
    assert np.isfinite(run(half, inputs(2, 24))).all()


@pytest.mark.parametrize(("op", "attributes"), [("MatMul", {}), ("Gemm", {"transB": 1}), ("Gemm", {})])
def test_weights_in_int8_stand_directly_before_their_product(op: str, attributes: dict[str, int]) -> None:
    weight, x = inputs(32, 32), inputs(3, 32, 1)
    exact = run(model(op, weight, **attributes), x)
    one = model(op, weight, **attributes)
    assert quantize_weights(one) == ["layer"]  # the second has 8 outputs
    to_half(one, "fp16")
    nodes = {node.op_type: node for node in one.graph}
    dequantize = nodes["DequantizeLinear"]
    integers, scale = dequantize.inputs[0], dequantize.inputs[1]
    assert integers is not None
    assert integers.const_value is not None
    assert scale is not None
    assert (integers.const_value.dtype, scale.dtype) == (ir.DataType.INT8, DTYPES["fp16"])
    product = next(use.node for use in dequantize.outputs[0].uses())
    assert product.op_type == op
    np.testing.assert_allclose(run(one, x), exact, atol=0.05 * float(np.abs(exact).max()))
    assert not np.array_equal(run(one, x), exact)
