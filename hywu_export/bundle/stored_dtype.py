"""Weights whose stored dtype differs from the one they are computed in."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def cast_weights(model: ir.Model, stored: Mapping[str, ir.DataType]) -> ir.Model:
    """Declares initializers in their stored dtype, with a Cast to the dtype the graph uses; in place.

    ``stored`` maps initializer names to dtypes; entries that agree with the graph change nothing. The Cast
    node and its output are named ``<initializer>/Cast``. Weights of one dtype that are only put together
    (passes.stacks) are cast in one, behind the Concat.
    """
    graph = model.graph
    pending = {
        value: dtype
        for value, dtype in ((graph.initializers[name], dtype) for name, dtype in stored.items())
        if value.dtype not in (None, dtype)
    }
    for node in list(graph):
        narrow = _put_together(node, pending)
        if narrow is not None:
            first, result = node.inputs[0], node.outputs[0]
            assert first is not None
            graph.insert_after(node, _cast(result, first.type))
            result.type = ir.TensorType(narrow)
            for value in node.inputs:
                if value is not None and pending.pop(value, None) is not None:
                    value.type = ir.TensorType(narrow)
    casts = []
    for value, dtype in pending.items():
        casts.append(_cast(value, value.type))
        value.type = ir.TensorType(dtype)
    if casts:
        graph.insert_before(graph[0], casts)
    return model


def _put_together(node: ir.Node, pending: Mapping[ir.Value, ir.DataType]) -> ir.DataType | None:
    """The stored dtype of what a Concat puts together: weights of one dtype that nothing else reads."""
    if node.op_type != "Concat" or node.outputs[0].is_graph_output():
        return None
    if any(value is None or set(value.consumers()) != {node} for value in node.inputs):
        return None
    dtypes = {pending.get(value) for value in node.inputs if value is not None}
    return dtypes.pop() if len(dtypes) == 1 else None


def _cast(value: ir.Value, wide: ir.TypeProtocol | None) -> ir.Node:
    """A Cast to ``wide``, which all readers of ``value`` read instead."""
    assert wide is not None
    node = ir.node("Cast", [value], {"to": wide.dtype}, name=f"{value.name}/Cast")
    cast = node.outputs[0]
    cast.name, cast.type, cast.shape = node.name, wide, value.shape
    value.replace_all_uses_with(cast)
    node.replace_input_with(0, value)
    return node
