# ruff: noqa: E501
"""Explicit INT8: the form that engines want, and ONNX Runtime's own quantization of the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hywu_calibration.methods import LEVELS
from hywu_export.bundle.sessions import load_model
from hywu_export.passes.layers import find_layers
from hywu_export.passes.quantize import (
    LEAST_SCALE,
    LEVELS_AVX2,
    Quantized,
    half_scale,
    quantize,
    quantize_weight,
)
from hywu_runtime.backends.onnxruntime import INTEGER_PRODUCTS, OnnxRuntime

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, length, 24] x, float[1, 4, 24] a, float[1, 20, 4] b, float[batch] gate, float[batch, 16, h, w] image)
    => (float[batch, length, 20] q, float[batch, length, 18] k, float[batch, 3, h, w] small, float[batch, 17, h, w] conv,
        float[batch, 16] gemm)
    <float[20, 24] "to_q.weight", float[18, 24] "to_k.weight", float[3, 16, 1, 1] "small.weight",
     float[17, 16, 3, 3] "conv.weight", float[17] "conv.bias", float[16, 24] "gemm.weight", float[16] "gemm.bias"> {
    n = Relu(x)
    wq = Transpose<perm = [1, 0]>("to_q.weight")
    base = MatMul(n, wq)
    at = Transpose<perm = [0, 2, 1]>(a)
    low = MatMul(n, at)
    g = Unsqueeze(gate, rest)
    gated = Mul(low, g)
    bt = Transpose<perm = [0, 2, 1]>(b)
    high = MatMul(gated, bt)
    q = Add(base, high)
    wk = Transpose<perm = [1, 0]>("to_k.weight")
    k = MatMul(n, wk)
    small = Conv("image", "small.weight")
    conv = Conv<pads = [1, 1, 1, 1]>("image", "conv.weight", "conv.bias")
    mean = ReduceMean<keepdims = 0>(x, axis)
    gemm = Gemm<transB = 1>(mean, "gemm.weight", "gemm.bias")
}
"""
SCALES = {"to_q": 0.03125, "to_k": 0.03125, "conv": 0.0234375, "gemm": 0.015625}


def model() -> ir.Model:
    """A small graph with a linear layer that takes a delta, one beside it, convolutions and a Gemm."""
    text = TEXT.replace('"image"', "image")
    for name in (
        "to_q.weight",
        "to_k.weight",
        "small.weight",
        "conv.weight",
        "conv.bias",
        "gemm.weight",
        "gemm.bias",
    ):
        text = text.replace(f'"{name}"', name.replace(".", "_"))
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.value_info}
    del proto.graph.value_info[:]
    del proto.graph.initializer[:]
    arrays = {name: random.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}
    arrays |= {"rest": np.array([1, 2], np.int64), "axis": np.array([1], np.int64)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in arrays.items())
    onnx.checker.check_model(proto)
    result = ir.from_proto(proto)
    for name in shapes:
        result.graph.initializers[name].name = name.replace("_weight", ".weight").replace("_bias", ".bias")
    return result


def inputs(batch: int = 2, gate: float = 1.0) -> dict[str, Any]:
    random = np.random.default_rng(1)
    shapes = {"x": (batch, 5, 24), "a": (1, 4, 24), "b": (1, 20, 4), "image": (batch, 16, 6, 7)}
    found = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**found, "gate": np.full(batch, gate, np.float32)}


def plan(smooth: bool = False) -> dict[str, Quantized]:
    factors = np.exp(np.random.default_rng(2).uniform(-1, 1, 24)).astype(np.float32) if smooth else None
    image = np.exp(np.random.default_rng(3).uniform(-1, 1, 16)).astype(np.float32) if smooth else None
    wider = 2.5 if smooth else 1.0  # some channels become larger
    return {
        name: Quantized(scale * wider, image if name == "conv" else factors) for name, scale in SCALES.items()
    }


def test_layers_are_found() -> None:
    found = {layer.name: layer for layer in find_layers(model())}
    assert list(found) == ["to_q", "to_k", "small", "conv", "gemm"]  # and no product with a delta
    assert [(x.reduction, x.outputs, x.small) for x in found.values()] == [
        (24, 20, False), (24, 18, False), (16, 3, True), (144, 17, False), (24, 16, False),
    ]  # fmt: skip
    assert found["to_q"].data.name == "n"


@given(st.floats(0, 1e6))
def test_scales_are_half_precision_numbers(threshold: float) -> None:
    scale = half_scale(threshold)
    assert scale == float(np.float16(scale))
    assert np.isfinite(scale)
    assert scale >= LEAST_SCALE
    if LEAST_SCALE * LEVELS < threshold < 65504:
        assert threshold <= scale * LEVELS <= threshold * 1.001


@pytest.mark.parametrize(("shape", "axis"), [((20, 24), 0), ((20, 24), 1), ((6, 5, 3, 3), 0)])
def test_weights_equal_onnxruntime(shape: tuple[int, ...], axis: int) -> None:
    """Its own quantizer, given the scale: the same integers but where a half is rounded."""
    from onnxruntime.quantization.quant_utils import quantize_nparray

    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    integers, scales = quantize_weight(weight, axis)
    for channel, scale in enumerate(scales):
        row = np.take(weight, channel, axis)
        expected = quantize_nparray(onnx.TensorProto.INT8, row, scale, np.int8(0), -127, 127)
        np.testing.assert_array_equal(np.take(integers, channel, axis), expected)
        assert np.abs(row).max() / 127 == pytest.approx(scale, rel=2e-3)
    steps = np.expand_dims(scales, [i for i in range(weight.ndim) if i != axis])
    assert np.abs(integers * steps - weight).max() <= scales.max() / 2


def test_channels_that_are_zero_or_tiny() -> None:
    weight = np.zeros((4, 16), np.float32)
    weight[1], weight[2] = 1.0, 1e-6
    integers, scales = quantize_weight(weight, 0)
    assert (scales > 0).all()
    assert (np.float16(scales) == scales).all()
    assert not integers[0].any()
    assert (integers[1] == 127).all() or (integers[1] == 126).all()


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
def test_numbers(smooth: bool, unsigned: bool) -> None:
    """What the formula says, and near to what FP32 gives."""
    original, arrays = model(), inputs()
    got = load_model(quantize(original.clone(), plan(smooth), unsigned)).run(arrays)
    exact = load_model(original).run(arrays)
    x = np.maximum(arrays["x"], 0)

    def fake(values: np.ndarray, scale: float, factors: np.ndarray | None) -> np.ndarray:
        values = values / factors if factors is not None else values
        return np.clip(np.rint(values / scale), -128, 127) * scale

    for name in ("to_q", "to_k"):
        quantized = plan(smooth)[name]
        weight = original.graph.initializers[f"{name}.weight"].const_value.numpy()
        levels = LEVELS_AVX2 if unsigned else LEVELS
        integers, scales = quantize_weight(weight, 0, quantized.smoothing, levels)
        assert np.abs(integers).max() == levels
        expected = fake(x, quantized.scale, quantized.smoothing) @ (integers * scales[:, None]).T
        if name == "to_q":  # the delta branch reads x as it is
            expected = expected + (x @ arrays["a"][0].T) @ arrays["b"][0].T
        np.testing.assert_allclose(got[name[3:]], expected, atol=3e-3)
    for name, array in exact.items():
        noise = np.square(got[name] - array).sum() / np.square(array).sum()
        assert 10 * np.log10(1 / max(noise, 1e-12)) > (26 if unsigned else 28), name
    np.testing.assert_allclose(got["small"], exact["small"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["graph.onnx", f"graph{INTEGER_PRODUCTS}"])
def test_the_runtime_computes_what_is_written(tmp_path: Path, name: str) -> None:
    """Also in integers, and on a CPU that adds two of their products in 16 bits: large numbers of one sign."""
    original, arrays = model(), inputs()
    arrays["x"] = np.abs(arrays["x"])
    for weight in ("to_q.weight", "to_k.weight"):
        tensor = original.graph.initializers[weight].const_value
        assert tensor is not None
        original.graph.initializers[weight].const_value = ir.tensor(np.abs(tensor.numpy()), name=weight)
    quantized = quantize(original, plan(False), unsigned=name.endswith(INTEGER_PRODUCTS))
    expected = load_model(quantized).run(arrays)
    file = tmp_path / name
    file.write_bytes(ir.to_proto(quantized).SerializeToString())
    for output, value in OnnxRuntime("ort-cpu", 0, None).load(file, {}).run(arrays).items():
        np.testing.assert_allclose(value, expected[output], rtol=1e-4, atol=1e-3 * np.abs(value).max())


def test_form() -> None:
    """INT8 weights with nothing between DQ and product; one Q for what is read twice; deltas left alone."""
    graph = quantize(model(), plan(True)).graph
    readers: dict[str, int] = {}
    for node in graph:
        if node.op_type == "QuantizeLinear":
            readers[node.inputs[0].name] = len(node.outputs[0].uses())
            zero = node.inputs[2].const_value
            assert (zero.dtype, zero.numpy()) == (ir.DataType.INT8, 0)
        if node.op_type == "DequantizeLinear":
            (use,) = node.outputs[0].uses()
            assert use.node.op_type in ("MatMul", "Conv")
            assert len(node.inputs) == 2 or node.inputs[2].const_value.numpy() == 0
            if node.inputs[0].is_initializer():
                weight, scale = node.inputs[0].const_value, node.inputs[1].const_value
                assert weight.dtype == ir.DataType.INT8
                assert scale.shape == (weight.shape[node.attributes["axis"].as_int()],)
    assert readers == {"n/smooth": 2, "image/smooth": 1, "mean/smooth": 1}
    (down,) = [node for node in graph if node.op_type == "MatMul" and node.inputs[1].name == "at"]
    assert down.inputs[0].name == "n"
    assert not any(name.endswith((".weight",)) and name != "small.weight" for name in graph.initializers)
    assert not any(value.dtype == ir.DataType.INT32 for value in graph.initializers.values())


def test_deltas_and_samples() -> None:
    """Gate 0 is the base model bit for bit, deltas change the result, a sample does not see its neighbours."""
    session = load_model(quantize(model(), plan(True)))
    on, off, arrays = session.run(inputs()), session.run(inputs(gate=0)), inputs(gate=0)
    without = session.run({**arrays, "a": np.zeros_like(arrays["a"])})
    np.testing.assert_array_equal(off["q"], without["q"])
    assert np.abs(on["q"] - off["q"]).max() > 0.1
    alone = session.run({k: v[:1] if len(v) == 2 else v for k, v in inputs().items()})
    for name, array in alone.items():
        np.testing.assert_allclose(array, on[name][:1], atol=1e-5)


def test_same_model_same_bytes() -> None:
    first, second = (
        ir.to_proto(quantize(model(), plan(True))).SerializeToString(deterministic=True) for _ in "ab"
    )
    assert first == second


@pytest.mark.rtx
def test_tensorrt_rtx_parses_it() -> None:
    pytest.importorskip("tensorrt_rtx")
    from hywu_export.engines.tensorrt import parser_errors
    from hywu_export.passes.half import to_half

    narrow = to_half(quantize(model(), plan(True)), "fp16", ())
    assert parser_errors(ir.to_proto(narrow).SerializeToString()) == []


TWICE = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[n, 24] x) => (float[n, 24] y) <float[24, 24] m_weight> {
    w = Transpose<perm = [1, 0]>(m_weight)
    first = MatMul(x, w)
    between = Tanh(first)
    y = MatMul(between, w)
}
"""


@pytest.mark.parametrize("factors", [(None, None), (2, 2), (2, None), (2, 3)])
def test_a_module_used_twice_has_one_weight(factors: tuple[float | None, float | None]) -> None:
    parsed = onnx.parser.parse_model(TWICE)
    weight = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)
    del parsed.graph.value_info[:]
    parsed.graph.initializer.append(onnx.numpy_helper.from_array(weight, "m.weight"))
    parsed.graph.node[0].input[0] = "m.weight"
    original = ir.from_proto(parsed)
    plan = {
        name: Quantized(0.03125, None if f is None else np.geomspace(1, f, 24).astype(np.float32))
        for name, f in zip(("m", "m#2"), factors)
    }
    made = quantize(original.clone(), plan)
    stored = sorted(name for name in made.graph.initializers if name.endswith(".weight.int8"))
    same = factors[0] == factors[1]
    assert stored == (["m.weight.int8"] if same else ["m#2.weight.int8", "m.weight.int8"])
    producers = [node.inputs[1].producer() for node in made.graph if node.op_type == "MatMul"]
    assert len(set(producers)) == 2  # ONNX Runtime fuses only a DQ that nothing else reads
    x = {"x": np.random.default_rng(1).uniform(-3, 3, (5, 24)).astype(np.float32)}
    exact, got = (load_model(m).run(x)["y"] for m in (original, made))
    assert 20 < 10 * np.log10(np.square(exact).sum() / np.square(exact - got).sum()) < 60
