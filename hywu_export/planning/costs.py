"""FLOPs and bytes of a graph's nodes.

A multiplication and an addition are two operations, as everywhere in the field (and as
``torch.utils.flop_counter`` counts)::

    MatMul, Gemm     2 · elements of the result · K
    Conv             2 · elements of the result · input channels / groups · kernel taps
    ConvTranspose    2 · elements of the input · output channels / groups · kernel taps
    Einsum           2 · product of the sizes of all indices
    Attention        2 · batch · heads · queries · keys · (key width + value width)

All other nodes count nothing but bytes: they are a small share of the arithmetic, and are fused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hywu_export.planning.shapes import ITEM_BITS, Shapes, Tensor
from hywu_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Attention")
LEAST_DIMENSION = 16
"""As `passes.layers`: layers with a smaller reduction or output dimension are not quantized."""

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")
_SAME = (*_VIEWS, "Transpose", "Cast", "Expand", "QuantizeLinear", "DequantizeLinear")
"""What hands its first input on: with another shape, layout or dtype, but no new number."""
_IN_ATTENTION = (*_SAME, "Add", "Sub", "Mul", "Div", "Where", "Clip", "Softmax")
_FLOATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Node:
    """What one node computes and moves.

    Attributes:
        flops: in `precision`; 0 for what is no product.
        precision: ``float32``, ``float16``, ``bfloat16`` or ``int8``: what the operands are.
        reads, writes: bytes, if whatever stands around the products is fused into them: a product reads its
            operands in the smallest form in which they exist, and attention scores stay on the chip.
            0 for what is no product.
        alone: bytes, if nothing is fused: all inputs and outputs as they are. 0 for views, and for
            what a compiler computes beforehand.
        weights: those of `reads` that are a stored weight.
        group: nodes of one group run as one: the products of an attention.
        rows: vectors that a product makes: tokens or positions of all samples.
    """

    name: str
    op: str
    flops: int
    precision: str
    reads: int
    writes: int
    alone: int
    weights: int = 0
    group: str = ""
    rows: int = 0

    @property
    def bytes(self) -> int:
        return self.reads + self.writes


@dataclass(frozen=True)
class Limits:
    """Of a device: ``peak`` in operations a second by precision, ``bandwidth`` in bytes a second."""

    peak: Mapping[str, float]
    bandwidth: float

    def compute(self, flops: float, precision: str) -> float:
        """Seconds. Raises UnsupportedError if the device does not have the precision."""
        if not flops:
            return 0.0
        if precision not in self.peak:
            raise UnsupportedError(
                f"No peak is known of this device for {precision}",
                f"Expected one of {', '.join(self.peak)}",
                "Choose another device or variant",
            )
        return flops / self.peak[precision]


@dataclass(frozen=True)
class Time:
    """Least times of some nodes, in seconds.

    ``seconds``: the roofline, the sum over groups of nodes of max(compute, memory). ``compute``, ``memory``:
    of all nodes, if the other cost nothing; ``compute_bound``: the part of `seconds` in groups that
    arithmetic binds. ``unfused``: the roofline if every node read and wrote memory on its own.
    """

    seconds: float
    compute: float
    memory: float
    compute_bound: float
    unfused: float


def time_of(nodes: Collection[Node], limits: Limits) -> Time:
    """The roofline of Williams, Waterman and Patterson (CACM 52, 2009), node by node."""
    groups: dict[str, tuple[float, float]] = {}
    unfused = 0.0
    for node in nodes:
        compute = limits.compute(node.flops, node.precision)
        unfused += max(compute, node.alone / limits.bandwidth)
        if node.flops:
            key = node.group or node.name
            before = groups.get(key, (0.0, 0.0))
            groups[key] = (before[0] + compute, before[1] + node.bytes / limits.bandwidth)
    return Time(
        sum(max(pair) for pair in groups.values()),
        sum(compute for compute, _ in groups.values()),
        sum(memory for _, memory in groups.values()),
        sum(compute for compute, memory in groups.values() if compute >= memory),
        unfused,
    )


def costs(model: onnx.ModelProto, shapes: Shapes, where: str = "the graph") -> list[Node]:
    """The cost of every node, in the order of the graph.

    Raises:
        UnsupportedError: a product whose operations cannot be counted.
    """
    return _Costs(model, shapes, where).all()


def scores_of(model: onnx.ModelProto, shapes: Shapes) -> frozenset[str]:
    """The tensors that a fused attention never writes: scores and their softmax."""
    return frozenset(_Costs(model, shapes, "").scores)


def as_if(nodes: Collection[Node], model: onnx.ModelProto, shapes: Shapes, precision: str) -> list[Node]:
    """What the nodes of an FP32 graph would cost in a variant that has not been made.

    ``fp16`` and ``bf16``: all of it. ``int8``: FP16, but for products with a weight, which read INT8, unless
    they are small. ``int8-weights``: FP16 with these weights stored as INT8. What a calibration leaves
    wide for the sake of the picture is not known beforehand.
    """
    half = "bfloat16" if precision == "bf16" else "float16"
    by_name = {node.name or node.output[0]: node for node in model.graph.node}
    changed = []
    for node in nodes:
        if node.precision != "float32":
            changed.append(node)
            continue
        eight = precision.startswith("int8") and node.weights and _quantizable(by_name[node.name], shapes)
        weights, activations = node.weights, node.reads - node.weights
        if weights:  # a stored weight may be narrow already
            weights = min(weights, shapes.tensors[by_name[node.name].input[1]].elements * (1 if eight else 2))
        integers = eight and precision == "int8"
        activations //= 4 if integers else 2
        saved = node.reads - weights - activations + node.writes // 2
        changed.append(
            replace(
                node, precision="int8" if integers else half, reads=weights + activations,
                writes=node.writes - node.writes // 2, weights=weights,
                alone=max(node.alone - saved, 0) if node.flops else node.alone // 2,
            )
        )  # fmt: skip
    return changed


def _quantizable(node: onnx.NodeProto, shapes: Shapes) -> bool:
    weight = shapes.tensors[node.input[1]].shape
    if node.op_type == "Conv":
        return min(math.prod(weight[1:]), weight[0]) >= LEAST_DIMENSION
    return node.op_type in ("MatMul", "Gemm") and len(weight) == 2 and min(weight) >= LEAST_DIMENSION


class _Costs:
    def __init__(self, model: onnx.ModelProto, shapes: Shapes, where: str):
        self.graph, self.shapes, self.where = model.graph, shapes, where
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.initializers = {tensor.name for tensor in self.graph.initializer}
        self.results = {value.name for value in self.graph.output}
        self.scores: set[str] = set()  # tensors that stay inside an attention
        self.groups: dict[str, str] = {}  # output of a product → its attention
        for node in self.graph.node:
            if node.op_type == "Softmax":
                self._attention(node)

    def all(self) -> list[Node]:
        return [self._node(node) for node in self.graph.node]

    def _node(self, node: onnx.NodeProto) -> Node:
        name = node.name or node.output[0]
        tensors = self.shapes.tensors
        constant = all(output in self.shapes.constant for output in node.output if output)
        alone = 0
        if not constant and node.op_type not in _VIEWS:
            alone = sum(tensors[n].bytes for n in (*node.input, *node.output) if n)
        if node.op_type not in PRODUCTS or constant:
            return Node(name, node.op_type, 0, tensors[node.output[0]].dtype, 0, 0, alone)
        reads = weights = 0
        for operand in dict.fromkeys(n for n in node.input if n):
            if operand in self.scores:
                continue
            size, stored = self._least(operand)
            reads += size
            weights += size if stored and operand == node.input[1] else 0
        writes = sum(tensors[n].bytes for n in node.output if n and n not in self.scores)
        result = tensors[node.output[0]]
        return Node(
            name, node.op_type, self._flops(node), self._precision(node), reads, writes, alone, weights,
            self.groups.get(node.output[0], ""), _rows(node, result),
        )  # fmt: skip

    def _least(self, name: str) -> tuple[int, bool]:
        """The bytes of the smallest form of a tensor, and whether it is a weight."""
        least = self.shapes.tensors[name].bytes
        while name in self.makers and self.makers[name].op_type in _SAME:
            name = self.makers[name].input[0]
            least = min(least, self.shapes.tensors[name].bytes)
        return least, name in self.initializers

    def _precision(self, node: onnx.NodeProto) -> str:
        operands = [self._stored(name) for name in node.input[:2] if name]
        if all(dtype in ("int8", "uint8") for dtype in operands):
            return "int8"
        dtype = self.shapes.tensors[node.input[0]].dtype
        if dtype not in _FLOATS:
            raise self._refuse(node, f"computes in {dtype}")
        return dtype

    def _stored(self, name: str) -> str:
        """The dtype of a product's operand, seen through what dequantizes it."""
        while name in self.makers:
            node = self.makers[name]
            if node.op_type == "DequantizeLinear":
                return self.shapes.tensors[node.input[0]].dtype
            if node.op_type not in _VIEWS and node.op_type != "Transpose":
                break
            name = node.input[0]
        return self.shapes.tensors[name].dtype

    def _flops(self, node: onnx.NodeProto) -> int:
        tensors = self.shapes.tensors
        result = tensors[node.output[0]]
        shapes = [tensors[name].shape for name in node.input if name]
        if node.op_type == "MatMul":
            return 2 * result.elements * shapes[0][-1]
        if node.op_type == "Gemm":
            return 2 * result.elements * shapes[0][0 if _attribute(node, "transA", 0) else 1]
        if node.op_type == "Conv":
            return 2 * result.elements * math.prod(shapes[1][1:])
        if node.op_type == "ConvTranspose":
            return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])
        if node.op_type == "Einsum":
            return self._einsum(node, shapes)
        if len(shapes[0]) != 4:
            raise self._refuse(node, "has packed heads")
        batch, heads, queries, width = shapes[0]
        keys, value_width = shapes[2][-2:]
        return 2 * batch * heads * queries * keys * (width + value_width)

    def _einsum(self, node: onnx.NodeProto, shapes: list[tuple[int, ...]]) -> int:
        terms = _attribute(node, "equation", b"").decode().replace(" ", "").partition("->")[0].split(",")
        if len(terms) > 2 or "." in "".join(terms):
            raise self._refuse(node, f"has the equation {','.join(terms)}")
        sizes = {index: size for term, shape in zip(terms, shapes) for index, size in zip(term, shape)}
        return (2 if len(terms) == 2 else 0) * math.prod(sizes.values())

    def _refuse(self, node: onnx.NodeProto, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"The operations of {node.op_type} {node.name or node.output[0]!r} of {self.where} cannot be "
            f"counted: it {why}",
            "Expected products of floating-point or INT8 tensors",
            "Export the bundle with this version of hywu-export",
        )

    def _attention(self, softmax: onnx.NodeProto) -> None:
        """Marks what a fused attention never writes: from the product before a softmax to the one after."""
        above = self._above(softmax.input[0])
        below = self._below(softmax.output[0])
        if above is None or below is None:
            return
        product, before = above
        after, behind = below
        if after.input[0] not in behind:
            return
        self.scores |= before | behind
        self.groups[product.output[0]] = self.groups[after.output[0]] = softmax.name or softmax.output[0]

    def _above(self, name: str) -> tuple[onnx.NodeProto, set[str]] | None:
        """The product whose result becomes ``name``, and the tensors on the way."""
        size, passed = self.shapes.tensors[name].elements, {name}
        while name in self.makers:
            node = self.makers[name]
            if node.op_type == "MatMul":
                return node, passed
            if node.op_type not in _IN_ATTENTION:
                return None
            same = [n for n in node.input if n in self.makers and self.shapes.tensors[n].elements == size]
            leads = [n for n in same if n not in self.shapes.constant and len(self.readers[n]) == 1]
            if not leads:
                return None
            name = leads[0]
            passed.add(name)
        return None

    def _below(self, name: str) -> tuple[onnx.NodeProto, set[str]] | None:
        passed = {name}
        while len(self.readers.get(name, ())) == 1 and name not in self.results:
            node = self.readers[name][0]
            if node.op_type == "MatMul":
                return node, passed
            if node.op_type not in _IN_ATTENTION:
                return None
            name = node.output[0]
            passed.add(name)
        return None


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return attribute.s if isinstance(default, bytes) else attribute.i
    return default


def _rows(node: onnx.NodeProto, result: Tensor) -> int:
    axis = 1 if node.op_type in ("Conv", "ConvTranspose") else -1
    return result.elements // result.shape[axis] if len(result.shape) > 1 and result.elements else 1


def working_set(
    model: onnx.ModelProto, shapes: Shapes, half: bool = False, without: frozenset[str] = frozenset()
) -> tuple[int, str]:
    """The most bytes of intermediate tensors that live at once, and the node at which they do.

    In the order of the graph; views share their memory, elementwise nodes write over an input that nobody
    reads after them; weights, inputs and outputs of the graph are not counted.

    Args:
        half: float32 counts as two bytes, as in a variant that is not made yet.
        without: tensors that are never in memory, see `scores_of`.
    """
    graph = model.graph
    outside = {t.name for t in graph.initializer} | {v.name for v in (*graph.input, *graph.output)}
    last: dict[str, int] = {}
    for i, node in enumerate(graph.node):
        for name in node.input:
            last[name] = i
    owner: dict[str, str] = {}  # view → tensor that holds its memory
    users: dict[str, int] = {}
    sizes: dict[str, int] = {}
    live = most = 0
    at = ""
    for i, node in enumerate(graph.node):
        made = [n for n in node.output if n and n not in shapes.constant]
        dying = {owner.get(n, n) for n in node.input} & sizes.keys()
        for name in made:
            tensor = shapes.tensors[name]
            source = owner.get(node.input[0], node.input[0]) if node.input else ""
            if node.op_type in _VIEWS and (source in sizes or source in outside):
                if source in sizes:
                    owner[name] = source
                    users[source] = max(users[source], last.get(name, i))
                continue
            if name in outside or name in without:
                continue
            size = _held(tensor, half)
            free = (n for n in dying if users[n] <= i and sizes[n] == size)
            over = next(free, None) if node.op_type in _ELEMENTWISE else None
            if over is not None:
                owner[name], users[over] = over, last.get(name, i)
                dying.discard(over)
                continue
            sizes[name], users[name] = size, last.get(name, i)
            live += size
        if live > most:
            most, at = live, node.name or node.output[0]
        for name in [n for n in sizes if users[n] <= i]:
            live -= sizes.pop(name)
    return most, at


_ELEMENTWISE = (
    "Abs", "Add", "Cast", "Clip", "Div", "Erf", "Exp", "Gelu", "InstanceNormalization", "LayerNormalization",
    "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softmax", "Sqrt", "Sub", "Tanh", "Where",
)  # fmt: skip


def _held(tensor: Tensor, half: bool) -> int:
    bits = 16 if half and tensor.dtype == "float32" else ITEM_BITS.get(tensor.dtype, 64)
    return math.ceil(tensor.elements * bits / 8)
