"""The inputs of graphs during real edits, recorded on disk.

An edit runs through the editor as any other; its backend keeps the inputs of every graph, at the
evaluations that the sample looks at. What is done with them later, graph by graph, holds one graph and one
record in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hywu_calibration.samples import Sample
from hywu_runtime.backends import Binding, DeviceTensor, Session
from hywu_runtime.backends.onnxruntime import OnnxRuntime
from hywu_runtime.bundle import Bundle, Weight
from hywu_runtime.errors import DeltaError
from hywu_runtime.files import write_atomically

if TYPE_CHECKING:
    from hywu_runtime import Deltas

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Record:
    """One run of a graph: its inputs by name."""

    graph: str
    inputs: Mapping[str, Array]


@dataclass
class _Tape:
    """What a recording backend writes to."""

    steps: frozenset[str]  # graphs of the step phase
    evaluations: frozenset[int] = frozenset()
    seen: dict[str, int] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def start(self, evaluations: Sequence[int]) -> None:
        self.evaluations, self.seen, self.records = frozenset(evaluations), {}, []

    def wants(self, graph: str) -> bool:
        number = self.seen.get(graph, 0)
        self.seen[graph] = number + 1
        return graph not in self.steps or number in self.evaluations


class RecordingBackend(OnnxRuntime):
    """ONNX Runtime's CPU, noting the inputs of the graphs that it runs.

    Sessions outlive editors; of graphs that use the same weights one at a time is kept, because a large model
    fits once.
    """

    def __init__(self, bundle: Bundle):
        super().__init__("ort-cpu", 0, None)
        manifest = bundle.manifest
        self.tape = _Tape(frozenset(c.graph for c in manifest.program if c.phase == "step"))
        self._graphs = {bundle.file(graph.file): name for name, graph in manifest.graphs.items()}
        self._sessions: dict[str, Session] = {}

    def load(self, file: Path, weights: Mapping[str, Weight], stage: int = 0) -> Any:
        graph = self._graphs[file]
        if graph not in self._sessions:
            if graph in self.tape.steps:
                for other in self.tape.steps:
                    self._sessions.pop(other, None)
            self._sessions[graph] = super().load(file, weights)
        return _RecordingSession(self._sessions[graph], graph, self.tape)


class _RecordingSession:
    def __init__(self, session: Session, graph: str, tape: _Tape):
        self._session, self._graph, self._tape = session, graph, tape

    def bind(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> Binding:
        return _RecordingBinding(self._session.bind(inputs, outputs), self._graph, inputs, self._tape)


class _RecordingBinding:
    def __init__(self, binding: Binding, graph: str, inputs: Mapping[str, DeviceTensor], tape: _Tape):
        self._binding, self._graph, self._inputs, self._tape = binding, graph, inputs, tape

    def run(self) -> None:
        if self._tape.wants(self._graph):
            arrays = {name: tensor.read() for name, tensor in self._inputs.items()}
            self._tape.records.append(Record(self._graph, arrays))
        self._binding.run()


class Recordings:
    """One file for each sample in a folder: the records of its edit, and the edited picture.

    A sample whose file is there is not run again, so a job that was killed goes on where it was. Arrays
    that are equal within a sample (deltas, from step to step) are stored once.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample]):
        self.folder, self.samples = folder, tuple(samples)
        self.failed: tuple[Record, ...] = ()  # what ran of an edit whose deltas were refused

    def make(
        self,
        bundle: Bundle,
        *,
        strength: float = 1.0,
        deltas: Sequence[Deltas] = (),
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Runs the edits whose file is missing.

        Args:
            strength: of the deltas.
            deltas: sets to use in turn, in place of generated ones.
            progress: called with (samples done, samples in all).
        Raises:
            DeltaError, InputError, BundleError, EngineError, DeviceError: an edit fails.
            InputError: a file cannot be written.
        """
        from hywu_runtime import Editor

        recorder = RecordingBackend(bundle)
        # Samples with and without guidance use different graphs of the same weights: one after the other.
        todo = sorted(self.samples, key=lambda s: (s.guided, s.number))
        for done, sample in enumerate(todo):
            if progress is not None:
                progress(done, len(todo))
            if self._file(sample).exists():
                continue
            recorder.tape.start(sample.evaluations)
            # A new editor for each, so that what an editor computes once is recorded in every sample.
            with Editor(bundle, recorder) as editor, self._noting(recorder.tape):
                photos = [sample.photo] * editor.limits().photos
                picture = editor.edit(
                    photos, sample.prompt, seed=sample.seed, steps=sample.steps, size=sample.size,
                    guidance=dict(sample.guidance), delta_strength=strength,
                    deltas=deltas[sample.number % len(deltas)] if deltas else None, output="array",
                )  # fmt: skip
            self._write(sample, recorder.tape.records, np.asarray(picture))
        if progress is not None:
            progress(len(todo), len(todo))

    @contextmanager
    def _noting(self, tape: _Tape) -> Iterator[None]:
        try:
            yield
        except DeltaError:
            self.failed = tuple(tape.records)
            raise

    def counts(self) -> Counter[str]:
        """How many records every graph has."""
        return Counter(name for sample in self.samples for name, _ in self._calls(sample))

    def of(self, graph: str, at_most: int | None = None) -> Iterator[Record]:
        """The records of a graph, one in memory at a time; or ``at_most`` so many, spread over all."""
        from safetensors import safe_open

        total = self.counts()[graph]
        chosen = set(range(total))
        if at_most is not None and at_most < total:
            chosen = {i * total // at_most for i in range(at_most)}
        number = -1
        for sample in self.samples:
            for name, inputs in self._calls(sample):
                number += name == graph
                if name == graph and number in chosen:
                    with safe_open(self._file(sample), "numpy") as file:
                        arrays = {key: file.get_tensor(digest) for key, digest in inputs.items()}
                    yield Record(name, arrays)

    def picture(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """The picture that a sample's edit gave, uint8 ``[H, W, 3]``."""
        from safetensors import safe_open

        with safe_open(self._file(sample), "numpy") as file:
            return np.asarray(file.get_tensor("picture"))

    def _calls(self, sample: Sample) -> list[tuple[str, dict[str, str]]]:
        """Graph, and input name to stored tensor, for every record of a sample."""
        from safetensors import safe_open

        with safe_open(self._file(sample), "numpy") as file:
            return [(name, inputs) for name, inputs in json.loads(file.metadata()["calls"])]

    def _file(self, sample: Sample) -> Path:
        return self.folder / f"sample-{sample.number:05d}.safetensors"

    def _write(self, sample: Sample, records: Sequence[Record], picture: Array) -> None:
        from safetensors.numpy import save

        tensors: dict[str, Array] = {"picture": picture}
        calls = []
        for record in records:
            digests = {name: _digest(array) for name, array in record.inputs.items()}
            tensors |= {digests[name]: array for name, array in record.inputs.items()}
            calls.append((record.graph, digests))
        content = save(tensors, {"calls": json.dumps(calls)})
        write_atomically(self._file(sample), lambda stream: stream.write(content))


def _digest(array: Array) -> str:
    head = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:32]
