"""One graph as several that run one after another, each with some of the layers: stages of a pipeline.

A cut lies between two layers. A *layer* is what is numbered in the module path of nodes and weights
(``blocks.7``), and finer where that would spoil the balance; what has no number is a layer by its module.
Among cuts that balance the weights, those are chosen that the fewest bytes cross.

What crosses is an output of one stage and an input of each that reads it. What follows from the graph's
inputs without weights and products (sizes, masks, position tables) does not cross: each stage computes it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from hywu_export.passes.half import MOVEMENTS, PRODUCTS
from hywu_export.passes.naming import order_initializers
from hywu_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from hywu_export.tracing.spec import TensorSpec

SLACK = 1.1
"""So many times the weights of the largest in the most even cut may a stage have, where less crosses then."""
UNEVEN = 1.25
"""Layers are not made finer while the largest stage has at most this many times its fair share."""
LARGEST_AGAIN = 256
"""Nodes that a stage computes again, at most, instead of reading their result."""
DEEPEST = 3
"""Numbers of a module path that make a layer, at most."""

_CHEAP = MOVEMENTS | {
    "Add", "And", "Cast", "ConstantOfShape", "Div", "Equal", "Floor", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Min", "Mul", "Neg", "Not", "Or", "Range", "Shape", "Sub",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One of the graphs: its model, and what it reads of and gives to the others."""

    model: ir.Model
    weights: frozenset[str]
    reads: tuple[TensorSpec, ...]
    gives: tuple[TensorSpec, ...]


def cut(
    model: ir.Model,
    stages: int,
    weights: Collection[str],
    values: Mapping[str, TensorSpec],
    sizes: Mapping[str, int],
    name: str = "graph",
    placed: Mapping[str, int] | None = None,
) -> list[Stage]:
    """Cuts a model into ``stages`` models, and leaves it as it is.

    The stages have the model's initializers, and inputs and outputs under their names; each has those that
    its nodes read and make. Run in order, they compute what the model does, with the same nodes.

    Args:
        weights: the initializers that count. None is in two stages, unless the model reads it in two layers.
        values: what may cross: name → dtype and shape of values between nodes.
        sizes: a usual size of every axis in these shapes, to compare what crosses.
        placed: weight → stage, where another graph with the same weights was cut: as many as can be stay.
    Raises:
        UnsupportedError: there are fewer layers with weights than stages, or what lies between the layers
            cannot cross.
    """
    nodes = list(model.graph)
    order = _Order(model.graph, nodes, set(weights), values)
    places = _places(order, stages, sizes, name, placed or {})
    spans = list(zip([0, *places], [*places, len(nodes)]))
    reads = [order.reads(*span) for span in spans]
    read = {value for values in reads for value in values}
    return [order.stage(model, *span, reads=values, read=read) for span, values in zip(spans, reads)]


class _Order:
    """A graph's nodes in order, and what can be asked about cutting between two of them."""

    def __init__(
        self, graph: ir.Graph, nodes: list[ir.Node], weights: set[str], values: Mapping[str, TensorSpec]
    ):
        self.graph, self.nodes, self.weights, self._values = graph, nodes, weights, values
        self._index = {node: i for i, node in enumerate(nodes)}
        self._leaves: dict[ir.Value, frozenset[ir.Value] | None] = {}
        self._again: dict[ir.Node, frozenset[ir.Node] | None] = {}
        self._fixed: dict[ir.Node, bool] = {}
        self._alive = _Alive(nodes, self._index)
        self.bytes = np.zeros(len(nodes), np.int64)  # of the weights that a node is the first to read
        self.first: dict[str, int] = {}  # weight → the node that reads it first
        for i, node in enumerate(nodes):
            for value in node.inputs:
                if value is not None and value.name in weights and self.first.setdefault(value.name, i) == i:
                    self.bytes[i] += _bytes(value)

    def layers(self, stages: int, deepest: int) -> list[str]:
        """The layer of every node, by up to ``deepest`` numbers of its path where a layer is large."""
        paths, last = [], ""
        for node in self.nodes:
            read = next((v.name for v in node.inputs if v is not None and v.name in self.weights), None)
            path = read.rpartition(".")[0] if read else (node.name or "").rpartition("/")[0]
            last = path or last  # what belongs to no module belongs to what is before it
            paths.append(last)
        most = self.bytes.sum() / (2 * stages)
        depths: dict[str, int] = defaultdict(lambda: 1)
        labels: list[str] = []
        for depth in range(1, deepest + 1):
            labels = [_layer(path, depths[path]) for path in paths]
            sums: dict[str, int] = defaultdict(int)
            for label, size in zip(labels, self.bytes):
                sums[label] += int(size)
            for path, label in zip(paths, labels):
                if sums[label] > most:
                    depths[path] = depth + 1
        return labels

    def crossing(self, at: int) -> frozenset[ir.Value] | None:
        """What crosses a cut before node number ``at``; None if something that must cannot."""
        found: set[ir.Value] = set()
        for value in self._alive[at]:
            leaves = self.leaves(value)
            if leaves is None:
                return None
            found |= leaves
        return frozenset(found)

    def leaves(self, value: ir.Value) -> frozenset[ir.Value] | None:
        """What must cross for a later stage to have ``value``; None if that cannot be."""
        if value not in self._leaves:
            self._leaves[value] = None  # against endless descent; an acyclic graph never sees it
            self._leaves[value] = self._find_leaves(value)
        return self._leaves[value]

    def _find_leaves(self, value: ir.Value) -> frozenset[ir.Value] | None:
        node = value.producer()
        if node is None or self._computed_again(node) is not None:
            return frozenset()
        spec = self._values.get(value.name or "")
        if spec is not None and spec.dtype.startswith("float"):
            return frozenset([value])
        # Sizes and masks: TensorRT has sizes in host memory, and there are no boolean tensors between graphs.
        if node.op_type in _CHEAP:
            parts = [self.leaves(v) for v in node.inputs if v is not None]
            if None not in parts:
                return frozenset().union(*(part for part in parts if part is not None))
        return None if spec is None else frozenset([value])

    def _computed_again(self, node: ir.Node) -> frozenset[ir.Node] | None:
        """The nodes to compute again for this one's result, from inputs alone; None if it shall not be."""
        todo = [node]
        while todo:  # not recursive: constant chains may be long
            top = todo[-1]
            if top in self._again:
                todo.pop()
                continue
            above = [v.producer() for v in top.inputs if v is not None]
            open_ = [n for n in above if n is not None and n not in self._again]
            if open_:
                todo += open_
                continue
            todo.pop()
            self._again[top] = self._closure(top, [n for n in above if n is not None])
        return self._again[node]

    def _closure(self, node: ir.Node, above: Sequence[ir.Node]) -> frozenset[ir.Node] | None:
        reads_weight = any(v is not None and v.name in self.weights for v in node.inputs)
        reads_input = any(v is not None and v.is_graph_input() for v in node.inputs)
        if reads_input or any(not self._fixed.get(n, False) for n in above):
            self._fixed[node] = False
            if reads_weight or any(self._has_weight(n) for n in above):
                return None
        else:
            self._fixed[node] = True  # what follows from weights alone, such as a transposed one
        if node.op_type in PRODUCTS:
            return None
        closure: set[ir.Node] = {node}
        for producer in above:
            nodes = self._again[producer]
            if nodes is None:
                return None
            closure |= nodes
        return frozenset(closure) if len(closure) <= LARGEST_AGAIN else None

    def _has_weight(self, node: ir.Node) -> bool:
        nodes = self._again.get(node) or ()
        return any(v is not None and v.name in self.weights for n in nodes for v in n.inputs)

    def reads(self, begin: int, end: int) -> list[ir.Value]:
        """What nodes ``begin`` up to, not including, ``end`` need of the nodes before them."""
        found: set[ir.Value] = set()
        for value in (value for node in self.nodes[begin:end] for value in node.inputs):
            if value is not None and 0 <= self._position(value) < begin:
                found |= self.leaves(value) or frozenset()
        return sorted(found, key=self._key)

    def stage(
        self, model: ir.Model, begin: int, end: int, reads: Collection[ir.Value], read: Collection[ir.Value]
    ) -> Stage:
        """These nodes as a model, with what they need, and with what of theirs some stage reads."""
        results = [v for v in self.graph.outputs if begin <= self._position(v) < end]
        inside = [v for v in read if begin <= self._position(v) < end and not v.is_graph_output()]
        crossing = sorted(inside, key=self._key)
        graph = ir.convenience.extract(self.graph, [*self.graph.inputs, *reads], [*results, *crossing])
        for value in list(graph.inputs):
            if not value.uses() and not value.is_graph_output():
                graph.inputs.remove(value)
        declared = {value.name: self.spec(value) for value in (*reads, *crossing)}
        for value in (*graph.inputs, *graph.outputs):
            if value.name in declared:
                _declare(value, declared[value.name])
        order_initializers(graph)
        graph.name = self.graph.name
        made = ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
        used = frozenset(name for name in graph.initializers if name in self.weights)
        return Stage(made, used, tuple(map(self.spec, reads)), tuple(map(self.spec, crossing)))

    def _position(self, value: ir.Value) -> int:
        producer = value.producer()
        return -1 if producer is None else self._index[producer]

    def _key(self, value: ir.Value) -> tuple[int, int]:
        return self._position(value), value.index() or 0

    def spec(self, value: ir.Value) -> TensorSpec:
        """Dtype and shape of a value that crosses."""
        return self._values[value.name or ""]


class _Alive:
    """Values that are made before a node and read at it or after it, by the node's number."""

    def __init__(self, nodes: Sequence[ir.Node], index: Mapping[ir.Node, int]):
        self._spans: list[tuple[int, int, ir.Value]] = []
        for i, node in enumerate(nodes):
            for value in node.outputs:
                last = max((index[use.node] for use in value.uses()), default=i)
                if last > i:
                    self._spans.append((i, last, value))
        self._starts = [start for start, _, _ in self._spans]

    def __getitem__(self, at: int) -> list[ir.Value]:
        before = self._spans[: bisect_right(self._starts, at - 1)]
        return [value for _, last, value in before if last >= at]


def _places(
    order: _Order, stages: int, sizes: Mapping[str, int], name: str, placed: Mapping[str, int]
) -> list[int]:
    """The nodes before which to cut."""
    total = np.concatenate([[0], np.cumsum(order.bytes)])
    layers: set[str] = set()
    costs: dict[int, float] = {}
    even = math.inf
    for deepest in range(1, DEEPEST + 1):
        labels = order.layers(stages, deepest)
        layers |= {label for label, size in zip(labels, order.bytes) if size}
        found = _costs(order, labels, sizes)
        largest = _even(sorted(found), total, stages)
        if largest < even:
            costs, even = found, largest
        if even <= UNEVEN * total[-1] / stages:
            break
    if len(layers) < stages:
        raise UnsupportedError(
            f"Graph {name!r} cannot be cut into {stages} stages: it has {len(layers)} layers with weights",
            "Every stage has at least one layer",
            f"Use --stages {len(layers)} or less" if len(layers) > 1 else "Export without --stages",
        )
    if even == math.inf:
        raise UnsupportedError(
            f"Graph {name!r} cannot be cut into {stages} stages: what lies between its layers cannot cross",
            "Tensors between graphs are integers, float16 or float32, of sizes that follow from the axes",
            "Use fewer --stages, or write the module with such tensors between its layers",
        )
    shared = sum(int(order.bytes[at]) for name, at in order.first.items() if name in placed)
    # A graph that is mostly another's is cut where that one was, even or not.
    limit = math.inf if shared > total[-1] / 2 else SLACK * even
    places = _best(sorted(costs), costs, total, _strayed(order, stages, placed), stages, limit)
    assert places is not None  # the even cut is one
    return places[1:-1]


def _costs(order: _Order, labels: Sequence[str], sizes: Mapping[str, int]) -> dict[int, float]:
    """Where the graph can be cut, between two layers, and the bytes that cross there; both ends too."""
    costs = {0: 0.0, len(labels): 0.0}
    for at in range(1, len(labels)):
        if labels[at] != labels[at - 1]:
            crossing = order.crossing(at)
            if crossing is not None:
                costs[at] = sum(_spec_bytes(order.spec(value), sizes) for value in crossing)
    return costs


def _strayed(order: _Order, stages: int, placed: Mapping[str, int]) -> np.ndarray:
    """``[stages, nodes + 1]``: bytes of weights before a node that another graph has in another stage."""
    bytes_ = np.zeros((stages, len(order.nodes) + 1), np.int64)
    for name, at in order.first.items():
        if name in placed:
            size = _bytes(order.graph.initializers[name])
            for stage in range(stages):
                bytes_[stage, at + 1] += 0 if stage == placed[name] else size
    return bytes_.cumsum(axis=1)


def _even(places: Sequence[int], total: np.ndarray, stages: int) -> float:
    """Bytes of the largest stage in the most even cut."""
    at = np.asarray(places)
    largest = np.where(at == 0, 0.0, np.inf)
    for _ in range(stages):
        sizes = total[at][None, :] - total[at][:, None]  # from, to
        sizes = np.where((at[None, :] > at[:, None]) & (sizes > 0), sizes, np.inf)
        largest = np.maximum(largest[:, None], sizes).min(axis=0)
    return float(largest[-1])


def _best(
    places: Sequence[int],
    costs: Mapping[int, float],
    total: np.ndarray,
    strayed: np.ndarray,
    stages: int,
    limit: float,
) -> list[int] | None:
    """The cut with the least strayed weights, then with the least that crosses, then the most even one.

    No stage is without weights, or has more than ``limit``. None if there is none.
    """
    Cost = tuple[int, float, float]
    best: dict[int, tuple[Cost, list[int]]] = {0: ((0, 0.0, 0.0), [0])}
    for stage in range(stages):
        reached: dict[int, tuple[Cost, list[int]]] = {}
        for to in places:
            for since, ((stray, crossing, squares), path) in best.items():
                size = float(total[to] - total[since])
                if to <= since or not 0 < size <= limit or (stage == stages - 1) != (to == places[-1]):
                    continue
                moved = int(strayed[stage, to] - strayed[stage, since])
                cost = (stray + moved, crossing + costs[to], squares + size * size)
                if to not in reached or cost < reached[to][0]:
                    reached[to] = (cost, [*path, to])
        best = reached
    found = best.get(places[-1])
    return None if found is None else found[1]


def _layer(path: str, depth: int) -> str:
    """A module path up to its number ``depth``; without a number, up to its second part."""
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbered and depth == 1:
        return ".".join(parts[:2])
    return path if len(numbered) < depth else ".".join(parts[: numbered[depth - 1] + 1])


def _bytes(value: ir.Value) -> int:
    assert value.shape is not None
    assert value.dtype is not None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)


def _spec_bytes(spec: TensorSpec, sizes: Mapping[str, int]) -> float:
    size = math.prod(d if isinstance(d, int) else sizes.get(d, 1) for d in spec.shape)
    return float(size * np.dtype(spec.dtype).itemsize)


def _declare(value: ir.Value, spec: TensorSpec) -> None:
    value.shape = ir.Shape(list(spec.shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype)))
