"""Executes a manifest's program: calls, phases, carried state. It knows no model, and touches no number.

:func:`make_plan` decides what must run for the wanted tensors; :class:`Executor` holds sessions and buffers
and runs a plan.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hywu_runtime.backends import Backend, Binding, DeviceTensor, Mark, Session
from hywu_runtime.bundle import Bundle
from hywu_runtime.codec import show
from hywu_runtime.engines import build_command, covering
from hywu_runtime.errors import (
    BundleError,
    CancelledError,
    DeltaError,
    DeviceError,
    EngineError,
    HywuError,
    InputError,
)
from hywu_runtime.manifest import PHASES, Manifest, Phase, State, Value, Zeros

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Plan:
    """What runs for some wanted tensors, and what the caller must provide for it."""

    calls: Mapping[Phase, tuple[int, ...]]  # indices into the program
    provided: frozenset[str]  # tensors with a source that something reads
    absent: frozenset[str]  # deltas that something reads, that no call makes and the caller has not given
    given: frozenset[str]
    guided: bool
    wanted: tuple[str, ...]


def make_plan(
    manifest: Manifest, wanted: Sequence[str], given: frozenset[str] = frozenset(), guided: bool = False
) -> Plan:
    """Works backwards from the wanted tensors, see *Graphs and program* in docs/bundle.md."""
    makers = {
        name: i
        for i, call in enumerate(manifest.program)
        if call.runs(guided)
        for name in manifest.writes(call).values()
    }
    states = {state.tensor: state for state in manifest.state}
    needed: set[int] = set()
    provided, absent, seen = set(), set(), set()
    todo = list(wanted)
    while todo:
        name = todo.pop()
        if name in seen or name in given:
            continue
        seen.add(name)
        if name in states:
            state = states[name]
            todo += [state.next] + ([state.initial] if isinstance(state.initial, str) else [])
        elif name in manifest.tensors:
            provided.add(name)
        elif name in makers:
            if makers[name] not in needed:
                needed.add(makers[name])
                todo += manifest.reads(manifest.program[makers[name]]).values()
        else:
            absent.add(name)
    calls = {
        phase: tuple(i for i in sorted(needed) if manifest.program[i].phase == phase) for phase in PHASES
    }
    return Plan(calls, frozenset(provided), frozenset(absent), given, guided, tuple(wanted))


@dataclass(frozen=True)
class Request:
    """What a plan is run with.

    ``values``: tensor name to array, for everything the plan needs that does not change between steps.
    ``per_step``: tensor name to a function of the evaluation (0, 1, …) that gives its array.
    """

    axes: Mapping[str, int]
    values: Mapping[str, Array]
    per_step: Mapping[str, Callable[[int], Array]] = field(default_factory=dict)
    evaluations: int = 0
    finite: tuple[str, ...] = ()  # made by the request phase, and refused if they hold what is not finite
    progress: Callable[[int, int], object] | None = None
    cancelled: Callable[[], object] | None = None


@dataclass
class Timings:
    """Seconds of the last run, of the device where it works on its own.

    ``graphs``: by graph, without the step phase. ``steps``: by evaluation. ``load``: loading graphs.
    ``bind``: putting what the caller gives, deltas among it, into the graphs' buffers, and binding these
    where they are new.
    """

    graphs: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    load: float = 0.0
    bind: float = 0.0
    total: float = 0.0


# The buffers of one name: its own; zeros, for an initial state; two that the steps write in turn, for a
# carried tensor; one for what a call makes although the caller has given it; and where states are copied, one
# from which all steps read a state.
_OWN, _ZEROS, _EVEN, _ODD, _SPARE, _CARRIED = range(6)
Slot = tuple[str, int]


@dataclass(frozen=True)
class _Turn:
    """Which buffers a call sees: where a state is read, and where its next value is written."""

    read: int
    write: int


_FIRST = _Turn(_OWN, _EVEN)
_STEPS = (_Turn(_ODD, _EVEN), _Turn(_EVEN, _ODD))
_AFTER = (_Turn(_EVEN, _EVEN), _Turn(_ODD, _ODD))  # by the parity of the last evaluation
_COPIED = _Turn(_CARRIED, _EVEN)  # every step, and what comes after, where states are copied


class Executor:
    """Holds a bundle's sessions and buffers. Not for several threads at once.

    Buffers and bindings stay as they are from request to request while the plan and the axes do; only their
    content goes.

    Args:
        bundle, backend, variant: what to run, and on what.
        low_memory: keep only the session that runs (in the step phase: those of the steps), and load it anew
            each time.
        engines: the engines that a backend with a target may use, the best first.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        variant: str | None = None,
        low_memory: bool = False,
        engines: Sequence[str] = (),
    ):
        self.bundle, self.backend, self.variant, self.low_memory = bundle, backend, variant, low_memory
        self.timings = Timings()
        self._manifest = bundle.manifest
        self._states = {state.tensor: state for state in self._manifest.state}
        self._nexts = {state.next for state in self._manifest.state}
        self._sessions: dict[str, Session] = {}
        self._constants: dict[tuple[int, int], dict[str, DeviceTensor]] = {}  # by load call and batch size
        self._fixed: dict[str, DeviceTensor] = {}  # those of them that the plan reads
        self._buffers: dict[Slot, DeviceTensor] = {}
        self._bindings: dict[tuple[int, _Turn], Binding] = {}
        self._sequences: dict[_Turn, Binding] = {}  # the step phase
        self._engines, self._engine = tuple(engines), ""
        self._marks: list[tuple[str | None, Mark, Mark]] = []  # graph (None: a step), start, end
        self._layout: tuple[Plan, Mapping[str, int]] | None = None
        self._given: frozenset[str] = frozenset()
        self._axes: Mapping[str, int] = {}

    def run(self, plan: Plan, request: Request) -> dict[str, Array]:
        """Runs a plan and gives the wanted tensors as host arrays. No data of the request is kept.

        Raises:
            CancelledError: ``request.cancelled`` said so.
            BundleError, EngineError, DeviceError: a graph cannot be loaded or run.
            InputError: the size of an axis is not known, or no engine takes it.
        """
        start = time.perf_counter()
        self.timings = Timings()
        self._marks.clear()
        self.backend.enter()
        self._choose_engine(plan, request.axes)
        layout = (plan, dict(request.axes))
        if layout != self._layout:
            self._release()
            self._layout, self._given, self._axes = layout, plan.given, layout[1]
        try:
            begin = time.perf_counter()
            for name, array in request.values.items():
                self._buffer((name, _OWN)).write(array)
            self.timings.bind += time.perf_counter() - begin
            self._run_load(plan)
            self._run_phase(plan.calls["request"], request, _FIRST)
            unseen = self._check_finite(request.finite)
            self._run_steps(plan, request)
            after = _COPIED if self.backend.copies_states else _AFTER[(request.evaluations - 1) % 2]
            self._run_phase(plan.calls["final"], request, after)
            if unseen:
                self._check_result(plan, after)
            results = {name: self._tensor(name, after).read() for name in plan.wanted}
            self.backend.wait()
            self._note_times()
            return results
        except MemoryError:
            self._release()
            raise DeviceError(
                "Memory ran out",
                "Expected the request to fit",
                "Use a smaller size or batch, or low_memory=True",
            ) from None
        except BaseException:
            with contextlib.suppress(HywuError):  # one is being raised; what is still queued must end first
                self.backend.wait()
            self._release()
            raise
        finally:
            for tensor in self._buffers.values():
                tensor.wipe()
            if self.low_memory:
                self._keep_sessions(())
            self.timings.total = time.perf_counter() - start

    def load(self, plan: Plan) -> None:
        """Loads the graphs of a plan beforehand; does nothing in low-memory mode."""
        if not self.low_memory:
            self.backend.enter()
            self._choose_engine(plan, {})
            for calls in plan.calls.values():
                for i in calls:
                    self._session(self._manifest.program[i].graph)

    def close(self) -> None:
        """Frees sessions and buffers."""
        self._release()
        self._sessions.clear()
        self._constants.clear()

    def _release(self) -> None:
        self._sequences.clear()
        self._bindings.clear()
        self._buffers.clear()
        self._fixed.clear()
        self._layout = None

    def _run_load(self, plan: Plan) -> None:
        batch = self._axes["batch"]
        self._fixed = {}
        of_request = set(
            plan.given
        )  # the caller's tensors, and what is made from them: nothing of it is kept
        for i in plan.calls["load"]:
            call = self._manifest.program[i]
            if of_request.intersection(self._manifest.reads(call).values()):
                self._timed(i, self._binding(i, _FIRST))
                of_request.update(self._manifest.writes(call).values())
                continue
            if (i, batch) not in self._constants:
                self._timed(i, self._binding(i, _FIRST))
                names = self._manifest.writes(call).values()
                self._constants[i, batch] = {
                    name: self._buffers.pop(self._target(name, _FIRST)) for name in names
                }
                self._bindings.pop((i, _FIRST), None)
            self._fixed |= {n: t for n, t in self._constants[i, batch].items() if n not in plan.given}

    def _run_phase(self, calls: Sequence[int], request: Request, turn: _Turn) -> None:
        for i in calls:
            _check_cancelled(request)
            self._timed(i, self._binding(i, turn))

    def _run_steps(self, plan: Plan, request: Request) -> None:
        calls = plan.calls["step"]
        if not calls:
            return
        if self.low_memory:
            self._keep_sessions({self._manifest.program[i].graph for i in calls})
        inputs = [(self._buffer((name, _OWN)), value) for name, value in request.per_step.items()]
        if self.backend.copies_states:
            self._copy_initial(plan)
        for k in range(request.evaluations):
            _check_cancelled(request)
            sequence = self._step(
                plan, _COPIED if self.backend.copies_states else _STEPS[k % 2] if k else _FIRST
            )
            start = self.backend.mark()
            for tensor, value in inputs:
                tensor.write(value(k))
            sequence.run()
            self._marks.append((None, start, self.backend.mark()))
            if request.progress is not None:
                self.backend.wait()  # who is told that a step is done may rely on it
                request.progress(k + 1, request.evaluations)

    def _step(self, plan: Plan, turn: _Turn) -> Binding:
        """The calls of a step as one unit."""
        if turn not in self._sequences:
            bindings = [self._binding(i, turn, keep=True) for i in plan.calls["step"]]
            copies = [
                (self._buffer((state.next, turn.write)), self._buffer((state.tensor, _CARRIED)))
                for state in (self._carried(plan) if self.backend.copies_states else ())
            ]
            self._sequences[turn] = self.backend.sequence(bindings, copies)
        return self._sequences[turn]

    def _carried(self, plan: Plan) -> list[State]:
        """The states that something reads."""
        calls = [self._manifest.program[i] for phase in ("step", "final") for i in plan.calls[phase]]
        read = {name for call in calls for name in self._manifest.reads(call).values()} | set(plan.wanted)
        return [state for state in self._manifest.state if state.tensor in read]

    def _copy_initial(self, plan: Plan) -> None:
        """Puts every state's first value where the steps read it."""
        copies = []
        for state in self._carried(plan):
            carried = self._buffer((state.tensor, _CARRIED))
            if isinstance(state.initial, Zeros):
                carried.wipe()
            else:
                copies.append((self._tensor(state.initial, _FIRST), carried))
        self.backend.sequence((), copies).run()

    def _check_finite(self, names: Sequence[str]) -> bool:
        """Refuses generated values that are not finite; whether there are some that cannot be looked at."""
        unseen = False
        for name in names:
            finite = self._tensor(name, _FIRST).finite()
            unseen = unseen or finite is None
            if finite is False:
                raise DeltaError(
                    f"The generator made values of {show(name, 200)} that are not finite",
                    "Expected finite numbers",
                    "Check the bundle and the request's inputs",
                )
        return unseen

    def _check_result(self, plan: Plan, after: _Turn) -> None:
        """Refuses carried values and results that are not finite; a wrong delta shows in these, and they are
        small."""
        calls = [self._manifest.program[i] for i in plan.calls["final"]]
        read = {name for call in calls for name in self._manifest.reads(call).values()}
        for name in sorted((read & self._states.keys()) | set(plan.wanted)):
            tensor = self._tensor(name, after)
            if tensor.dtype.kind == "f" and not np.isfinite(tensor.read()).all():
                raise DeltaError(
                    f"The steps made values of {show(name, 200)} that are not finite",
                    "Expected finite numbers: the generated deltas are not, or the graphs overflow with them",
                    "Look at `hywu deltas generate`, or use another variant",
                )

    def _timed(self, index: int, binding: Binding) -> None:
        start = self.backend.mark()
        binding.run()
        self._marks.append((self._manifest.program[index].graph, start, self.backend.mark()))

    def _note_times(self) -> None:
        for graph, start, end in self._marks:
            seconds = end.since(start)
            if graph is None:
                self.timings.steps.append(seconds)
            else:
                self.timings.graphs[graph] = self.timings.graphs.get(graph, 0.0) + seconds
        self._marks.clear()

    def _choose_engine(self, plan: Plan, axes: Mapping[str, int]) -> None:
        """Takes the engine that serves a plan at some sizes; another one's graphs and buffers go."""
        target = self.backend.target
        if target is None:
            return
        graphs = {self._manifest.program[i].graph for calls in plan.calls.values() for i in calls}
        key = covering(self.bundle.root, self._manifest, self._engines, axes, graphs, target)
        if key != self._engine:
            self.close()
            self._engine = key

    def _binding(self, index: int, turn: _Turn, keep: bool = False) -> Binding:
        """A call bound to a turn's buffers. In low-memory mode other sessions go first, unless ``keep``."""
        binding = self._bindings.get((index, turn))
        if binding is None:
            call = self._manifest.program[index]
            if self.low_memory and not keep:
                self._keep_sessions((call.graph,))
            session = self._session(call.graph)
            begin = time.perf_counter()
            inputs = {port: self._tensor(name, turn) for port, name in self._manifest.reads(call).items()}
            writes = self._manifest.writes(call).items()
            outputs = {port: self._buffer(self._target(name, turn)) for port, name in writes}
            binding = self._bindings[index, turn] = session.bind(inputs, outputs)
            self.timings.bind += time.perf_counter() - begin
        return binding

    def _session(self, graph: str) -> Session:
        if graph not in self._sessions:
            start = time.perf_counter()
            self._sessions[graph] = self._load_plan(graph) if self._engine else self._load_graph(graph)
            self.timings.load += time.perf_counter() - start
        return self._sessions[graph]

    def _load_graph(self, graph: str) -> Session:
        file = self.bundle.graph_file(graph, self.variant)
        stage = self._manifest.graphs[graph].stage
        return self.backend.load(self.bundle.file(file), self.bundle.initializers(file), stage)

    def _load_plan(self, graph: str) -> Session:
        engine = self._manifest.engines[self._engine]
        path = engine.graphs[graph]
        try:
            self.bundle.check(path)
            return self.backend.load(self.bundle.file(path), {})
        except (BundleError, EngineError) as error:
            assert self.backend.target is not None
            command = build_command(
                self.bundle.root, self._manifest, self.backend.target, engine.variant, engine.shapes
            )
            raise EngineError(error.wrong, error.expected, f"Build it again: {command} --rebuild") from None

    def _keep_sessions(self, graphs: Collection[str]) -> None:
        """Drops the sessions of all other graphs, and the bindings that hold them."""
        if not self._sessions.keys() <= set(graphs):
            self._sessions = {graph: session for graph, session in self._sessions.items() if graph in graphs}
            self._sequences.clear()
            self._bindings.clear()

    def _tensor(self, name: str, turn: _Turn) -> DeviceTensor:
        """The buffer in which ``name`` is read."""
        slot = self._source(name, turn)
        return self._fixed[slot[0]] if slot[1] == _OWN and slot[0] in self._fixed else self._buffer(slot)

    def _source(self, name: str, turn: _Turn) -> Slot:
        state = self._states.get(name)
        if state is not None:
            if turn.read == _CARRIED:
                return name, _CARRIED
            if turn.read != _OWN:
                return state.next, turn.read
            return (name, _ZEROS) if isinstance(state.initial, Zeros) else (state.initial, _OWN)
        return name, turn.write if name in self._nexts else _OWN

    def _target(self, name: str, turn: _Turn) -> Slot:
        """The buffer into which ``name`` is written."""
        return name, _SPARE if name in self._given else turn.write if name in self._nexts else _OWN

    def _buffer(self, slot: Slot) -> DeviceTensor:
        if slot not in self._buffers:
            shape = resolve_shape(self._manifest, slot[0], self._axes)
            self._buffers[slot] = self.backend.allocate(shape, self._manifest.signatures[slot[0]].dtype)
        return self._buffers[slot]


def resolve_shape(manifest: Manifest, name: str, axes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape with the sizes of its axes filled in.

    Raises:
        InputError: the size of an axis is not known.
    """
    shape = manifest.signatures[name].shape
    for dimension in shape:
        if isinstance(dimension, str) and dimension not in axes:
            raise InputError(
                f"The size of axis {show(dimension)} of tensor {show(name)} is not known",
                "Expected it from an image or from a given tensor",
                "Give a tensor that has this axis",
            )
    return tuple(dimension if isinstance(dimension, int) else axes[dimension] for dimension in shape)


def resolve_axes(manifest: Manifest, batch: int, arrays: Mapping[str, Array]) -> dict[str, int]:
    """The size of every axis that a batch size and some tensors determine.

    Args:
        batch: the number of samples, the size of axis ``batch``.
        arrays: tensors of the bundle, by name.
    Raises:
        InputError: an array does not have the tensor's dtype and shape, or an axis is outside its limits.
    """
    sizes: dict[str, int] = {"batch": batch}
    for name, array in arrays.items():
        signature = manifest.signatures[name]
        if array.dtype != signature.dtype or array.ndim != len(signature.shape):
            raise _mismatch(name, array, signature)
        for dimension, size in zip(signature.shape, array.shape):
            axis = manifest.axes.get(dimension) if isinstance(dimension, str) else None
            if axis is not None and axis.sum:
                continue  # compared when all sizes are known
            base, factor = (
                (axis.of, axis.divide or 1) if axis is not None and axis.of is not None else (dimension, 1)
            )
            expected = base if isinstance(base, int) else sizes.setdefault(base, size * factor)
            if expected != size * factor:
                raise _mismatch(name, array, signature)
    for name, axis in manifest.axes.items():
        if axis.one_or is not None and axis.one_or in sizes:
            sizes.setdefault(name, sizes[axis.one_or])
    for name, size in sizes.items():
        axis = manifest.axes.get(name)
        if axis is None or axis.derived:
            continue
        low, high = axis.min or 1, axis.max or 1
        if not low <= size <= high or size % axis.multiple:
            multiples = f" that are multiples of {axis.multiple}" if axis.multiple > 1 else ""
            raise InputError(
                f"Axis {name} has size {size}",
                f"This bundle takes {low} to {high}{multiples}",
                "Choose a size within these limits",
            )
        if axis.one_or is not None and size not in (1, sizes.get(axis.one_or, size)):
            raise InputError(
                f"Axis {name} has size {size}",
                f"Expected 1 or the size of {axis.one_or}, {sizes[axis.one_or]}",
                "Give one set for all samples, or one for each",
            )
    for name, axis in manifest.axes.items():
        if axis.derived and (size := axis.size(sizes)) is not None:
            sizes[name] = size
    for name, array in arrays.items():
        for dimension, size in zip(manifest.signatures[name].shape, array.shape):
            if isinstance(dimension, str) and sizes.get(dimension, size) != size:
                raise _mismatch(name, array, manifest.signatures[name])
    return sizes


def _mismatch(name: str, array: Array, signature: Value) -> InputError:
    return InputError(
        f"Tensor {show(name)} is {array.dtype} {list(array.shape)}",
        f"Expected {signature.dtype} [{', '.join(map(str, signature.shape))}], one size for an axis",
        "Correct the array",
    )


def _check_cancelled(request: Request) -> None:
    if request.cancelled is not None and request.cancelled():
        raise CancelledError("The request was cancelled")
