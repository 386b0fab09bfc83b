"""A bundle against what it was made from: torch and diffusers against ONNX Runtime.

Every graph's module is built anew with the weights of the checkpoints and run on random inputs of several
sizes; then a whole edit without deltas is compared with the diffusers pipeline on the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from hywu_runtime.bundle import Bundle
from hywu_runtime.errors import InputError, UnsupportedError
from hywu_runtime.manifest import Manifest, ProvidedTensor

if TYPE_CHECKING:
    from hywu_export.bundle.weights import WeightSource
    from hywu_export.families.base import Family, Plan
    from hywu_export.families.generator import GeneratorPart
    from hywu_export.tracing import Axis, GraphSpec

Array = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]

RELATIVE_TOLERANCE = 1e-4  # of the largest value of an output
LEVELS = 1  # of uint8
EDIT_STEPS = 4
EDIT_SIDE = 256  # pixels; larger models are edited at no more than this
PROMPTS = ("make it look like an old photograph", "a red car in the snow")
SEED = 0


@dataclass(frozen=True)
class OutputCheck:
    """One output of one graph, over all sizes that were tried.

    Attributes:
        difference: the largest; of numbers in units of the output's largest value, of uint8 in levels. Not
            finite if an output is not.
        failure: None if all is well.
        sizes: the axes at which ``difference`` was found, or at which the shape is wrong.
        detail: what is wrong with the shape.
    """

    graph: str
    output: str
    tolerance: float
    difference: float
    failure: Literal["shape", "value"] | None
    sizes: Mapping[str, int]
    detail: str = ""


@dataclass(frozen=True)
class EditCheck:
    """A whole edit against the pipeline: PSNR in dB, None if equal; the largest difference in levels."""

    psnr: float | None
    difference: int
    sampler: str
    steps: int
    size: tuple[int, int]
    failure: Literal["shape", "value"] | None


@dataclass(frozen=True)
class Report:
    """What `verify` found; ``edit`` is None without a base, or where a shape is wrong."""

    outputs: tuple[OutputCheck, ...]
    edit: EditCheck | None

    @property
    def failure(self) -> Literal["shape", "value"] | None:
        """The gravest failure: a wrong shape, then a wrong value."""
        failures = {check.failure for check in self.outputs}
        if self.edit is not None:
            failures.add(self.edit.failure)
        return "shape" if "shape" in failures else "value" if "value" in failures else None


def verify(
    bundle: str | Path,
    base: str | Path | None = None,
    generator: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with the checkpoints that it was exported from.

    Raises:
        InputError: a checkpoint that the bundle was made from is not given, or one that it was not.
        BundleError, CheckpointError, UnsupportedError: something cannot be opened.
    """
    folders = {
        name: Path(folder)
        for name, folder in (("base", base), ("generator", generator))
        if folder is not None
    }
    manifest = Manifest.read(bundle)
    if set(folders) != set(manifest.sources):
        raise InputError(
            f"The checkpoints given are {', '.join(folders) or 'none'}",
            f"The bundle was made from {', '.join(manifest.sources) or 'none'}",
            "Give " + " ".join(f"--{name} DIR" for name in manifest.sources),
        )
    opened = Bundle.open(bundle, sources=folders if manifest.linked else None)
    original = _Original(manifest, folders.get("base"), folders.get("generator"))
    tell = progress or (lambda what, done, total: None)
    total = len(original.plan.graphs) + 1
    checks: list[OutputCheck] = []
    for done, graph in enumerate(original.plan.graphs):
        tell(graph.name, done, total)
        checks += _check_graph(opened, graph, original)
    edit = None
    shapes_agree = all(check.failure != "shape" for check in checks)  # else there is no running the program
    if shapes_agree and original.family is not None and manifest.results.image is not None:
        tell("whole edit", total - 1, total)
        edit = _check_edit(opened, original.family)
    tell("done", total, total)
    return Report(tuple(checks), edit)


class _Original:
    """The torch side of a bundle: its plan, rebuilt from the checkpoints by what the manifest says."""

    def __init__(self, manifest: Manifest, base: Path | None, generator: Path | None):
        from hywu_export.deltas import DeltaSpec
        from hywu_export.exporter import make_plan
        from hywu_export.families import open_base
        from hywu_export.families.base import Limits
        from hywu_export.families.generator import GeneratorPart
        from hywu_runtime.codec import encode

        self.family: Family | None = None if base is None else open_base(base)
        part: GeneratorPart | None = None if generator is None else GeneratorPart(generator)
        spec = None if manifest.deltas is None else DeltaSpec.from_manifest(encode(manifest.deltas))
        policy, batch = manifest.image, manifest.axes["batch"].max
        limits = Limits(
            batch or 1,
            policy.max if policy is not None else None,
            policy.default_area if policy is not None else None,
        )
        rows = [t.shape[0] for t in manifest.tensors.values() if t.column == "coefficients"]
        width = rows[0] if rows and isinstance(rows[0], int) else 0
        self.plan: Plan = make_plan(self.family, part, spec, limits, base_prompt(manifest), width)
        self.weights: dict[str, WeightSource] = {}
        if self.family is not None:
            self.weights |= {name: component.tensors for name, component in self.family.components.items()}
        if part is not None:
            self.weights.update(part.weights)


def base_prompt(manifest: Manifest) -> str | None:
    """What the base is told instead of the instruction; None if it is told the instruction."""
    return next((t.constant for t in manifest.tensors.values() if t.constant is not None), None)


def _check_graph(bundle: Bundle, graph: GraphSpec, original: _Original) -> list[OutputCheck]:
    import torch

    from hywu_export.passes.quiet import quiet
    from hywu_export.tracing.loading import with_weights
    from hywu_runtime.backends.onnxruntime import OnnxRuntime

    declared = bundle.manifest.graphs.get(graph.name)
    if declared is None:
        raise UnsupportedError(
            f"The bundle has no graph {graph.name!r}",
            "Expected the graphs that this version makes of these checkpoints",
            "Export the bundle again with this version",
        )
    wrong = _signature_difference(graph, declared)
    if wrong:
        return [OutputCheck(graph.name, o.name, 0, math.nan, "shape", {}, wrong) for o in graph.outputs]
    file = bundle.graph_file(graph.name)
    session = OnnxRuntime("ort-cpu", 0, None).load(bundle.file(file), bundle.initializers(file))
    inputs = _Inputs(bundle, graph)
    worst: dict[str, OutputCheck] = {}
    with quiet(), with_weights(graph.module, original.weights), torch.no_grad():
        for sizes in _sizes(graph, original.plan.axes):
            arrays = inputs.draw(sizes)
            expected = [
                t.numpy() for t in graph.module(*(torch.from_numpy(arrays[t.name]) for t in graph.inputs))
            ]
            got = session.run(arrays)
            for output, reference in zip(graph.outputs, expected):
                check = compare(graph.name, output.name, got[output.name], reference, sizes)
                if output.name not in worst or _badness(check) > _badness(worst[output.name]):
                    worst[output.name] = check
    return list(worst.values())


def _badness(check: OutputCheck) -> tuple[int, float]:
    grave = {"shape": 2, "value": 1, None: 0}[check.failure]
    return grave, check.difference if math.isfinite(check.difference) else math.inf


def compare(graph: str, output: str, got: Array, expected: Array, sizes: Mapping[str, int]) -> OutputCheck:
    """One output at one size: ``got`` is the graph's, ``expected`` the module's."""
    levels = expected.dtype == np.uint8
    tolerance = LEVELS if levels else RELATIVE_TOLERANCE
    if got.shape != expected.shape or got.dtype != expected.dtype:
        detail = f"{got.dtype} {list(got.shape)} instead of {expected.dtype} {list(expected.shape)}"
        return OutputCheck(graph, output, tolerance, math.nan, "shape", dict(sizes), detail)
    wide = expected.astype(np.float64)
    difference = float(np.abs(got - wide).max(initial=0))
    if not levels and difference > 0:
        difference /= float(np.abs(wide).max(initial=0)) or 1.0
    failure: Literal["value"] | None = None if difference <= tolerance else "value"  # NaN is no success
    return OutputCheck(graph, output, tolerance, difference, failure, dict(sizes))


def _signature_difference(graph: GraphSpec, declared: Any) -> str:
    """How the manifest's inputs and outputs differ from the module's, or nothing."""
    for side, ours, theirs in (
        ("input", graph.inputs, declared.inputs),
        ("output", graph.outputs, declared.outputs),
    ):
        expected = {t.name: (t.dtype, tuple(t.shape)) for t in ours}
        found = {t.name: (t.dtype, tuple(t.shape)) for t in theirs}
        for name in dict.fromkeys((*expected, *found)):
            if expected.get(name) != found.get(name):
                return f"{side} {name!r} is {found.get(name)}, the checkpoint's is {expected.get(name)}"
    return ""


def _sizes(graph: GraphSpec, axes: Mapping[str, Axis]) -> Iterator[dict[str, int]]:
    """Sizes of the graph's axes to try: one sample and two, several sizes, shared deltas and own ones."""
    used = {d for t in (*graph.inputs, *graph.outputs) for d in t.shape if isinstance(d, str)}
    tried: list[dict[str, int]] = []
    for batch, shared, units in ((1, True, (2, 3)), (2, True, (4, 2)), (2, False, (3, 4))):
        roots: dict[str, int] = {}
        free = 0  # free axes take different sizes, so that one is not taken for another
        for name, axis in axes.items():
            if axis.of is not None or axis.one_or is not None:
                continue
            if name == "batch":
                roots[name] = min(max(batch, axis.min), axis.max)
                continue
            least = -(-axis.min // axis.multiple)
            size = max(least, units[free % 2]) * axis.multiple
            roots[name] = min(size, axis.max // axis.multiple * axis.multiple)
            free += 1
        for name, axis in axes.items():
            if axis.one_or is not None:
                roots[name] = 1 if shared else roots[axis.one_or]
        sizes = {name: _size(name, axes, roots) for name in axes}
        chosen = {name: size for name, size in sizes.items() if name in used}
        if chosen not in tried:
            tried.append(chosen)
            yield chosen


def _size(name: str, axes: Mapping[str, Axis], roots: Mapping[str, int]) -> int:
    axis = axes[name]
    return roots[name] if axis.of is None else _size(axis.of, axes, roots) // axis.divide


class _Inputs:
    """Random inputs of a graph, of the kind that a request has: token ids are those of prompts."""

    def __init__(self, bundle: Bundle, graph: GraphSpec):
        self._bundle, self._graph = bundle, graph
        self._random = np.random.default_rng(SEED)
        call = next(call for call in bundle.manifest.program if call.graph == graph.name)
        provided = bundle.manifest.tensors
        self._provided: dict[str, ProvidedTensor] = {
            name: provided[tensor]
            for name, tensor in bundle.manifest.reads(call).items()
            if tensor in provided
        }

    def draw(self, sizes: Mapping[str, int]) -> dict[str, Array]:
        """Arrays by input name."""
        return {
            tensor.name: self._one(
                tensor.name,
                np.dtype(tensor.dtype),
                tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape),
            )
            for tensor in self._graph.inputs
        }

    def _one(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        return np.asarray(self._values(name, dtype, shape), dtype)

    def _values(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        provided = self._provided.get(name)
        if provided is not None and provided.source in ("text", "mask"):
            return self._text(provided, shape[0])
        if provided is not None and provided.column is not None:
            return self._row(provided.column)
        if provided is not None and provided.source in ("gate", "guidance"):
            return self._random.uniform(0.5, 2.0, shape)
        if dtype == np.uint8:
            return self._random.integers(0, 256, shape, np.uint8)
        # The deltas of a trained generator are small beside the weights.
        scale = 0.1 if name.endswith((".lora_A", ".lora_B")) else 1.0
        return self._random.standard_normal(shape) * scale

    def _text(self, provided: ProvidedTensor, batch: int) -> Array:
        from hywu_runtime.text import PromptEncoder

        manifest = self._bundle.manifest
        text = manifest.tensors[provided.of] if provided.of is not None else provided
        entry = manifest.tokenizers[text.tokenizer or ""]
        ids, mask = PromptEncoder(self._bundle.file(entry.file), entry).encode(PROMPTS[:batch])
        return mask if provided.source == "mask" else ids

    def _row(self, column: str) -> Array:
        """A value that the schedule holds: of the row in its middle."""
        from hywu_runtime.schedule import Schedule

        section = self._bundle.manifest.schedules
        assert section is not None  # the manifest's reader has checked it
        rows = Schedule(self._bundle.file(section.file), section).rows()
        values: Array = np.asarray(getattr(rows, column))
        return values if column == "initial_scale" else values[len(rows) // 2]


def _check_edit(bundle: Bundle, family: Family) -> EditCheck:
    import torch

    from hywu_export.families.base import ReferenceEdit
    from hywu_export.passes.quiet import quiet
    from hywu_runtime.backends import create_backend
    from hywu_runtime.editor import Editor
    from hywu_runtime.program import resolve_shape
    from hywu_runtime.schedule import Schedule

    manifest = bundle.manifest
    policy, section = manifest.image, manifest.schedules
    assert policy is not None
    assert section is not None
    rows = Schedule(bundle.file(section.file), section)
    steps = min(rows.accepted(section.default), key=lambda n: abs(n - EDIT_STEPS))
    evaluations = len(rows.rows(section.default, steps))
    side = min(EDIT_SIDE, math.isqrt(policy.default_area)) // policy.multiple * policy.multiple
    side = min(
        max(side, -(-policy.min // policy.multiple) * policy.multiple),
        policy.max // policy.multiple * policy.multiple,
    )
    random = np.random.default_rng(SEED)
    photo = (
        random.integers(0, 256, (-(-side // 4), -(-side // 4), 3), np.uint8)
        .repeat(4, 0)
        .repeat(4, 1)[:side, :side]
    )
    axes = {"batch": 1}
    for name, axis in manifest.axes.items():
        axes[name] = side // (axis.divide or 1) if axis.of is not None else axes.get(name, side)
    (drawn,) = (name for name, tensor in manifest.tensors.items() if tensor.draw == "initial")
    shape = resolve_shape(manifest, drawn, axes)
    latents = random.standard_normal(shape).astype(np.float32)
    draws = torch.Generator().manual_seed(SEED)
    noise = np.stack([torch.randn(shape, generator=draws).numpy() for _ in range(evaluations)])
    guidance = {scale.name: scale.default for scale in manifest.guidance}
    replaced = base_prompt(manifest)
    prompt = PROMPTS[0] if replaced is None else replaced
    with quiet():
        expected = family.reference_edit(
            ReferenceEdit(photo, prompt, section.default, steps, latents, SEED, guidance)
        )
    with Editor(bundle, create_backend("ort-cpu")) as editor:
        got = editor.edit(
            photo, PROMPTS[0], steps=steps, guidance=guidance, delta_strength=0, latents=latents, noise=noise,
            size=(side, side), output="array",
        )  # fmt: skip
    assert isinstance(got, np.ndarray)  # as `output` asks
    if got.shape != expected.shape:
        return EditCheck(None, 255, section.default, steps, (side, side), "shape")
    difference = got.astype(np.int16) - expected.astype(np.int16)
    squared = float(np.mean(np.square(difference, dtype=np.float64)))
    psnr = 10 * math.log10(255**2 / squared) if squared else None
    largest = int(np.abs(difference).max(initial=0))
    return EditCheck(
        psnr, largest, section.default, steps, (side, side), "value" if largest > LEVELS else None
    )
