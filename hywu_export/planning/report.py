"""The plan of a bundle on a device: what fits, the least time of every stage, where memory goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from hywu_export.engines.branches import Branch, find_branches
from hywu_export.planning.case import STAGES, Case, Options, picked
from hywu_export.planning.costs import Node, Time, as_if, costs, scores_of, time_of, working_set
from hywu_export.planning.devices import Device
from hywu_export.planning.memory import Weights, between, residents, stored, weights_of
from hywu_export.planning.merging import compare
from hywu_runtime.bundle import Bundle
from hywu_runtime.errors import InputError

SCHEMA = "hywu.plan/1"
AS_IF = ("fp16", "bf16", "int8", "int8-weights")
"""Precisions of variants that can be planned before they are made."""


@dataclass(frozen=True)
class _Graph:
    """One graph in one variant."""

    name: str
    nodes: Sequence[Node]
    weights: Weights
    working: int
    peak_at: str
    fused: int  # as `working`, where attention is fused
    branches: Sequence[Branch]

    def time(self, device: Device) -> Time:
        return time_of(self.nodes, device.limits)


def _renamed(graph: _Graph) -> list[Node]:
    """Nodes with names that those of no other graph have."""
    return [
        replace(n, name=f"{graph.name}:{n.name}", group=f"{graph.name}:{n.group}" if n.group else "")
        for n in graph.nodes
    ]


def _renamed_branches(graph: _Graph) -> list[Branch]:
    def name(node: str | None) -> str | None:
        return None if node is None else f"{graph.name}:{node}"

    return [
        Branch(
            b.module, tuple(f"{graph.name}:{n}" for n in b.down), tuple(f"{graph.name}:{n}" for n in b.up),
            name(b.add), name(b.base),
        )
        for b in graph.branches
    ]  # fmt: skip


class _Variant:
    """A bundle's graphs in a variant of the bundle (or its own: None), or in one that is not made."""

    def __init__(self, case: Case, device: Device, name: str | None):
        self.case, self.device, self.name = case, device, name
        self.made = name is None or name in case.manifest.variants
        self.graphs = [self._graph(graph) for graph in case.graphs]

    def _graph(self, graph: str) -> _Graph:
        case, variant = self.case, self.name if self.made else None
        model, shapes = case.graph(graph, variant)
        nodes = costs(model, shapes, f"graph {graph}")
        narrow = None if self.made else self.name
        if narrow is not None:
            nodes = as_if(nodes, model, shapes, narrow)
        working, at = working_set(model, shapes, narrow is not None)
        fused, _ = working_set(model, shapes, narrow is not None, scores_of(model, shapes))
        file = case.bundle.graph_file(graph, variant)
        return _Graph(graph, nodes, weights_of(model, file, narrow), working, at, fused, find_branches(model))

    def stages(self) -> dict[str, dict[str, Any]]:
        """By stage, of one run of it: times in seconds, operations, bytes."""
        found: dict[str, dict[str, Any]] = {}
        for stage in STAGES:
            graphs = [g for g in self.graphs if self.case.stages[g.name] == stage and self._runs(g)]
            if not graphs:
                continue
            per = self.case.evaluations if stage == "step" else 1
            total = dict.fromkeys(("seconds", "compute", "memory", "unfused"), 0.0)
            bound = 0.0
            flops = moved = 0
            for graph in graphs:
                time, times = graph.time(self.device), self._runs(graph) / per
                for key in total:
                    total[key] += times * getattr(time, key)
                bound += times * time.compute_bound
                flops += round(times * sum(node.flops for node in graph.nodes))
                moved += round(times * sum(node.bytes for node in graph.nodes if node.flops))
            found[stage] = {
                "graphs": {graph.name: self._runs(graph) for graph in graphs}, "runs": per, **total,
                "flops": flops, "bytes": moved,
                "compute_share": bound / total["seconds"] if total["seconds"] else 0.0,
                "bound": "compute" if bound * 2 >= total["seconds"] else "bandwidth",
            }  # fmt: skip
        return found

    def _runs(self, graph: _Graph) -> int:
        return self.case.runs(graph.name)

    def memory(self, margin: float) -> dict[str, Any]:
        """What must be in memory, in bytes, and whether it fits."""
        tensors = between(self.case)
        by_name = {graph.name: graph for graph in self.graphs}
        lying = sum(tensors.values())
        most = max((g.working for g in self.graphs), default=0)
        largest = max(self.graphs, key=lambda g: g.working)
        weights = sum(g.weights.bytes for g in self.graphs)

        def need(working: Mapping[str, int]) -> tuple[float, float, str]:
            """Bytes with all graphs at once and with low_memory, and which of them the device has."""
            sets = [
                sum(by_name[n].weights.bytes for n in names) + max(working[n] for n in names)
                for names in residents(self.case)
            ]
            whole = weights + max(working.values()) + lying + margin
            low = max(sets) + lying + margin
            fits = "low_memory" if low <= self.device.memory else "no"
            return whole, low, "at once" if whole <= self.device.memory else fits

        whole, low, fits = need({graph.name: graph.working for graph in self.graphs})
        fits_fused = need({graph.name: graph.fused for graph in self.graphs})[2]
        parts = [(f"weights of {g.name}", g.weights.bytes) for g in self.graphs]
        parts += [(f"activations, most in {largest.name}", most), *((n, s) for n, s in tensors.items() if s)]
        parts.append(("left for other things", round(margin)))
        return {
            "device": self.device.memory, "margin": margin, "weights": weights, "stored": self.stored(),
            "activations": most, "activations_fused": max((g.fused for g in self.graphs), default=0),
            "activations_at": f"{largest.name}: {largest.peak_at}", "tensors": tensors,
            "all_at_once": whole, "low_memory": low, "fits": fits, "fits_fused": fits_fused,
            "parts": [{"what": what, "bytes": size} for what, size in sorted(parts, key=lambda p: -p[1])],
        }  # fmt: skip

    def deltas(self) -> dict[str, Any] | None:
        """Low rank against merged, in the graphs of a step, or of the first stage that reads deltas."""
        case, spec = self.case, self.case.manifest.deltas
        stages = sorted({case.stages[g.name] for g in self.graphs if g.branches}, key=lambda s: s != "step")
        if spec is None or not stages:
            return None
        graphs = [graph for graph in self.graphs if case.stages[graph.name] == stages[0]]
        merging = compare(
            [node for graph in graphs for node in _renamed(graph)],
            [branch for graph in graphs for branch in _renamed_branches(graph)],
            {target.module: target for target in spec.targets},
            case.options.rank, case.delta_sets, case.batch, self.device.limits,
        )  # fmt: skip
        return {"stage": stages[0], "graphs": [g.name for g in graphs if g.branches], **merging.to_dict()}

    def stored(self) -> int:
        return stored([graph.weights for graph in self.graphs])

    def cuts(self) -> list[dict[str, Any]]:
        """Of a bundle that is cut into stages, what each of them needs on a device of its own."""
        manifest = self.case.manifest
        numbers = sorted({manifest.graphs[g.name].stage for g in self.graphs})
        if len(numbers) < 2:
            return []
        found = []
        for number in numbers:
            graphs = [g for g in self.graphs if manifest.graphs[g.name].stage == number]
            found.append(
                {
                    "stage": number,
                    "graphs": [graph.name for graph in graphs],
                    "weights": sum(graph.weights.bytes for graph in graphs),
                    "activations": max(graph.working for graph in graphs),
                }
            )
        return found


def plan(
    bundle: Bundle,
    device: Device,
    variant: str | None = None,
    options: Options | None = None,
    margin: float | None = None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `hywu plan --json` writes: times in seconds, sizes in bytes.

    Args:
        bundle: opened without its linked checkpoints; no weight is read.
        variant: of the bundle, or ``fp16``, ``bf16``, ``int8``, ``int8-weights`` as it might become.
        margin: bytes that are left for what the graphs do not show; None: the device's.
        measured: a measurement of `hywu bench`; what ``options`` leaves open is as it was measured.
    Raises:
        InputError: a size that the bundle does not take, or a measurement of something else.
        UnsupportedError: a shape or cost that does not follow from the graphs.
    """
    manifest = bundle.manifest
    options = options or Options()
    if measured is not None:
        options, variant = _as_measured(bundle, options, variant, measured)
    if variant is not None and variant not in (*manifest.variants, *AS_IF):
        have = ", ".join((*manifest.variants, *(name for name in AS_IF if name not in manifest.variants)))
        raise InputError(
            f"The bundle has no variant {variant!r}, and none such can be planned",
            f"Expected {have}",
            "Choose one of these",
        )
    case = Case(bundle, options)
    left = device.margin if margin is None else margin
    load = cache(lambda name: _Variant(case, device, name))
    chosen: _Variant = load(variant)
    names = [None, *manifest.variants, *(n for n in ("fp16", "int8") if n not in manifest.variants)]
    if variant not in names:
        names.append(variant)
    stages = chosen.stages()
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "bundle": manifest.name,
        "device": {
            "key": device.key, "name": device.name, "memory": device.memory, "bandwidth": device.bandwidth,
            "peak": dict(device.peak), "source": device.source, "url": device.url, "note": device.note,
            "unconfirmed": list(device.unconfirmed),
        },
        "variant": variant,
        "as_if": not chosen.made,
        "request": {
            "size": list(case.size) if case.size is not None else None, "batch": case.batch,
            "axes": case.axes, "other_axes": case.other_axes,
            "delta_sets": case.delta_sets if manifest.deltas is not None else None,
            "rank": options.rank or (manifest.deltas.rank if manifest.deltas is not None else None),
            "evaluations": case.evaluations, "guided": case.guided,
        },
        "stages": stages,
        "edit": _edit(stages),
        "memory": chosen.memory(left),
        "cuts": chosen.cuts(),
        "deltas": chosen.deltas(),
        "variants": [_summary(load(name), left) for name in names],
    }  # fmt: skip
    if measured is not None:
        result["measured"] = _beside(measured, result)
    return result


def _edit(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    total = {
        key: sum(stage[key] * stage["runs"] for stage in stages.values())
        for key in ("seconds", "compute", "memory", "unfused", "flops", "bytes")
    }
    bound = sum(stage["seconds"] * stage["runs"] * stage["compute_share"] for stage in stages.values())
    share = bound / total["seconds"] if total["seconds"] else 0.0
    return {**total, "compute_share": share, "bound": "compute" if share >= 0.5 else "bandwidth"}


def _summary(variant: _Variant, margin: float) -> dict[str, Any]:
    stages, memory = variant.stages(), variant.memory(margin)
    return {
        "variant": variant.name, "as_if": not variant.made, "stored": memory["stored"],
        "all_at_once": memory["all_at_once"], "low_memory": memory["low_memory"], "fits": memory["fits"],
        "stages": {name: stage["seconds"] for name, stage in stages.items()},
        "edit": _edit(stages)["seconds"],
    }  # fmt: skip


def _as_measured(
    bundle: Bundle, options: Options, variant: str | None, measured: Mapping[str, Any]
) -> tuple[Options, str | None]:
    name = bundle.manifest.name
    if measured["bundle"] != name:
        raise InputError(
            f"The measurement is of bundle {measured['bundle']!r}",
            f"Expected one of {name!r}",
            "Give the file that `hywu bench --json` wrote for this bundle",
        )
    was = picked(bundle.manifest, measured)
    asked = {
        "size": (options.size, was.size),
        "steps": (options.steps, was.steps),
        "batch": (options.batch if options.batch != 1 else None, was.batch),
        "variant": (variant, measured.get("variant")),
    }
    for what, (given, there) in asked.items():
        if given is not None and given != there:
            raise InputError(
                f"The {what} is {given}, but {there} was measured",
                "Expected the same, to compare them",
                f"Leave out --{what}, or measure again",
            )
    return replace(options, size=was.size, steps=was.steps, batch=was.batch), measured.get("variant")


def _beside(measured: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of a measurement over what was computed, by stage."""
    found = {}
    stages = measured["stages"]
    for name, stage in result["stages"].items():
        there = "steady_step" if name == "step" and "steady_step" in stages else name
        if there in stages and stage["seconds"] > 0:
            found[name] = {"measured": float(stages[there]["p50"]), "planned": stage["seconds"]}
    if "edit" in stages:
        found["edit"] = {"measured": float(stages["edit"]["p50"]), "planned": result["edit"]["seconds"]}
    for pair in found.values():
        pair["ratio"] = pair["measured"] / pair["planned"]
    return {
        "backend": measured.get("backend"),
        "machine": measured.get("device", {}).get("name") or measured.get("machine", {}).get("cpu"),
        "stages": found,
    }
