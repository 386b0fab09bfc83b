"""Types and shapes of all values of a graph, for given sizes of its axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import onnx_ir as ir
from onnxscript.optimizer import fold_constants


class Known(NamedTuple):
    """What shape inference found out about a value."""

    shape: tuple[int, ...]
    type: ir.TensorType


def infer(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, Known]:
    """Type and shape of all values, by name, whose shape follows from the axes' ``sizes``."""
    copy = model.clone()
    for value in copy.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape([d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape.dims])
    for value in (*copy.graph.outputs, *(v for node in copy.graph for v in node.outputs)):
        value.shape = None
    # With sizes known, what a shape is computed from folds to constants, and inference goes on from there.
    fold_constants(copy, onnx_shape_inference=True, input_size_limit=1024, output_size_limit=1024)
    return {
        str(value.name): Known(tuple(int(d) for d in value.shape.numpy()), value.type)
        for value in (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))
        if value.shape is not None and value.shape.is_static() and isinstance(value.type, ir.TensorType)
    }
