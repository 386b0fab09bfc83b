"""3x3 convolutions as Winograd products: a quarter of the multiplications.

A tile of 4 x 4 results is computed from 6 x 6 inputs with one multiplication for each of these (S. Winograd,
"Arithmetic complexity of computations", 1980; A. Lavin and S. Gray, arXiv 1509.09308):

    y = A [ (G w Gt) * (D x Dt) ] At

In the graph that is a convolution with stride 4 and D as its kernel, a batch of 36 products over the
channels, a product with A, and putting tiles side by side. ``G w Gt`` stands in the graph too, on the
parameter as the checkpoint has it, and is computed when the graph is loaded. The matrices are those of Toom
and Cook for the points 0, ±1/√2, ±√2 and infinity, whose error is about half of that of 0, ±1, ±2.

This is for runtimes that have no such algorithm of their own, as ONNX Runtime's on CPUs; compilers for GPUs
choose among several. In half precision too many digits are lost. Tiles of 2 x 2, with four ninths of the
multiplications, saved next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from hywu_export.passes.inference import infer

Matrix: TypeAlias = npt.NDArray[np.floating[Any]]

CONSTANTS = "constant/winograd"
TILE = 4
"""The side of a tile's results."""
SIDE = TILE + 2
"""The side of what a tile is computed from."""
POINTS = (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))
"""The finite ones."""
FLOPS_PER_BYTE = 10.0
"""What a CPU core computes while it moves a byte."""
LEAST_GAIN = 2.0
"""Of the estimated cost: what is gained must be worth four times the weight's memory, and loading it."""


@dataclass(frozen=True)
class Span:
    """The sizes of an axis: multiples of ``multiple`` from ``least`` to ``most``."""

    least: int
    most: int
    multiple: int


@dataclass(frozen=True)
class _Convolution:
    """One that may be replaced: ``[rows, inputs, height, width]`` to ``outputs`` channels."""

    node: ir.Node
    inputs: int
    outputs: int


def winograd(
    model: ir.Model,
    usual: Mapping[str, int],
    least: Mapping[str, int],
    most: Mapping[str, int],
    spans: Mapping[str, Span],
) -> int:
    """Replaces 3x3 convolutions of stride 1 where that is estimated to pay on a CPU, in place.

    ``usual`` are the sizes of all axes for which it shall pay, ``least`` and ``most`` those with every root
    axis at the ends of its ``spans``.

    Returns:
        how many were replaced.
    """
    found = [c for node in model.graph if (c := _convolution(node)) is not None]
    if not found:
        return 0
    known = [infer(model, sizes) for sizes in (usual, least, most)]
    replaced = 0
    for convolution in found:
        name = str(convolution.node.inputs[0].name) if convolution.node.inputs[0] is not None else ""
        if any(name not in values for values in known):
            continue
        shapes = [values[name].shape for values in known]
        height, width = (_divisor(shapes[1][i], shapes[2][i], spans) for i in (2, 3))
        if _pays(convolution, shapes[0]):
            _Rewriter(model.graph, convolution).replace(whole=height % TILE == width % TILE == 0)
            replaced += 1
    RemoveUnusedNodesPass()(model)
    return replaced


def is_winograd(model: ir.Model) -> bool:
    """Whether convolutions of the model were replaced."""
    return any(map(is_winograd_constant, model.graph.initializers))


def is_winograd_constant(name: str) -> bool:
    """Whether an initializer of that name is of a replaced convolution."""
    return name.startswith(CONSTANTS)


def matrices() -> tuple[Matrix, Matrix, Matrix]:
    """D ``[6, 6]``, G ``[6, 3]`` and A ``[4, 6]``."""
    a, g, d = (_powers(columns) for columns in (TILE, 3, SIDE))
    return np.linalg.inv(d).T, g, a.T


def _powers(columns: int) -> Matrix:
    """The powers of every finite point; the last row is infinity."""
    finite = np.power.outer(np.array(POINTS), np.arange(columns))
    return np.vstack([finite, np.eye(columns)[-1:]])


def _convolution(node: ir.Node) -> _Convolution | None:
    if node.op_type != "Conv" or node.domain not in ("", "ai.onnx"):
        return None
    weight = node.inputs[1]
    if weight is None or weight.shape is None or not _constant(weight):
        return None
    shape = tuple(weight.shape.numpy()) if weight.shape.is_static() else ()
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = (
        list(shape[2:]) == [3, 3]
        and attributes.get("group", 1) == 1
        and list(attributes.get("strides", [1, 1])) == [1, 1]
        and list(attributes.get("dilations", [1, 1])) == [1, 1]
        and list(attributes.get("pads", [])) == [1, 1, 1, 1]
        and attributes.get("auto_pad", "NOTSET") == "NOTSET"
        and weight.dtype == ir.DataType.FLOAT
    )
    return _Convolution(node, int(shape[1]), int(shape[0])) if plain else None


def _constant(value: ir.Value) -> bool:
    """Whether a value is an initializer, or one in another dtype."""
    node = value.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value.is_initializer() and not value.is_graph_input()


def _divisor(least: int, most: int, spans: Mapping[str, Span]) -> int:
    """What divides a length at all sizes, given that at the least and the most: 1 where that is not known.

    A length grows with an axis as ``ceil(a s)`` or ``floor(a s)``. If it is the same multiple of the size at
    both ends, it is so in between.
    """
    if least == most:
        return least
    for span in spans.values():
        units = span.least // span.multiple, span.most // span.multiple
        if least % units[0] == 0 and least // units[0] * units[1] == most:
            return least // units[0]
    return 1


def _pays(convolution: _Convolution, shape: tuple[int, ...]) -> bool:
    """Whether the products are estimated to cost much less than the convolution, for inputs of ``shape``."""
    inputs, outputs = convolution.inputs, convolution.outputs
    rows, _, height, width = shape
    tiles, weights = rows * math.ceil(height / TILE) * math.ceil(width / TILE), 4 * inputs * outputs
    direct = 18 * rows * inputs * outputs * height * width + FLOPS_PER_BYTE * 9 * weights
    products = 2 * SIDE**2 * tiles * inputs * outputs
    turns = 2 * SIDE**2 * tiles * (SIDE**2 * inputs + TILE**2 * outputs)
    moved = SIDE**2 * (weights + 4 * 4 * tiles * (inputs + outputs))
    return direct >= LEAST_GAIN * (products + turns + FLOPS_PER_BYTE * moved)


class _Rewriter:
    """Puts the nodes in the place of one convolution."""

    def __init__(self, graph: ir.Graph, convolution: _Convolution):
        self.graph, self.convolution = graph, convolution
        self.name = str(convolution.node.outputs[0].name)

    def replace(self, whole: bool) -> None:
        """``whole``: height and width are multiples of a tile's side at all sizes."""
        node, inputs, outputs = self.convolution.node, self.convolution.inputs, self.convolution.outputs
        data, weight, bias = (*node.inputs, None)[:3]
        assert data is not None
        assert weight is not None
        spread, kernels, gather = matrices()
        size = self._add("Shape", [data], "size", start=2)
        planes = self._add("Reshape", [data, self._sizes([-1, 1], size, "plane_sizes")], "planes")
        end = 1 if whole else TILE
        points = self._add(
            "Conv", [planes, self._matrix("spread", _twice(spread).reshape(SIDE**2, 1, SIDE, SIDE))],
            "points", strides=[TILE, TILE], pads=[1, 1, end, end],
        )  # fmt: skip
        tiles = self._add("Shape", [points], "tiles", start=2)
        high, wide = (self._add("Shape", [points], f"tiles{i}", start=i, end=i + 1) for i in (2, 3))
        count = self._add("Mul", [high, wide], "count")
        turned = self._add("Transpose", [points], "turned", perm=[1, 0, 2, 3])
        read_sizes = self._sizes([SIDE**2, -1, inputs], count, "read_sizes")
        read = self._add("Reshape", [turned, read_sizes], "read")
        product = self._add("MatMul", [self._kernels(weight, kernels), read], "product")
        flat = self._add("Reshape", [product, self._integers([SIDE**2, -1])], "flat")
        gathered = self._add("MatMul", [self._matrix("gather", _twice(gather)), flat], "gathered")
        part_sizes = self._sizes([TILE, TILE, -1], tiles, "part_sizes")
        parts = self._add("Reshape", [gathered, part_sizes], "parts")
        made = self._add("Transpose", [parts], "laid", perm=[2, 3, 0, 4, 1])
        if whole:
            made = self._add("Reshape", [made, self._sizes([-1, outputs], size, "made_sizes")], "made")
        else:
            padded = self._add("Mul", [tiles, self._integers([TILE])], "padded")
            grid = self._add("Reshape", [made, self._sizes([-1, outputs], padded, "grid_sizes")], "grid")
            made = self._add("Slice", [grid, self._integers([0, 0]), size, self._integers([2, 3])], "made")
        if bias is not None:
            column = self._add("Unsqueeze", [bias, self._integers([1, 2])], "bias")
            made = self._add("Add", [made, column], "sum")
        old = node.outputs[0]
        made.type, made.shape = old.type, old.shape
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        made.name = self.name

    def _kernels(self, weight: ir.Value, kernels: Matrix) -> ir.Value:
        """The parameter ``[outputs, inputs, 3, 3]`` as ``[36, 1, outputs, inputs]``."""
        shape = [SIDE**2, 1, self.convolution.outputs, self.convolution.inputs]
        taps = self._add("Reshape", [weight, self._integers([-1, 9])], "taps")
        turned = self._add("Transpose", [taps], "tapped", perm=[1, 0])
        made = self._add("MatMul", [self._matrix("kernels", _twice(kernels)), turned], "transformed")
        return self._add("Reshape", [made, self._integers(shape)], "kernel")

    def _add(self, kind: str, inputs: Sequence[ir.Value], name: str, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=f"{self.name}/{name}")
        node.outputs[0].name = f"{self.name}/{name}"
        integers = kind in ("Shape", "Mul", "Concat")
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64 if integers else ir.DataType.FLOAT)
        self.graph.insert_before(self.convolution.node, node)
        return node.outputs[0]

    def _sizes(self, first: Sequence[int], rest: ir.Value, name: str) -> ir.Value:
        return self._add("Concat", [self._integers(first), rest], name, axis=0)

    def _integers(self, numbers: Sequence[int]) -> ir.Value:
        text = "_".join(map(str, numbers))
        return self._constant(f"{CONSTANTS}/{text}", np.array(numbers, np.int64))

    def _matrix(self, name: str, matrix: Matrix) -> ir.Value:
        return self._constant(f"{CONSTANTS}/{name}", matrix.astype(np.float32))

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(name=name, const_value=tensor)
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def _twice(matrix: Matrix) -> Matrix:
    """``M ⊗ M``: the matrix along rows and columns at once."""
    return np.kron(matrix, matrix)
