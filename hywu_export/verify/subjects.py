"""What is compared with the bundle's own FP32 graphs: a variant in ONNX Runtime, an engine on its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hywu_export.verify.measures import Check, NotRun, TensorCheck, for_graph, for_picture
from hywu_export.verify.pictures import Wish
from hywu_runtime.backends import Backend, Session
from hywu_runtime.backends.onnxruntime import OnnxRuntime, OrtSession
from hywu_runtime.bundle import Bundle, Weight
from hywu_runtime.choice import choose
from hywu_runtime.editor import Editor
from hywu_runtime.errors import BundleError, EngineError, HywuError
from hywu_runtime.manifest import Precision

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


class Subject(Protocol):
    """Something that runs the bundle's graphs in its own way."""

    part: str
    precision: Precision | None

    def graphs(self) -> set[str]:
        """The graphs that are its own."""

    def axes(self) -> dict[str, int]:
        """Sizes at which it must be compared."""

    def run(self, graph: str, inputs: Arrays, outputs: Mapping[str, tuple[int, ...]]) -> Arrays:
        """A graph's outputs, whose shapes should be ``outputs``. Raises HywuError."""

    def editor(self) -> Editor: ...


class Emulator(OnnxRuntime):
    """ONNX Runtime's CPU, running a variant's graphs with every rounding that a GPU makes.

    By itself it computes between FP16 nodes in FP32, and has no BF16 products. Graphs are loaded once.
    """

    def __init__(self, bundle: Bundle, variant: str):
        super().__init__("ort-cpu", 0, None)
        self._bundle, self._variant = bundle, variant
        graphs = bundle.manifest.variants[variant].graphs
        self._graphs = {bundle.file(file): graph for graph, file in graphs.items()}
        self._loaded: dict[Path, OrtSession] = {}

    def load(self, file: Path, weights: Mapping[str, Weight], stage: int = 0) -> OrtSession:
        """See :class:`hywu_runtime.backends.Backend`."""
        from hywu_export.bundle.sessions import load_model
        from hywu_export.bundle.variants import load_graph
        from hywu_export.passes.half import emulate

        if file not in self._graphs:
            return super().load(file, weights)
        if file not in self._loaded:
            graph = self._graphs[file]
            self._loaded[file] = load_model(emulate(load_graph(self._bundle, graph, self._variant)), graph)
        return self._loaded[file]


class VariantSubject:
    """A variant's graphs in ONNX Runtime on the CPU, with all roundings."""

    def __init__(self, bundle: Bundle, variant: str):
        self.part = f"variant {variant}"
        self.precision: Precision | None = bundle.manifest.variants[variant].precision
        self._bundle, self._variant = bundle, variant
        self._backend = Emulator(bundle, variant)

    def graphs(self) -> set[str]:
        return set(self._bundle.manifest.variants[self._variant].graphs)

    def axes(self) -> dict[str, int]:
        return {}

    def run(self, graph: str, inputs: Arrays, outputs: Mapping[str, tuple[int, ...]]) -> Arrays:
        file = self._bundle.graph_file(graph, self._variant)
        return self._backend.load(self._bundle.file(file), {}).run(inputs)

    def editor(self) -> Editor:
        return Editor(self._bundle, self._backend, variant=self._variant)


class EngineSubject:
    """An engine's plans on the device. Raises DeviceError, EngineError where they cannot run here."""

    def __init__(self, bundle: Bundle, key: str):
        self.part = f"engine {key}"
        self._bundle, self._key = bundle, key
        self._engine = bundle.manifest.engines[key]
        variant = self._engine.variant
        self.precision: Precision | None = bundle.manifest.variants[variant].precision if variant else None
        self._choice = choose(bundle, engine=key)
        self._sessions: dict[str, Session] = {}

    def graphs(self) -> set[str]:
        return set(self._engine.graphs)

    def axes(self) -> dict[str, int]:
        return {name: sizes[1] for name, sizes in self._engine.shapes.items()}

    def run(self, graph: str, inputs: Arrays, outputs: Mapping[str, tuple[int, ...]]) -> Arrays:
        backend = self._choice.backend
        backend.enter()
        if graph not in self._sessions:
            path = self._engine.graphs[graph]
            self._bundle.check(path)
            self._sessions[graph] = backend.load(self._bundle.file(path), {})
        dtypes = {value.name: value.dtype for value in self._bundle.manifest.graphs[graph].outputs}
        given = {name: backend.allocate(array.shape, array.dtype.name) for name, array in inputs.items()}
        made = {name: backend.allocate(shape, dtypes[name]) for name, shape in outputs.items()}
        for name, array in inputs.items():
            given[name].write(array)
        self._sessions[graph].bind(given, made).run()
        results = {name: tensor.read() for name, tensor in made.items()}
        backend.wait()
        return results

    def editor(self) -> Editor:
        choice = self._choice
        return Editor(self._bundle, choice.backend, variant=choice.variant, engines=choice.engines)


@dataclass
class Comparison:
    """A subject and what was found about it so far."""

    subject: Subject
    promised: Mapping[str, float | None]  # wish to the worst PSNR that the variant's report saw
    graphs: dict[str, dict[str, TensorCheck]] = field(default_factory=dict)
    edits: list[Check] = field(default_factory=list)

    def see_graph(self, graph: str, inputs: Arrays, expected: Arrays, sizes: Mapping[str, int]) -> None:
        """Runs one graph of the subject on what the FP32 graph was run on."""
        if graph not in self.subject.graphs():
            return
        checks = self.graphs.setdefault(
            graph,
            {
                name: TensorCheck(name, for_graph(array.dtype.name, self.subject.precision))
                for name, array in expected.items()
            },
        )
        try:
            got = self.subject.run(graph, inputs, {name: array.shape for name, array in expected.items()})
        except (BundleError, EngineError) as error:
            for name, check in checks.items():
                checks[name] = replace(check, failure="shape", sizes=dict(sizes), detail=error.wrong)
            return
        for name, array in expected.items():
            missing = np.empty((0,), array.dtype)
            checks[name] = checks[name].seen(got.get(name, missing), array, sizes)

    def see_edit(self, wish: Wish, expected: npt.NDArray[np.uint8]) -> None:
        """Makes a whole edit, unless a shape is wrong, with which no edit runs."""
        if any(c.failure == "shape" for g in self.graphs.values() for c in g.values()):
            return
        check = TensorCheck("picture", for_picture(self.subject.precision, self.promised.get(wish.name)))
        sizes = {"height": expected.shape[1], "width": expected.shape[2]}
        try:
            with self.subject.editor() as editor:
                check = check.seen(wish.edit(editor), expected, sizes)
        except HywuError as error:
            check = replace(check, failure="value", sizes=sizes, detail=str(error))
        self.edits.append(Check(self.subject.part, wish.name, (check,)))

    def results(self) -> tuple[list[Check], list[NotRun]]:
        """The checks, and what was not seen."""
        part = self.subject.part
        checks = [Check(part, graph, tuple(tensors.values())) for graph, tensors in self.graphs.items()]
        missed = sorted(self.subject.graphs() - self.graphs.keys())
        unseen = [NotRun(f"{part}, {graph}", "no edit needs it") for graph in missed]
        return checks + self.edits, unseen


class Recorder:
    """A backend that shows what every graph was given and what it made of it.

    Args:
        seen: called with a graph's file, its inputs and its outputs, after each run.
    """

    def __init__(self, inner: OnnxRuntime, seen: Any):
        self._inner, self._seen = inner, seen
        self.name, self.target, self.copies_states = inner.name, None, False
        self.allocate, self.enter, self.mark, self.wait = inner.allocate, inner.enter, inner.mark, inner.wait
        self.sequence = inner.sequence

    def load(self, file: Any, weights: Any, stage: int = 0) -> Any:
        return _RecordedSession(self._inner.load(file, weights), file, self._seen)


@dataclass(frozen=True)
class _RecordedSession:
    inner: OrtSession
    file: Any
    seen: Any

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _RecordedBinding:
        return _RecordedBinding(self, self.inner.bind(inputs, outputs), inputs, outputs)


@dataclass(frozen=True)
class _RecordedBinding:
    session: _RecordedSession
    inner: Any
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]

    def run(self) -> None:
        given = {name: tensor.read() for name, tensor in self.inputs.items()}
        self.inner.run()
        made = {name: tensor.read() for name, tensor in self.outputs.items()}
        self.session.seen(self.session.file, given, made)


def recording(bundle: Bundle, seen: Any) -> Editor:
    """An editor of the bundle's own graphs that shows what they do."""
    backend: Backend = Recorder(OnnxRuntime("ort-cpu", 0, None), seen)
    return Editor(bundle, backend)
