"""Deltas of components other than the denoiser: the graphs that run these get them, and the gate, as inputs.

A family plans its graphs without them, and need not know of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.base import Plan
from hywu_export.tracing import GraphSpec, TensorSpec
from hywu_runtime.errors import UnsupportedError
from hywu_runtime.manifest import Call

GATE = "gate"


class WithDeltas(nn.Module):
    """A graph's module whose components take deltas.

    Inputs are the module's own, then the gate ``[B]``, then the deltas of ``parts`` in order. Parameters keep
    the names that they have in ``module``, all of them in its children.
    """

    def __init__(self, module: nn.Module, parts: Mapping[str, DeltaSpec]):
        super().__init__()
        assert next(module.parameters(recurse=False), None) is None
        for name, child in module.named_children():
            self.add_module(name, child)
        self._run = module.forward  # the module itself is no child: its name would lead every parameter's
        self._parts = [
            (tuple(part.tensors()), inject(module.get_submodule(component), part))
            for component, part in parts.items()
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        cut = len(inputs) - 1 - sum(len(names) for names, _ in self._parts)
        own, gate, deltas = inputs[:cut], inputs[cut], list(inputs[cut + 1 :])
        entered = []
        try:
            for names, injection in self._parts:
                entered.append(injection.__enter__())
                injection.set({name: deltas.pop(0) for name in names}, gate)
            result: tuple[Tensor, ...] = self._run(*own)
        finally:
            for injection in entered:
                injection.__exit__(None, None, None)
        return result


def add_component_deltas(plan: Plan, spec: DeltaSpec, components: Collection[str]) -> None:
    """Let the graphs of ``plan`` that run ``components`` take the deltas that ``spec`` has for these.

    What was computed once, at load, from such a graph is computed for every request then.

    Raises:
        UnsupportedError: no graph runs a component that has targets.
    """
    wanted = {name: part for name in components if (part := spec.part(name)).targets}
    used: set[str] = set()
    for i, graph in enumerate(plan.graphs):
        children = dict(graph.module.named_children())
        parts = {name: part for name, part in wanted.items() if name in children}
        if parts:
            plan.graphs[i] = _with_deltas(graph, parts)
            used |= parts.keys()
            plan.program = [_at_request(call, graph.name) for call in plan.program]
    for name in wanted.keys() - used:
        raise UnsupportedError(
            f"There are deltas for the {name}, which no graph of this family runs",
            f"Expected deltas for the denoiser, or for {', '.join(sorted(used)) or 'nothing else'}",
            "Leave them out of the targets",
        )
    _follow(plan)


def _with_deltas(graph: GraphSpec, parts: Mapping[str, DeltaSpec]) -> GraphSpec:
    deltas = [
        TensorSpec(f"{component}.{name}", "float32", ("delta_batch", *shape))
        for component, part in parts.items()
        for name, shape in part.tensors().items()
    ]
    inputs = [*graph.inputs, TensorSpec(GATE, "float32", ("batch",)), *deltas]
    return replace(graph, module=WithDeltas(graph.module, parts), inputs=inputs)


def _at_request(call: Call, graph: str) -> Call:
    late = call.graph == graph and call.phase == "load"
    return replace(call, phase="request") if late else call


def _follow(plan: Plan) -> None:
    """Calls of the load phase that read what is made for a request now are made then too."""
    outputs = {graph.name: [tensor.name for tensor in graph.outputs] for graph in plan.graphs}
    inputs = {graph.name: [tensor.name for tensor in graph.inputs] for graph in plan.graphs}
    made: set[str] = set()
    for i, call in enumerate(plan.program):
        reads = {call.inputs.get(name, name) for name in inputs[call.graph]}
        if call.phase == "load" and reads & made:
            plan.program[i] = call = replace(call, phase="request")
        if call.phase == "request":
            made |= {call.outputs.get(name, name) for name in outputs[call.graph]}
