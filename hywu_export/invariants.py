"""What of a step does not change between steps, as a graph of the request phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import ceil
from random import Random
from typing import TYPE_CHECKING

from hywu_export.tracing.spec import all_sizes
from hywu_runtime.manifest import Call

if TYPE_CHECKING:
    import onnx_ir as ir

    from hywu_export.families.base import Plan
    from hywu_export.tracing import Axis, TensorSpec, TracedGraph

PREFIX = "prepare_"
"""``prepare_<graph>`` makes what ``<graph>`` reads unchanged in every step."""

_PROBES = 3
_MOST_UNITS = 17


def split(traced: TracedGraph, plan: Plan, merged: bool = False) -> list[TracedGraph]:
    """The graph without its work of once per request and, before it, the graph that takes this over.

    Where deltas are ``merged`` into weights, whatever takes a product moves. ``plan`` gets a call of the new
    graph at the end of its request phase. What no step calls, several calls share, or has no such work, is
    returned as it is.
    """
    from hywu_export.passes.hoisting import ANY_PRODUCT, USEFUL, hoist
    from hywu_export.tracing import TensorSpec

    calls = [call for call in plan.program if call.graph == traced.name]
    if len(calls) != 1 or calls[0].phase != "step":
        return [traced]
    call = calls[0]
    changing = _changing(plan)
    varying = [t.name for t in traced.inputs if call.inputs.get(t.name, t.name) in changing]
    limits = ANY_PRODUCT if merged else USEFUL
    left = traced.model.clone()
    result = hoist(left, varying, _probes(plan.axes), f"{traced.name}/", limits)
    if result is None:
        return [traced]
    model, moved = result
    outputs = tuple(TensorSpec(m.name, str(m.dtype.numpy()), m.shape) for m in moved)
    specs = {tensor.name: tensor for tensor in (*traced.inputs, *outputs)}

    def part(name: str, model: ir.Model, outputs: tuple[TensorSpec, ...]) -> TracedGraph:
        weights = {n: p for n, p in traced.initializers.items() if n in model.graph.initializers}
        inputs = tuple(specs[str(value.name)] for value in model.graph.inputs)
        return replace(traced, name=name, model=model, initializers=weights, inputs=inputs, outputs=outputs)

    made, rest = part(PREFIX + traced.name, model, outputs), part(traced.name, left, traced.outputs)
    at = next(i for i, other in enumerate(plan.program) if other.phase == "step")
    inputs = {name: tensor for name, tensor in call.inputs.items() if name in {t.name for t in made.inputs}}
    plan.program.insert(at, Call(made.name, "request", inputs, guided=call.guided))
    place = plan.program.index(call)
    kept = {name: tensor for name, tensor in call.inputs.items() if name in {t.name for t in rest.inputs}}
    plan.program[place] = replace(call, inputs=kept)
    return [made, rest]


def _changing(plan: Plan) -> set[str]:
    """Tensors that another step may find with another value."""
    changing = {state.tensor for state in plan.state}
    for name, tensor in plan.tensors.items():
        if tensor.draw == "step" or (
            tensor.source == "schedule" and tensor.column not in ("initial_scale", "start")
        ):
            changing.add(name)
    outputs = {graph.name: [tensor.name for tensor in graph.outputs] for graph in plan.graphs}
    for call in plan.program:
        if call.phase == "step":
            changing.update(call.outputs.get(name, name) for name in outputs[call.graph])
    return changing


def _probes(axes: Mapping[str, Axis]) -> list[dict[str, int]]:
    """Sizes of all axes, within their limits, of which no two are in the same ratio in every probe."""
    roots = {name: axis for name, axis in axes.items() if axis.is_root}
    units = {
        name: range(ceil(axis.min / axis.multiple), min(axis.max // axis.multiple, _MOST_UNITS) + 1)
        for name, axis in roots.items()
    }
    free = [name for name in roots if len(units[name]) > 1]
    draw = Random(0)
    while True:
        probes = [
            {name: axis.multiple * draw.choice(units[name]) for name, axis in roots.items()}
            for _ in range(_PROBES)
        ]
        varied = all(len({sizes[name] for sizes in probes}) > 1 for name in free)
        if varied and all(
            len({Fraction(sizes[a], sizes[b]) for sizes in probes}) > 1 for a, b in combinations(free, 2)
        ):
            return [all_sizes(sizes, axes, one=number == 0) for number, sizes in enumerate(probes)]
