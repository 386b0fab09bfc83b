"""INT8 weights alone: half the bytes of FP16, products in floating point.

A weight becomes INT8 with one scale for each output channel and a DequantizeLinear directly before its
product, stored in the layout that the product reads: nothing stands between the two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from hywu_export.passes.layers import Layer, find_layers
from hywu_export.passes.quantize import dequantized_weight


def quantize_weights(model: ir.Model, wide: Collection[str] = ()) -> list[str]:
    """Stores the weights of a model in FP32 as INT8, in place.

    Layers with a dimension below ``layers.LEAST_DIMENSION`` keep theirs: they gain nothing.

    Args:
        wide: names of layers that keep theirs too.
    Returns:
        the names of the layers with INT8 weights, in the order of the graph.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    layers = [layer for layer in find_layers(model) if not layer.small and layer.name not in wide]
    quantize_layer_weights(model.graph, layers)
    RemoveUnusedNodesPass()(model)
    return [layer.name for layer in layers]


def quantize_layer_weights(graph: ir.Graph, layers: Sequence[Layer]) -> None:
    """Gives some layers of a graph INT8 weights; what made their old ones stays, unused."""
    for layer in layers:
        layer.node.replace_input_with(1, dequantized_weight(graph, layer))
        layer.node.attributes.pop("transB", None)  # the weight is stored as [K, N] now
