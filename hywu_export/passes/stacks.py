"""Stacked parameters of a traced graph, taken apart into those that checkpoints hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir


def unstack(model: ir.Model, stacks: Mapping[str, Sequence[str]]) -> ir.Model:
    """Replaces each initializer ``[count, first, …]`` of ``stacks`` that the graph has by ``count`` of
    ``[first, …]``, in place; their names are those that ``stacks`` gives.

    They are put together along axis 0 and reshaped: two nodes, which belong to the module that reads the
    stack first.
    """
    graph = model.graph
    place = {node: index for index, node in enumerate(graph)}
    shapes: dict[tuple[int, ...], ir.Value] = {}
    for name, parts in stacks.items():
        value = graph.initializers.get(name)
        if value is None:
            continue
        assert value.shape is not None
        shape = value.shape.numpy()
        if shape not in shapes:
            shapes[shape] = _constant(graph, f"stack{len(shapes)}", shape)
        each = [ir.Value(name=part, type=value.type, shape=ir.Shape(shape[1:])) for part in parts]
        for part in each:
            graph.initializers.add(part)
        concat = ir.node("Concat", each, {"axis": 0})
        reshape = ir.node("Reshape", [concat.outputs[0], shapes[shape]])
        concat.outputs[0].shape = ir.Shape([shape[0] * shape[1], *shape[2:]])
        reshape.outputs[0].shape = value.shape
        reader = min(value.consumers(), key=place.__getitem__)
        for node in (concat, reshape):
            node.outputs[0].type = value.type
            node.metadata_props.update(reader.metadata_props)
        value.replace_all_uses_with(reshape.outputs[0])
        del graph.initializers[name]
        graph.insert_before(reader, [concat, reshape])
    return model


def _constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.asarray(values, np.int64), name=name))
    value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(values)])
    graph.initializers.add(value)
    return value
