"""3x3 convolutions as Winograd products: a quarter of the multiplications.

A tile of 4 x 4 results is computed from 6 x 6 inputs with one multiplication for each of these (S. Winograd,
"Arithmetic complexity of computations", 1980; A. Lavin and S. Gray, arXiv 1509.09308):

    y = A [ (G w Gt) * (D x Dt) ] At

In the graph that is a convolution with stride 4 and D as its kernel, a batch of 36 products over the
channels, a product with A, and putting tiles side by side. ``G w Gt`` takes the parameter's place, with four
times its numbers. The matrices are those of Toom and Cook for the points 0, ±1/√2, ±√2 and infinity, whose
error is about half of that of 0, ±1, ±2.

This is for runtimes that have no such algorithm of their own, as ONNX Runtime's on CPUs; compilers for GPUs
choose among several. In half precision too many digits are lost. Tiles of 2 x 2, with four ninths of the
multiplications, saved next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from hywu_export.passes.inference import infer
from hywu_export.passes.layers import Layer, find_layers
from hywu_export.tracing.spec import all_sizes

if TYPE_CHECKING:
    from hywu_export.tracing.spec import Axis

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
"""Of the estimated cost: what is gained must be worth four times the weight's memory."""


def winograd(model: ir.Model, axes: Mapping[str, Axis], usual: Mapping[str, int]) -> dict[str, str]:
    """Replaces 3x3 convolutions of stride 1 where that is estimated to pay on a CPU, in place.

    Args:
        axes: of the graph, all.
        usual: sizes of the root axes, for which it shall pay.
    Returns:
        the initializers that took the place of parameters, each with its parameter: what `transform` makes
        of it, or without a value where the parameter has none.
    """
    found = [layer for layer in find_layers(model) if _fits(layer)]
    if not found:
        return {}
    roots = {name: axis for name, axis in axes.items() if axis.is_root}
    units = {
        name: (ceil(axis.min / axis.multiple), axis.max // axis.multiple) for name, axis in roots.items()
    }
    least = {name: units[name][0] * axis.multiple for name, axis in roots.items()}
    growing = [name for name, (low, high) in units.items() if low < high]
    probes = [usual, least, *(least | {n: units[n][1] * roots[n].multiple} for n in growing)]
    known = [infer(model, all_sizes(sizes, axes, one=True)) for sizes in probes]
    replaced = {}
    for layer in found:
        shapes = [values[str(layer.data.name)].shape for values in known if layer.data.name in values]
        if len(shapes) < len(known) or not _pays(layer, shapes[0]):
            continue
        lengths = [dict(zip(growing, (shape[i] for shape in shapes[2:]))) for i in (2, 3)]
        divisors = [_divisor(shapes[1][2 + i], lengths[i], units) for i in range(2)]
        rewriter = _Rewriter(model.graph, layer)
        made = rewriter.replace(whole=all(divisor % TILE == 0 for divisor in divisors))
        replaced[made] = str(layer.weight.name)
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


def transform(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``G w Gt`` of a parameter ``[outputs, inputs, 3, 3]``: ``[36, 1, outputs, inputs]``."""
    outputs, inputs = weight.shape[:2]
    kernels = _twice(matrices()[1]).astype(np.float32)
    return (kernels @ weight.reshape(-1, 9).T).reshape(SIDE**2, 1, outputs, inputs)


def _powers(columns: int) -> Matrix:
    """The powers of every finite point; the last row is infinity."""
    finite = np.power.outer(np.array(POINTS), np.arange(columns))
    return np.vstack([finite, np.eye(columns)[-1:]])


def _fits(layer: Layer) -> bool:
    """Whether a layer is a convolution of the kind that is replaced."""
    attributes = {name: attribute.value for name, attribute in layer.node.attributes.items()}
    operand = layer.node.inputs[1]
    return (
        layer.op == "Conv"
        and layer.weight.shape is not None
        and list(layer.weight.shape.numpy()[2:]) == [3, 3]
        and operand is layer.weight
        and operand.dtype == ir.DataType.FLOAT
        and attributes.get("group", 1) == 1
        and list(attributes.get("strides", [1, 1])) == [1, 1]
        and list(attributes.get("dilations", [1, 1])) == [1, 1]
        and list(attributes.get("pads", [])) == [1, 1, 1, 1]
        and attributes.get("auto_pad", "NOTSET") == "NOTSET"
    )


def _divisor(least: int, grown: Mapping[str, int], units: Mapping[str, tuple[int, int]]) -> int:
    """What divides a length at all sizes: 1 where that is not known.

    ``least`` is the length with all axes at their least sizes, ``grown`` with one of them at its largest.
    ``units`` are these sizes in multiples. A length grows with an axis as ``ceil(a s)`` or ``floor(a s)``: if
    it is the same multiple of the size at both ends, it is so in between.
    """
    moving = [name for name, length in grown.items() if length != least]
    if not moving:
        return least
    low, high = units[moving[0]]
    linear = len(moving) == 1 and least % low == 0 and least // low * high == grown[moving[0]]
    return least // low if linear else 1


def _pays(layer: Layer, shape: tuple[int, ...]) -> bool:
    """Whether the products are estimated to cost much less than the convolution, for inputs of ``shape``."""
    rows, inputs, height, width = shape
    outputs = layer.outputs
    tiles, weights = rows * ceil(height / TILE) * ceil(width / TILE), 4 * inputs * outputs
    direct = 18 * rows * inputs * outputs * height * width + FLOPS_PER_BYTE * 9 * weights
    products = 2 * SIDE**2 * tiles * inputs * outputs
    turns = 2 * SIDE**2 * tiles * (SIDE**2 * inputs + TILE**2 * outputs)
    moved = SIDE**2 * (weights + 4 * 4 * tiles * (inputs + outputs))
    return direct >= LEAST_GAIN * (products + turns + FLOPS_PER_BYTE * moved)


class _Rewriter:
    """Puts the nodes in the place of one convolution."""

    def __init__(self, graph: ir.Graph, layer: Layer):
        self.graph, self.node = graph, layer.node
        self.inputs, self.outputs = layer.reduction // 9, layer.outputs
        self.name = str(layer.node.outputs[0].name)

    def replace(self, whole: bool) -> str:
        """``whole``: height and width are multiples of a tile's side at all sizes. Returns the name of the
        transformed parameter."""
        data, weight, bias = (*self.node.inputs, None)[:3]
        assert data is not None
        assert weight is not None
        spread, _, gather = matrices()
        kernel = self._kernel(weight)
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
        read_sizes = self._sizes([SIDE**2, -1, self.inputs], count, "read_sizes")
        read = self._add("Reshape", [turned, read_sizes], "read")
        product = self._add("MatMul", [kernel, read], "product")
        flat = self._add("Reshape", [product, self._integers([SIDE**2, -1])], "flat")
        gathered = self._add("MatMul", [self._matrix("gather", _twice(gather)), flat], "gathered")
        part_sizes = self._sizes([TILE, TILE, -1], tiles, "part_sizes")
        parts = self._add("Reshape", [gathered, part_sizes], "parts")
        made = self._add("Transpose", [parts], "laid", perm=[2, 3, 0, 4, 1])
        if whole:
            made = self._add("Reshape", [made, self._sizes([-1, self.outputs], size, "made_sizes")], "made")
        else:
            padded = self._add("Mul", [tiles, self._integers([TILE])], "padded")
            grid = self._add("Reshape", [made, self._sizes([-1, self.outputs], padded, "grid_sizes")], "grid")
            made = self._add("Slice", [grid, self._integers([0, 0]), size, self._integers([2, 3])], "made")
        if bias is not None:
            column = self._add("Unsqueeze", [bias, self._integers([1, 2])], "bias")
            made = self._add("Add", [made, column], "sum")
        old = self.node.outputs[0]
        made.type, made.shape = old.type, old.shape
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        made.name = self.name
        return str(kernel.name)

    def _kernel(self, weight: ir.Value) -> ir.Value:
        """The transformed parameter, which all convolutions with it share."""
        name = f"{weight.name}/winograd"
        if name not in self.graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
            value.shape = ir.Shape([SIDE**2, 1, self.outputs, self.inputs])
            if weight.const_value is not None:
                value.const_value = ir.tensor(transform(weight.const_value.numpy()), name=name)
            self.graph.initializers.add(value)
        return self.graph.initializers[name]

    def _add(self, kind: str, inputs: Sequence[ir.Value], name: str, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=f"{self.name}/{name}")
        node.outputs[0].name = f"{self.name}/{name}"
        integers = kind in ("Shape", "Mul", "Concat")
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64 if integers else ir.DataType.FLOAT)
        self.graph.insert_before(self.node, node)
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
