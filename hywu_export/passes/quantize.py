"""Explicit quantization: QuantizeLinear and DequantizeLinear around products with constant weights.

The form is the one that TensorRT 10.3 to 11, TensorRT-RTX and ONNX Runtime all fuse::

    x ──────────────────────────────┬─▶ delta branch (x as it is)
      └▶ (Mul 1/s) ─▶ Q ─▶ DQ ─▶ MatMul ─▶ …
                INT8 weight ─▶ DQ ─┘

signed INT8, zero point 0, one scale for an activation, one for each output channel of a weight. Weights
are stored as INT8 in the layout that the product reads: nothing stands between a DequantizeLinear and the
product. Layers that share an activation share its Q; each has a DQ of its own, because ONNX Runtime fuses
a product only with a DQ that nothing else reads. Biases stay in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hywu_export.passes.layers import Layer, find_layers

LEVELS = 127
LEVELS_AVX2 = 63
"""Of a weight beside UINT8 activations: 2 · 255 · 63 fits into 16 bits, in which CPUs that have AVX2 but not
VNNI add two products."""
LEAST_SCALE = 2.0**-14
"""The smallest FP16 number with all its digits: scales are FP16, and a smaller one would be lost on the
way. A tensor that stays below 127 times this, 0.0078, loses resolution; its SQNR shows it."""
LEAST_CHANNEL_SCALE = 2.0**-20
"""As ``LEAST_SCALE``, for some of a weight's channels: subnormal, but exact, and far from zero."""


@dataclass(frozen=True)
class Quantized:
    """How a layer is quantized.

    Attributes:
        scale: of the activation (after smoothing); a number that FP16 holds exactly.
        smoothing: float32 ``[K]``, what the activation's channels are divided by, and the weight's
            multiplied; None for none. Layers with the same activation have the same, or none of them has one.
    """

    scale: float
    smoothing: npt.NDArray[np.float32] | None = field(default=None, compare=False)


def half_scale(threshold: float, least: float = LEAST_SCALE, levels: int = LEVELS) -> float:
    """The smallest FP16 number, from ``least``, that is no smaller than ``threshold / levels``."""
    exact = max(threshold / levels, least)
    rounded = np.float16(min(exact, 65504.0))
    if float(rounded) < exact:
        rounded = np.nextafter(rounded, np.float16(np.inf))
    return float(min(rounded, np.float16(65504)))


def quantize_weight(
    weight: npt.NDArray[Any],
    axis: int,
    smoothing: npt.NDArray[np.float32] | None = None,
    levels: int = LEVELS,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A weight as INT8 and the scales of its output channels, numbers that FP16 holds exactly.

    Args:
        weight: any floating-point dtype.
        axis: of the output channels.
        smoothing: ``[K]``, multiplies the input channels: the other axis of a matrix, axis 1 of a
            convolution's weight.
        levels: the largest integer.
    Returns:
        int8 of the same shape, and float32 ``[N]``.
    """
    wide = weight.astype(np.float32)
    if smoothing is not None:
        wide = wide * np.expand_dims(smoothing, [i for i in range(wide.ndim) if i != (1 if axis == 0 else 0)])
    others = tuple(i for i in range(wide.ndim) if i != axis)
    largest = np.abs(wide).max(axis=others)
    least = LEAST_CHANNEL_SCALE if largest.max(initial=0) >= LEAST_SCALE * LEVELS else LEAST_SCALE
    scales = np.array([half_scale(float(value), least, levels) for value in largest], np.float32)
    steps = np.expand_dims(scales, others)
    return np.clip(np.rint(wide / steps), -levels, levels).astype(np.int8), scales


def quantize(model: ir.Model, layers: Mapping[str, Quantized], unsigned: bool = False) -> ir.Model:
    """Puts Q and DQ around the named layers of a model in FP32, in place, and returns it.

    A Gemm becomes a MatMul and an Add, as ONNX Runtime has no INT8 Gemm with a bias in floating point.

    Args:
        layers: how each is quantized, by name.
        unsigned: activations are UINT8 with zero point 128 instead of INT8 with 0: the same numbers, and
            the only ones that ONNX Runtime has fast kernels for on x86; weights use `LEVELS_AVX2`.
    Raises:
        KeyError: a layer is not in the model.
    """
    found = {layer.name: layer for layer in find_layers(model)}
    quantize_layers(model, [(found[name], quantized) for name, quantized in layers.items()], unsigned)
    return model


def quantize_layers(
    model: ir.Model, layers: Sequence[tuple[Layer, Quantized]], unsigned: bool = False
) -> None:
    """As `quantize`, for layers in the order of the graph."""
    graph = model.graph
    zero: ir.Value | None = None
    shared: dict[tuple[ir.Value, float, bool], ir.Value] = {}
    for layer, quantized in layers:
        key = (layer.data, quantized.scale, quantized.smoothing is not None)
        zero = zero or _initializer(
            graph, "quantize/zero", np.array(128, np.uint8) if unsigned else np.array(0, np.int8)
        )
        if key not in shared:
            shared[key] = _quantizer(graph, layer, quantized, zero)
        data = _dequantizer(graph, layer, shared[key])
        levels = LEVELS_AVX2 if unsigned else LEVELS
        weight = dequantized_weight(graph, layer, quantized.smoothing, levels)
        if layer.op == "Gemm":
            _to_matmul(graph, layer, data, weight)
        else:
            layer.node.replace_input_with(0, data)
            layer.node.replace_input_with(1, weight)
    _remove_unused(model)


def _quantizer(graph: ir.Graph, layer: Layer, quantized: Quantized, zero: ir.Value) -> ir.Value:
    """The activation, smoothed and quantized, right before the layer that is first to read it."""
    data = layer.data
    base = f"{data.name}/int8" if quantized.smoothing is None else f"{data.name}/smooth/int8"
    nodes = []
    if quantized.smoothing is not None:
        factors = (1 / quantized.smoothing).astype(np.float32)
        if layer.op == "Conv":
            factors = factors.reshape(-1, *[1] * (len(layer.weight.shape or ()) - 2))
        multiplied = ir.node(
            "Mul",
            [data, _initializer(graph, f"quantize/{data.name}.factors", factors)],
            name=f"{data.name}/smooth",
        )
        multiplied.outputs[0].name = f"{data.name}/smooth"
        nodes.append(multiplied)
        data = multiplied.outputs[0]
    scale = _initializer(graph, f"quantize/{base}.scale", np.array(quantized.scale, np.float32))
    quantizer = ir.node("QuantizeLinear", [data, scale, zero], name=f"{base}/QuantizeLinear")
    quantizer.outputs[0].name = quantizer.name
    graph.insert_before(layer.node, [*nodes, quantizer])
    return quantizer.outputs[0]


def _dequantizer(graph: ir.Graph, layer: Layer, integers: ir.Value) -> ir.Value:
    quantizer = integers.producer()
    assert quantizer is not None
    node = ir.node(
        "DequantizeLinear", [integers, *quantizer.inputs[1:]], name=f"{layer.name}/DequantizeLinear"
    )
    node.outputs[0].name = node.name
    graph.insert_before(layer.node, node)
    return node.outputs[0]


def dequantized_weight(
    graph: ir.Graph,
    layer: Layer,
    smoothing: npt.NDArray[np.float32] | None = None,
    levels: int = LEVELS,
) -> ir.Value:
    """The INT8 weight through DQ, in the layout that a MatMul or Conv reads.

    A module that is used twice has one INT8 weight, unless its uses are smoothed in different ways.
    """
    value, scales = _integers(graph, layer, smoothing, levels)
    axis = 0 if layer.op == "Conv" else 1
    node = ir.node(
        "DequantizeLinear", [value, scales], {"axis": axis}, name=f"{layer.name}.weight/DequantizeLinear"
    )
    node.outputs[0].name = node.name
    graph.insert_before(layer.node, node)
    return node.outputs[0]


def _integers(
    graph: ir.Graph, layer: Layer, smoothing: npt.NDArray[np.float32] | None, levels: int
) -> tuple[ir.Value, ir.Value]:
    """The INT8 weight and its scales, as another use of the module has left them or new ones."""
    stored = layer.weight.const_value
    assert stored is not None
    dimensions = tuple(int(d) for d in stored.shape.numpy())
    turn = layer.op != "Conv" and layer.transposed
    base = f"{(layer.weight.name or '').removesuffix('.weight')}.weight"
    there = graph.initializers.get(f"{base}.int8")
    if there is not None:
        if there.meta["turned"] == turn and _same(there.meta["smoothing"], smoothing):
            return there, graph.initializers[f"{base}.scale"]
        base = f"{layer.name}.weight"
    scales = quantize_weight(stored.numpy(), layer.output_axis, smoothing, levels)[1]

    def integers() -> ir.Tensor[Any]:
        values = quantize_weight(stored.numpy(), layer.output_axis, smoothing, levels)[0]
        return ir.Tensor(np.ascontiguousarray(values.T if turn else values), name=f"{base}.int8")

    shape = ir.Shape(dimensions[::-1] if turn else dimensions)
    value = ir.Value(name=f"{base}.int8", shape=shape, type=ir.TensorType(ir.DataType.INT8))
    value.meta.update(turned=turn, smoothing=smoothing)
    # Computed when it is asked for: a model's weights are never all in memory.
    value.const_value = ir.LazyTensor(integers, ir.DataType.INT8, shape, name=value.name)
    graph.register_initializer(value)
    return value, _initializer(graph, f"{base}.scale", scales)


def _same(a: npt.NDArray[np.float32] | None, b: npt.NDArray[np.float32] | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _to_matmul(graph: ir.Graph, layer: Layer, data: ir.Value, weight: ir.Value) -> None:
    node = layer.node
    product = ir.node("MatMul", [data, weight], name=f"{node.name}/MatMul")
    made = [product]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        product.outputs[0].name = product.name
        made.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}/Add"))
    last, old = made[-1].outputs[0], node.outputs[0]
    last.shape, last.type, name = old.shape, old.type, old.name
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, last, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    last.name = name


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype))
    )
    value.const_value = ir.Tensor(array, name=name)
    graph.register_initializer(value)
    return value


def _remove_unused(model: ir.Model) -> None:
    """Drops the casts and transposes of replaced weights, and the weights."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
