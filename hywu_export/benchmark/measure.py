"""The measurement itself: edits of one bundle in one way, until there are enough of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hywu_export.benchmark.machine import Machine, suspicions
from hywu_export.benchmark.meters import Nvml, energy_meters, peak_memory, resident_memory
from hywu_export.benchmark.plain import step_overhead
from hywu_export.benchmark.stages import STAGES, makers_from_deltas, stages_of
from hywu_export.benchmark.statistics import curve, stable, summary
from hywu_runtime import Deltas, Editor, __version__
from hywu_runtime.errors import HywuError, InputError, UnsupportedError
from hywu_runtime.images import Size, load_photo, parse_size
from hywu_runtime.manifest import DeltaSpec, Manifest
from hywu_runtime.program import resolve_axes

SCHEMA = "hywu.bench/1"
STEPS = 20
LEAST_EDITS = 5
MOST_WARM_UP = 20
SPREAD = 0.025  # trexec's own limit for a figure that is stable
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Case:
    """How a bundle is run; None is the bundle's or the backend's own choice.

    ``size`` is as for `Editor.edit`, ``steps`` by default 20, or the nearest count that the sampler
    takes; ``duration`` the seconds that edits are measured for, at least.
    """

    backend: str = "auto"
    variant: str | None = None
    engine: str | None = None
    device: int | None = None
    threads: int | None = None
    low_memory: bool = False
    steps: int | None = None
    sampler: str | None = None
    batch: int = 1
    size: Size | None = None
    prompt: str = "make it sepia"
    photo: str | Path | None = None
    duration: float = 10.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.steps is not None and self.steps < 1):
            raise InputError(
                f"The batch is {self.batch}, the steps are {self.steps}", "Expected 1 or more", "Correct it"
            )
        if not 0 <= self.duration <= 86400:
            raise InputError(
                f"The duration is {self.duration} s", "Expected 0 to 86400", "Choose another one"
            )


@dataclass
class _Times:
    """Seconds of every edit that was measured, by stage."""

    stages: dict[str, list[float]] = field(default_factory=dict)
    graphs: dict[str, list[float]] = field(default_factory=dict)
    change: list[float] = field(default_factory=list)

    def add(self, stage: str, seconds: float) -> None:
        self.stages.setdefault(stage, []).append(seconds)


class _Subject:
    """One editor, and the request that it is asked again and again."""

    def __init__(self, path: str | Path, case: Case):
        start = time.perf_counter()
        self.editor = Editor.load(
            path, case.backend, case.device, case.threads, case.low_memory,
            sources=case.sources, variant=case.variant, engine=case.engine,
        )  # fmt: skip
        self.opened = time.perf_counter() - start
        self.case, self.manifest = case, self.editor.bundle.manifest
        if self.manifest.results.image is None:
            self.editor.close()
            raise UnsupportedError(
                "This bundle makes no images", "What is measured is an edit", "Export with a base"
            )
        limits = self.editor.limits()
        self.generates = limits.generates
        self.steps = _steps(limits.steps, case, limits.default_sampler)
        policy = self.manifest.image or limits.size
        side = int(limits.size.default_area**0.5) if limits.size is not None else 256
        size = (side, side)
        if case.size is not None and policy is not None:
            size = parse_size(case.size, policy)
        photo: Any = case.photo if case.photo is not None else gradient(*size)
        self.photo = load_photo(photo, limits.size if case.size is None else policy, case.size)
        guided = bool(self.manifest.guidance) and all(g.satisfied(g.default) for g in self.manifest.guidance)
        self.stage_of = stages_of(self.manifest, guided)
        spec = self.manifest.deltas
        self.sets = [] if spec is None else [random_deltas(spec, case.batch, seed) for seed in (1, 2)]
        self.guided = guided

    def edit(self, number: int, deltas: Deltas | None = None) -> float:
        """One edit; its seconds."""
        if deltas is None and not self.generates and self.sets:
            deltas = self.sets[number % 2]
        start = time.perf_counter()
        self.editor.edit_batch(
            [(self.photo, self.case.prompt)] * self.case.batch, steps=self.steps, seed=number,
            sampler=self.case.sampler, deltas=deltas, output="array",
        )  # fmt: skip
        return time.perf_counter() - start

    def note(self, times: _Times, whole: float) -> None:
        """Adds the last edit's times."""
        timings = self.editor.timings
        stages = dict.fromkeys(self.stage_of.values(), 0.0)
        for graph, seconds in timings.graphs.items():
            stages[self.stage_of.get(graph, "encode")] += seconds
            times.graphs.setdefault(graph, []).append(seconds)
        for stage, seconds in stages.items():
            if stage not in ("condition", "generate") or seconds:
                times.add(stage, seconds)
        times.add("bind", timings.bind)
        for seconds in timings.steps:
            times.add("step", seconds)
        if len(timings.steps) > 1:
            steady = float(np.median(timings.steps[1:]))
            times.add("first_step", timings.steps[0])
            for seconds in timings.steps[1:]:
                times.add("steady_step", seconds)
            times.change.append(
                stages.get("generate", 0.0)
                + timings.bind
                + stages.get("prepare", 0.0)
                + timings.steps[0]
                - steady
            )
        inside = sum(timings.graphs.values()) + sum(timings.steps) + timings.bind + timings.load
        times.add("outside", max(0.0, whole - inside))
        times.add("edit", whole)


def measure(path: str | Path, case: Case, progress: Progress | None = None) -> dict[str, Any]:
    """Measures edits with the bundle at ``path``; an object of the schema ``hywu.bench/1``.

    Raises:
        HywuError: the bundle cannot be opened or run so.
    """
    tell = progress or (lambda what, done, total: None)
    machine = Machine()
    record, before = machine.record(), machine.state()
    subject = _Subject(path, case)
    with subject.editor:
        first = subject.edit(0)
        cold = {"open": subject.opened, "first_edit": first, "load": subject.editor.timings.load}
        evaluations = len(subject.editor.timings.steps)
        warm: list[float] = []
        while len(warm) < MOST_WARM_UP and not stable(warm):
            tell("warming up", len(warm), MOST_WARM_UP)
            warm.append(subject.edit(len(warm)))
        backend = subject.editor.backend
        gpu = None if backend.name == "ort-cpu" else (case.device or 0)
        with energy_meters(gpu) as meters:
            joules = [meter.joules() for meter in meters]
            busy, own, start = machine.busy(), _own_seconds(), time.perf_counter()
            generated = _edits(subject, case.duration, tell, "measuring edits")
            wall = time.perf_counter() - start
            others = _others(busy, machine.busy(), own, wall)
            used = [meter.joules() - before_ for meter, before_ in zip(meters, joules)]
            edits = len(generated.stages["edit"])
            energy = [
                {"meter": m.name, "of": m.what, "joules_per_edit": j / edits, "watts": j / wall}
                for m, j in zip(meters, used)
            ]
        given = generated
        if subject.generates and subject.sets:
            given = _edits(subject, case.duration / 4, tell, "measuring given deltas", given=True)
        if subject.generates:
            for _ in range(min(edits, 10)):
                begin = time.perf_counter()
                subject.editor.generate(subject.photo, case.prompt)
                generated.add("generate_call", time.perf_counter() - begin)
        tell("measuring graphs without deltas", 1, 1)
        overhead = _overhead(subject, max(1.0, case.duration / 4))
        device = None if gpu is None else _device(gpu)
    after = machine.state()
    height, width = subject.photo.shape[:2]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "bundle": subject.manifest.name,
        "variant": subject.editor.variant,
        "backend": backend.name,
        "runtime": "python",
        "versions": {"hywu": __version__, "backend": _backend_version(backend.name)},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "threads": case.threads,
        "processors": record.get("processors", 0),
        "low_memory": case.low_memory,
        "request": {
            "width": width,
            "height": height,
            "batch": case.batch,
            "evaluations": evaluations,
            "steps": subject.steps,
            "sampler": case.sampler,
            "engine": list(subject.editor.engines),
        },
        "cold": cold,
        "warm_up": {"edits": len(warm) + 1, "stable": stable(warm)},
        "runs": edits,
        "edits_per_second": edits * case.batch / sum(generated.stages["edit"]),
        "stages": _ordered(generated.stages),
        "graphs": {name: summary(values) for name, values in generated.graphs.items()},
        "curves": {name: curve(generated.stages[name]) for name in ("edit", "step")},
        "delta_change": _change(generated, given, subject),
        "delta_overhead": overhead,
        "peak_memory": peak_memory(),
        "resident_memory": resident_memory(),
        "energy": energy,
        "machine": record,
        "state": {"before": before, "after": after},
    }
    if device is not None:
        result["device"] = device
    doubts = _doubts(generated, warm, evaluations, backend.name, device, others)
    result["warnings"] = [*doubts, *suspicions(record, before, after)]
    return result


def sweep(
    path: str | Path, cases: Sequence[tuple[dict[str, Any], Case]], progress: Progress | None = None
) -> dict[str, Any]:
    """Measures several cases; the first one's result, with all of them under ``sweep``."""
    results = [(values, measure(path, case, progress)) for values, case in cases]
    whole = dict(results[0][1])
    if len(results) > 1:
        whole["sweep"] = [{"values": values, "result": result} for values, result in results]
    return whole


def gradient(width: int, height: int) -> npt.NDArray[np.uint8]:
    """A picture that is the same everywhere, uint8 ``[height, width, 3]``; as hywu-bench's."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([255 * x // width, 255 * y // height, (x ^ y) & 255], -1).astype(np.uint8)


def random_deltas(spec: DeltaSpec, batch: int, seed: int) -> Deltas:
    """Small deltas, one set for each sample."""
    rng = np.random.default_rng(seed)
    return Deltas(
        {
            name: (0.01 * rng.standard_normal((batch, *shape))).astype(np.float32)
            for name, shape in spec.tensors.items()
        }
    )


def _steps(accepted: Mapping[str, tuple[int, ...]], case: Case, default: str | None) -> int | None:
    counts = accepted.get(case.sampler or default or "", ())
    if not counts:
        return case.steps
    if case.steps is not None:
        if case.steps not in counts:
            raise InputError(
                f"The step count is {case.steps}",
                f"This bundle takes {counts[0]} to {counts[-1]}",
                "Choose one",
            )
        return case.steps
    return min(counts, key=lambda count: (abs(count - STEPS), count))


def _edits(subject: _Subject, seconds: float, tell: Progress, what: str, given: bool = False) -> _Times:
    times, count, end = _Times(), 0, time.perf_counter() + seconds
    subject.edit(0, subject.sets[1] if given else None)  # another plan has buffers of its own
    begin = time.perf_counter()
    while count < LEAST_EDITS or time.perf_counter() < end:
        whole = subject.edit(count + 1, subject.sets[count % 2] if given else None)
        subject.note(times, whole)
        count += 1
        done = min(1.0, (time.perf_counter() - begin) / seconds) if seconds else count / LEAST_EDITS
        tell(what, int(100 * min(done, count / LEAST_EDITS)), 100)
    return times


def _ordered(stages: Mapping[str, list[float]]) -> dict[str, Any]:
    names = [name for name in STAGES if name in stages]
    names += [name for name in stages if name not in names]
    return {name: summary(stages[name]) for name in names if stages[name]}


def _change(generated: _Times, given: _Times, subject: _Subject) -> dict[str, Any]:
    """generate + bind + prepare + (first step − steady step), by edit."""
    found: dict[str, Any] = {}
    if subject.generates and generated.change:
        found["with_generate"] = summary(generated.change)
    if subject.sets and given.change:
        found["without_generate"] = summary(given.change)
        found["of_a_step"] = found["without_generate"]["p50"] / float(np.median(given.stages["steady_step"]))
    return found


def _overhead(subject: _Subject, seconds: float) -> dict[str, Any]:
    """The steady step with deltas over the same graph without them, pair by pair."""
    manifest, backend = subject.manifest, subject.editor.backend
    graph = _step_graph(manifest, subject.guided)
    if graph is None:
        return {"skipped": "no graph of the steps reads deltas"}
    if backend.target is not None:
        return {"skipped": f"{backend.name} runs compiled graphs: it needs an engine without deltas"}
    axes = resolve_axes(
        manifest,
        subject.case.batch,
        {manifest.image.tensor: np.stack([subject.photo] * subject.case.batch)} if manifest.image else {},
    )
    try:
        full, plain = step_overhead(
            subject.editor.bundle, backend, graph, subject.editor.variant, axes, seconds
        )
    except HywuError as error:
        return {"skipped": f"{error.wrong}"}
    ratios = np.array(full) / np.array(plain)
    return {
        "graph": graph,
        "with": summary(full),
        "without": summary(plain),
        "ratio": float(np.median(ratios)) - 1,
    }


def _step_graph(manifest: Manifest, guided: bool) -> str | None:
    """The graph of the steps that reads deltas, or weights that have taken them in."""
    deltas = set(manifest.deltas.tensors) if manifest.deltas is not None else set()
    for call in manifest.program:
        if call.phase != "step" or not call.runs(guided):
            continue
        if deltas & set(manifest.reads(call).values()) or makers_from_deltas(manifest, call.graph):
            return call.graph
    return None


def _doubts(
    times: _Times,
    warm: Sequence[float],
    evaluations: int,
    backend: str,
    device: Mapping[str, Any] | None,
    others: float | None,
) -> list[str]:
    """What about the measurement makes its figures doubtful."""
    found = []
    if not stable(warm):
        found.append("the times were not stable when the measurement began")
    whole = summary(times.stages["edit"])
    for name, word in (("edit", "edits"), ("steady_step", "steady steps")):
        spread = summary(times.stages[name])["variation"] if name in times.stages else 0.0
        if spread > SPREAD:
            found.append(f"the times of the {word} vary by {spread:.1%}, more than {SPREAD:.1%}")
    if whole["count"] < 100:
        found.append(f"p99 of {whole['count']} edits says little")
    if evaluations < 2:
        found.append("one step alone: a steady step and the cost of a change of deltas are not known")
    outside = float(np.mean(times.stages["outside"])) / whole["mean"]
    if backend != "ort-cpu" and outside > 0.1:
        found.append(f"{outside:.0%} of an edit pass outside the graphs: the host does not keep the GPU busy")
    if others is not None and others > 0.1:
        found.append(f"other processes used {others:.1f} processors while edits were measured")
    if device is not None:
        if device.get("other_processes"):
            found.append(f"{device['other_processes']} other processes use the GPU")
        if device.get("slowed"):
            found.append(f"the GPU's clocks are held down: {', '.join(device['slowed'])}")
    return found


def _others(before: float | None, after: float | None, own: float, wall: float) -> float | None:
    if before is None or after is None or wall <= 0:
        return None
    return max(0.0, (after - before - (_own_seconds() - own)) / wall)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _device(index: int) -> dict[str, Any] | None:
    gpu = Nvml.find(index)
    return None if gpu is None else gpu.record()


def _backend_version(name: str) -> str:
    import importlib

    module = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}.get(name, "onnxruntime")
    return str(getattr(importlib.import_module(module), "__version__", ""))
