"""Frees an axis that was traced with size 1."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from hywu_runtime.errors import UnsupportedError


def free_delta_axis(model: ir.Model, axes: Collection[str], graph_name: str) -> ir.Model:
    """Lets values that are computed from such inputs alone have any size along the axis; in place.

    Tracing writes a 1 where the axis stands in the shape of a Reshape: there it becomes 0, "as in the
    input". Where deltas meet activations, broadcasting does the rest. Shapes inferred while the axis was 1
    are forgotten.

    Raises:
        UnsupportedError: an operation on deltas alone folds the axis into another, or picks a part of it:
            it would be wrong for more than one set.
    """
    graph = model.graph
    sources = [v for v in graph.inputs if v.shape is not None and any(_is(d, axes) for d in v.shape)]
    downstream: set[ir.Value] = set(sources)
    alone: set[ir.Value] = set(sources)  # made of deltas and constants only
    shaped: list[ir.Node] = []
    for node in graph:
        inputs = [v for v in node.inputs if v is not None]
        if not any(v in downstream for v in inputs):
            continue
        downstream.update(node.outputs)
        if all(v in alone or v.is_initializer() for v in inputs):
            alone.update(node.outputs)
            if node.op_type == "Reshape" and node.inputs[0] in alone:
                _copy_first_dimension(node)
            shaped.append(node)
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    _infer_shapes(model)
    for node in shaped:
        if node.op_type == "Shape":
            continue
        for output in node.outputs:
            if output.shape is None or not any(_is(d, axes) for d in output.shape):
                raise UnsupportedError(
                    f"{node.op_type} {node.name!r} of graph {graph_name!r} loses the axis of delta sets",
                    f"Axis {' or '.join(sorted(axes))} stays in all that is computed from deltas alone",
                    "Write the operation with the axis in front, and let it broadcast against activations",
                )
    return model


def _is(dimension: int | ir.SymbolicDim, axes: Collection[str]) -> bool:
    return isinstance(dimension, ir.SymbolicDim) and dimension.value in axes


def _copy_first_dimension(node: ir.Node) -> None:
    shape = node.inputs[1]
    if shape is None or shape.const_value is None:
        return
    sizes = shape.const_value.numpy().copy()
    if sizes.size and sizes[0] == 1 and node.graph is not None:
        sizes[0] = 0
        name = f"{node.outputs[0].name}.shape"
        value = ir.Value(name=name, const_value=ir.tensor(np.asarray(sizes, np.int64), name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(sizes.shape)
        node.graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _infer_shapes(model: ir.Model) -> None:
    ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
