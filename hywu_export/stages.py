"""``--stages``: which graphs of a bundle are cut, and the calls of their parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hywu_export.tracing.spec import Axis, TensorSpec
from hywu_runtime.manifest import Call

if TYPE_CHECKING:
    from hywu_export.tracing.tracer import TracedGraph

USUAL_SIZE = 1024
"""Of an axis, where what crosses one cut is compared with what crosses another: pixels, tokens."""


def graphs_to_cut(graphs: Sequence[TracedGraph], stages: int) -> set[str]:
    """Those with more than a quarter of what a stage has of the bundle's weights.

    What is smaller spoils no balance, and stays whole in stage 0.
    """
    if stages == 1:
        return set()
    weights = {graph.name: {p: _bytes(graph, i) for i, p in graph.initializers.items()} for graph in graphs}
    total = sum({name: size for sizes in weights.values() for name, size in sizes.items()}.values())
    return {name for name, sizes in weights.items() if sum(sizes.values()) > total / (4 * stages)}


def _bytes(graph: TracedGraph, initializer: str) -> int:
    value = graph.model.graph.initializers[initializer]
    assert value.shape is not None
    assert value.dtype is not None
    return math.ceil(math.prod(value.shape.numpy()) * value.dtype.itemsize)


class Cutter:
    """Cuts traced graphs of one bundle. What two graphs share has the same stage in both, if that can be."""

    def __init__(self, stages: int, axes: Mapping[str, Axis]):
        self.stages = stages
        self.axes: dict[str, Axis] = {}  # made for what crosses
        self._sizes = {
            name: _usual(name, axis) for name, axis in axes.items() if axis.of is None and not axis.sum
        }
        self._declared = axes
        self._placed: dict[str, int] = {}
        self._parts: dict[str, _Parts] = {}

    def cut(self, traced: TracedGraph) -> list[TracedGraph]:
        """The graph's stages, as graphs ``<name>.stage<number>``.

        Raises:
            UnsupportedError: it has fewer layers than there are stages, or cannot be cut between them.
        """
        from hywu_export.passes.stages import cut

        axes = {**self._declared, **traced.axes}
        sizes = {name: self._sizes.get(name) or axis.size(self._sizes) or 1 for name, axis in axes.items()}
        weights = set(traced.initializers)
        parts = cut(traced.model, self.stages, weights, traced.values, sizes, traced.name, self._placed)
        pieces = []
        for number, part in enumerate(parts):
            self._placed |= {name: number for name in part.weights if name not in self._placed}
            crossing = (*part.reads, *part.gives)
            used = {d for spec in crossing for d in spec.shape if isinstance(d, str)}
            self.axes |= {name: axis for name, axis in traced.axes.items() if name in used}
            specs = {spec.name: spec for spec in (*traced.inputs, *traced.outputs, *crossing)}
            pieces.append(
                replace(
                    traced,
                    name=f"{traced.name}.stage{number}",
                    model=part.model,
                    initializers={n: p for n, p in traced.initializers.items() if n in part.weights},
                    inputs=tuple(specs[value.name or ""] for value in part.model.graph.inputs),
                    outputs=tuple(specs[value.name or ""] for value in part.model.graph.outputs),
                    values={},
                    axes={},
                    stage=number,
                    stage_of=traced.name,
                )
            )
        self._parts[traced.name] = _Parts(tuple(pieces), frozenset(spec.name for spec in traced.outputs))
        return pieces

    def program(self, program: Sequence[Call]) -> list[Call]:
        """The program with the calls of each graph's stages in the place of its own.

        A tensor that crosses is called ``<graph>/<value>``, and ``<graph>.2/<value>`` from the graph's second
        call.
        """
        calls: list[Call] = []
        count: Counter[str] = Counter()
        for call in program:
            if call.graph not in self._parts:
                calls.append(call)
                continue
            count[call.graph] += 1
            prefix = call.graph if count[call.graph] == 1 else f"{call.graph}.{count[call.graph]}"
            calls += self._parts[call.graph].calls(call, prefix)
        return calls


@dataclass(frozen=True)
class _Parts:
    """A graph's stages, and the names of its outputs."""

    stages: tuple[TracedGraph, ...]
    results: frozenset[str]

    def calls(self, call: Call, prefix: str) -> list[Call]:
        """The call of the graph as calls of its stages."""
        made = [spec.name for stage in self.stages for spec in stage.outputs]
        names = {name: call.outputs.get(name, name) for name in made if name in self.results}
        names |= {name: f"{prefix}/{name}" for name in made if name not in self.results}
        return [
            replace(
                call,
                graph=stage.name,
                inputs=_renamed(stage.inputs, {**names, **call.inputs}),
                outputs=_renamed(stage.outputs, names),
            )
            for stage in self.stages
        ]


def _renamed(specs: Sequence[TensorSpec], names: Mapping[str, str]) -> dict[str, str]:
    return {spec.name: names[spec.name] for spec in specs if names.get(spec.name, spec.name) != spec.name}


def _usual(name: str, axis: Axis) -> int:
    size = axis.min if name == "batch" or axis.one_or == "batch" else min(axis.max, USUAL_SIZE)
    return max(size // axis.multiple * axis.multiple, axis.min)
