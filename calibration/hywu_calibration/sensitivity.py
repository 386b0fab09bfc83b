"""How much each layer loses when it is quantized, measured inside the graph during real edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hywu_calibration.records import Record
from hywu_export.bundle.sessions import load_model

if TYPE_CHECKING:
    import onnx_ir as ir

    from hywu_export.passes.half import Half
    from hywu_export.passes.layers import Layer
    from hywu_export.passes.quantize import Quantized

Progress = Callable[[int, int], object]
_SIGNAL, _ERROR = "hywu.signal/", "hywu.error/"


def layer_sqnr(
    model: ir.Model,
    layers: Mapping[str, Quantized],
    records: Iterable[Record],
    count: int,
    progress: Progress | None = None,
    unsigned: bool = False,
) -> dict[str, float]:
    """Signal to quantization noise of each layer's output in INT8, in dB, each layer for itself.

    Args:
        model: in FP32.
        layers: how they are to be quantized.
        records: ``count`` of them, of this graph.
        unsigned: as for `quantize`.
    """
    from hywu_export.passes.quantize import quantize_layers

    def alter(altered: ir.Model, twins: Sequence[Layer]) -> None:
        quantize_layers(altered, [(twin, layers[twin.name]) for twin in twins], unsigned)

    return _sqnr(model, layers, alter, records, count, progress)


def weight_sqnr(
    model: ir.Model,
    names: Collection[str],
    records: Iterable[Record],
    count: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """As `layer_sqnr`, with weights in INT8 alone."""
    from hywu_export.passes.weights8 import quantize_layer_weights

    def alter(altered: ir.Model, twins: Sequence[Layer]) -> None:
        quantize_layer_weights(altered.graph, twins)

    return _sqnr(model, names, alter, records, count, progress)


def half_sqnr(
    model: ir.Model,
    names: Collection[str],
    dtype: Half,
    records: Iterable[Record],
    count: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """As `layer_sqnr`, with activation, weight and result rounded to FP16 or BF16."""
    from hywu_export.passes.half import round_product

    def alter(altered: ir.Model, twins: Sequence[Layer]) -> None:
        for twin in twins:
            round_product(altered.graph, twin.node, dtype)

    return _sqnr(model, names, alter, records, count, progress)


def _sqnr(
    model: ir.Model,
    names: Collection[str],
    alter: Callable[[ir.Model, Sequence[Layer]], None],
    records: Iterable[Record],
    count: int,
    progress: Progress | None,
) -> dict[str, float]:
    """What ``alter`` does to each layer for itself.

    Beside every product of the FP32 graph stands its altered twin, which reads the same exact input. All
    layers are measured in one run, which costs about two.

    What is averaged over the records is the ratio of noise to signal, not the noise: deltas of one
    instruction may make activations a thousand times those of another, and its signal would hide that the
    others are lost.
    """
    import onnx_ir as ir

    from hywu_export.passes.layers import find_layers

    if not names:
        return {}
    instrumented = model.clone()
    graph = instrumented.graph
    twins = []
    outputs: dict[
        str, tuple[ir.Value, str | None]
    ] = {}  # layer to its exact output, and the name of the other
    for layer in find_layers(instrumented):
        if layer.name not in names:
            continue
        node = layer.node
        twin = ir.node(node.op_type, node.inputs, node.attributes, name=f"{layer.name}/twin")
        twin.outputs[0].name = twin.name
        graph.insert_after(node, twin)
        twins.append(replace(layer, node=twin))
        outputs[layer.name] = (node.outputs[0], twin.outputs[0].name)
        graph.outputs.append(twin.outputs[0])  # so that it is not taken for unused
    own = len(model.graph.outputs)
    alter(instrumented, twins)
    twin_values = {value.name: value for value in graph.outputs[own:]}
    del graph.outputs[own:]
    for name, (exact, twin_name) in outputs.items():
        signal = ir.node("ReduceSumSquare", [exact], {"keepdims": 0})
        difference = ir.node("Sub", [exact, twin_values[twin_name]])
        error = ir.node("ReduceSumSquare", difference.outputs, {"keepdims": 0})
        graph.extend([signal, difference, error])
        for node, prefix in ((signal, _SIGNAL), (error, _ERROR)):
            node.outputs[0].name, node.outputs[0].dtype = f"{prefix}{name}", ir.DataType.FLOAT
            graph.outputs.append(node.outputs[0])
    session = load_model(instrumented)
    ratios: dict[str, list[float]] = {name: [] for name in outputs}
    for done, record in enumerate(records):
        if progress is not None:
            progress(done, count)
        results = session.run(record.inputs)
        for name, ratio in ratios.items():
            power, noise = float(results[_SIGNAL + name]), float(results[_ERROR + name])
            ratio.append(noise / power if power > 0 else float(noise > 0))
    return {name: decibels(1.0, float(np.mean(ratio))) for name, ratio in ratios.items() if ratio}


def decibels(signal: float, error: float) -> float:
    """10 log10(signal / error), infinite without an error, minus infinity without a signal."""
    if error == 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf
