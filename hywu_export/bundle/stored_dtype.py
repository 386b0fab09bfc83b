"""Weights whose stored dtype differs from the one they are computed in."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def cast_weights(model: ir.Model, stored: Mapping[str, ir.DataType]) -> ir.Model:
    """Declares initializers in their stored dtype, with a Cast to the dtype the graph uses; in place.

    ``stored`` maps initializer names to dtypes; entries that agree with the graph change nothing. The Cast
    node and its output are named ``<initializer>/Cast``.
    """
    graph = model.graph
    casts: list[ir.Node] = []
    for name, dtype in stored.items():
        value = graph.initializers[name]
        if value.dtype is None or value.dtype == dtype:
            continue
        node = ir.node("Cast", [value], {"to": value.dtype}, name=f"{name}/Cast")
        cast = node.outputs[0]
        cast.name = node.name
        cast.type, cast.shape = value.type, value.shape
        value.replace_all_uses_with(cast)
        node.replace_input_with(0, value)
        value.type = ir.TensorType(dtype)
        casts.append(node)
    if casts:
        graph.insert_before(graph[0], casts)
    return model
