"""What of a step does not change between steps, as a graph of the request phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hywu_runtime.manifest import Call

if TYPE_CHECKING:
    from hywu_export.families.base import Plan
    from hywu_export.tracing import Axis, TracedGraph

PREFIX = "prepare_"
"""``prepare_<graph>`` makes what ``<graph>`` reads unchanged in every step."""

_PROBES = 3


def split(traced: TracedGraph, plan: Plan) -> list[TracedGraph]:
    """``traced`` and, before it, the graph that takes over its work of once per request, if there is any.

    ``traced`` loses that work, in place, and ``plan`` gets a call of the new graph at the end of its request
    phase. Graphs that no step calls, or several calls share, stay as they are.
    """
    from hywu_export.passes.hoisting import hoist
    from hywu_export.tracing import TensorSpec, TracedGraph

    calls = [call for call in plan.program if call.graph == traced.name]
    if len(calls) != 1 or calls[0].phase != "step":
        return [traced]
    call = calls[0]
    changing = _changing(plan)
    varying = [t.name for t in traced.inputs if call.inputs.get(t.name, t.name) in changing]
    result = hoist(traced.model, varying, _probes(plan.axes), f"{traced.name}/")
    if result is None:
        return [traced]
    model, moved = result
    outputs = tuple(TensorSpec(m.name, str(m.dtype.numpy()), m.shape) for m in moved)
    specs = {tensor.name: tensor for tensor in (*traced.inputs, *outputs)}
    made = TracedGraph(
        PREFIX + traced.name,
        model,
        {name: traced.initializers[name] for name in model.graph.initializers if name in traced.initializers},
        tuple(specs[str(value.name)] for value in model.graph.inputs),
        outputs,
        traced.aliases,
    )
    traced.inputs = tuple(specs[str(value.name)] for value in traced.model.graph.inputs)
    left = traced.model.graph.initializers
    traced.initializers = {name: p for name, p in traced.initializers.items() if name in left}
    at = next(i for i, other in enumerate(plan.program) if other.phase == "step")
    inputs = {name: tensor for name, tensor in call.inputs.items() if name in {t.name for t in made.inputs}}
    plan.program.insert(at, Call(made.name, "request", inputs, guided=call.guided))
    place = plan.program.index(call)
    kept = {name: tensor for name, tensor in call.inputs.items() if name in {t.name for t in traced.inputs}}
    plan.program[place] = replace(call, inputs=kept)
    return [made, traced]


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
    """Sizes of all axes which vary independently of each other, the first near the largest."""
    from hywu_export.tracing.spec import resolve_axis

    roots = [name for name, axis in axes.items() if axis.of is None and axis.one_or is None]
    probes = []
    for probe in range(_PROBES):
        sizes = {}
        for number, name in enumerate(roots):
            axis = axes[name]
            # Different numbers of units for every axis and probe, however small the limits are.
            units = 7 + 2 * number + (probe * (number + 3)) % 5 + probe
            sizes[name] = axis.multiple * units
        for name, axis in axes.items():
            if axis.one_or is not None:
                sizes[name] = 1 if probe == _PROBES - 1 else sizes[axis.one_or]
            elif axis.of is not None:
                root, divisor = resolve_axis(name, axes)
                sizes[name] = sizes[root] // divisor
        probes.append(sizes)
    return probes
