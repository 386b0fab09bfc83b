"""What is planned: a bundle, sizes, and which graphs an edit runs how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hywu_export.benchmark.stages import stages_of
from hywu_export.engines.shapes import ShapeOptions, engine_shapes
from hywu_export.planning.shapes import Shapes, infer
from hywu_runtime.bundle import Bundle
from hywu_runtime.errors import BundleError, InputError, UnsupportedError
from hywu_runtime.images import parse_size
from hywu_runtime.manifest import ITEM_SIZES, Call, Manifest, is_guided
from hywu_runtime.program import make_plan
from hywu_runtime.schedule import Schedule

if TYPE_CHECKING:
    import onnx

STAGES = ("encode", "condition", "generate", "prepare", "step", "decode", "run")
"""In the order of an edit, named as `hywu bench` does; ``run`` is what a bundle without pictures does."""


@dataclass(frozen=True)
class Options:
    """What the user says; None is the bundle's own choice.

    ``size``: ``WxH``; ``rank``: of all deltas, instead of the bundle's; ``axes``: sizes of axes by name.
    """

    size: str | None = None
    batch: int = 1
    steps: int | None = None
    rank: int | None = None
    axes: Mapping[str, str] = field(default_factory=dict)


class Case:
    """A bundle at some sizes.

    Raises:
        InputError: a size, batch, rank or step count that the bundle does not take.
    """

    def __init__(self, bundle: Bundle, options: Options):
        self.bundle, self.options, self.manifest = bundle, options, bundle.manifest
        self._read: dict[str, tuple[onnx.ModelProto, Shapes]] = {}
        manifest = self.manifest
        if options.batch < 1 or (options.rank is not None and options.rank < 1):
            raise InputError(
                f"The batch is {options.batch}, the rank {options.rank}", "Expected 1 or more", "Correct it"
            )
        if options.rank is not None and manifest.deltas is None:
            raise InputError(
                f"--rank {options.rank}: the bundle takes no deltas", "Expected one that does", "Leave it out"
            )
        if options.size is not None:
            if manifest.image is None:
                raise InputError(
                    f"--size {options.size}: the bundle takes no pictures",
                    "Expected the sizes of its axes",
                    "Give these with --axis NAME=N",
                )
            parse_size(options.size, manifest.image)
        results = manifest.results
        self.guided = is_guided(manifest.guidance)
        wanted = [results.image] if results.image is not None else list(results.outputs or results.deltas)
        self.plan = make_plan(manifest, wanted, guided=self.guided)
        graphs = {manifest.program[i].graph for calls in self.plan.calls.values() for i in calls}
        self.graphs = [name for name in manifest.graphs if name in graphs]
        batch = None if options.batch == 1 and "batch" not in manifest.axes else str(options.batch)
        chosen = engine_shapes(manifest, graphs, ShapeOptions(options.size, batch, axes=options.axes))
        self.axes = {name: sizes[1] for name, sizes in chosen.items()}
        for name, axis in manifest.axes.items():
            size = axis.size(self.axes) if axis.derived else None
            if size is not None:
                self.axes[name] = size

    @property
    def batch(self) -> int:
        return self.axes.get("batch", 1)

    @property
    def delta_sets(self) -> int:
        """Sets of deltas in one request: one for all samples, or one for each."""
        deltas = self.manifest.deltas
        return 1 if deltas is None else self.axes.get(deltas.axis, 1)

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height of the picture; None for a bundle without pictures."""
        image = self.manifest.image
        names = self.manifest.tensors[image.tensor].shape[1:3] if image is not None else ()
        if len(names) != 2:
            return None
        height, width = (self.axes.get(n, 0) if isinstance(n, str) else n for n in names)
        return width, height

    @property
    def other_axes(self) -> dict[str, int]:
        """The axes that neither the picture nor the batch sets: the length of a text, say."""
        manifest, image = self.manifest, self.manifest.image
        shown = {"batch", *(manifest.tensors[image.tensor].shape if image is not None else ())}
        return {
            name: size
            for name, size in self.axes.items()
            if name not in shown and not manifest.axes[name].derived and manifest.axes[name].one_or is None
        }

    @cached_property
    def evaluations(self) -> int:
        """Of the denoiser, in one edit."""
        schedules = self.manifest.schedules
        if schedules is None:
            return 1
        schedule = Schedule(self.bundle.file(schedules.file), schedules)
        return len(schedule.rows(steps=self.options.steps))

    @cached_property
    def stages(self) -> dict[str, str]:
        """Stage of every graph that an edit runs."""
        manifest = self.manifest
        found = stages_of(manifest, self.guided) if manifest.results.image is not None else {}
        made = set(manifest.results.deltas)
        for call in self.calls:
            if call.phase == "step" and manifest.results.image is not None:
                found.setdefault(call.graph, "step")
            elif call.graph not in found:
                makes = made & set(manifest.writes(call).values())
                found[call.graph] = "generate" if makes else "run"
        return found

    @cached_property
    def calls(self) -> list[Call]:
        """All calls of the plan, in the order of the program."""
        return [self.manifest.program[i] for i in sorted(i for c in self.plan.calls.values() for i in c)]

    def runs(self, graph: str) -> int:
        """How often an edit runs a graph; what is computed once when the bundle is loaded does not count."""
        times = {"load": 0, "request": 1, "final": 1, "step": self.evaluations}
        return sum(times[call.phase] for call in self.calls if call.graph == graph)

    def graph(self, name: str, variant: str | None) -> tuple[onnx.ModelProto, Shapes]:
        """A graph without its external data, and its shapes. Raises BundleError, UnsupportedError."""
        file = self.bundle.graph_file(name, variant)
        if file not in self._read:
            model = self._load(file)
            signature = self.manifest.graphs[name]
            call = next(call for call in self.calls if call.graph == name)
            reads = self.manifest.reads(call)
            inputs = {v.name: self._ranked(reads[v.name], self.shape(v.shape)) for v in signature.inputs}
            self._read[file] = model, self._shapes(model, inputs, f"graph {name}")
        return self._read[file]

    def _shapes(self, model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]], where: str) -> Shapes:
        try:
            return infer(model, inputs, where)
        except UnsupportedError as error:
            rank, deltas = self.options.rank, self.manifest.deltas
            if rank is None or deltas is None or rank == deltas.rank:
                raise
            raise InputError(
                f"Rank {rank} cannot be planned: the rank is fixed in {where} ({error.wrong})",
                f"Expected the bundle's own, {deltas.rank}; branches of convolutions take no other",
                f"Leave out --rank, or export with --max-rank {rank}",
            ) from error

    def _load(self, file: str) -> onnx.ModelProto:
        import onnx

        path = self.bundle.file(file)
        try:
            return onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf has one of its own, which no base class names
            raise BundleError(
                f"{file} cannot be read as an ONNX graph ({error})",
                "Expected what the manifest lists",
                "Check the bundle with `hywu inspect --verify`",
            ) from None

    def shape(self, shape: tuple[int | str, ...]) -> tuple[int, ...]:
        """A shape of the manifest at these sizes. Raises InputError if an axis has none."""
        for name in shape:
            if isinstance(name, str) and name not in self.axes:
                raise InputError(
                    f"The size of axis {name!r} does not follow from the picture and the batch",
                    "Expected a size for every axis",
                    f"Give it with --axis {name}=N",
                )
        return tuple(n if isinstance(n, int) else self.axes[n] for n in shape)

    def _ranked(self, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with the rank that the user asks for, if the tensor is one of the deltas."""
        rank, deltas = self.options.rank, self.manifest.deltas
        if rank is None or deltas is None or tensor not in deltas.tensors:
            return shape
        at = deltas_rank_axis(tensor, self._experts(tensor))
        at = at if at >= 0 else len(shape) + at
        return (*shape[:at], rank, *shape[at + 1 :])

    def _experts(self, tensor: str) -> bool:
        assert self.manifest.deltas is not None
        module = tensor.rpartition(".")[0]
        return any(t.module == module and t.experts for t in self.manifest.deltas.targets)

    @cached_property
    def tensors(self) -> dict[str, int]:
        """Bytes of every tensor that calls read or write, by name: what lies between the graphs."""
        names = {n for call in self.calls for n in self.manifest.reads(call).values()}
        names |= {n for call in self.calls for n in self.manifest.writes(call).values()}
        found = {}
        for name in sorted(names):
            value = self.manifest.signatures[name]
            size = ITEM_SIZES[value.dtype]
            for n in self._ranked(name, self.shape(value.shape)):
                size *= n
            found[name] = size
        return found


def deltas_rank_axis(tensor: str, experts: bool) -> int:
    """The axis of the rank in ``<module>.lora_A`` or ``.lora_B``, see *Deltas* in docs/bundle.md."""
    return (2 if experts else 1) if tensor.endswith(".lora_A") else -1


def picked(manifest: Manifest, measured: Mapping[str, Any]) -> Options:
    """The sizes of a measurement, as options."""
    request = measured["request"]
    image = manifest.image is not None
    return Options(
        size=f"{request['width']}x{request['height']}" if image else None,
        batch=int(request["batch"]), steps=request.get("steps"),
    )  # fmt: skip
