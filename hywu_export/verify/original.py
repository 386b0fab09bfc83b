"""The torch side: every graph's module with the weights of the checkpoints, and the diffusers pipeline."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hywu_export.invariants import PREFIX
from hywu_export.verify.inputs import PROMPTS, SEED, RandomInputs, sizes_to_try
from hywu_export.verify.measures import LEVEL, TILED, TORCH, Check, TensorCheck
from hywu_export.verify.pictures import edit_side, edit_steps
from hywu_runtime.bundle import Bundle
from hywu_runtime.errors import UnsupportedError
from hywu_runtime.manifest import Graph, Manifest

if TYPE_CHECKING:
    from hywu_export.bundle.weights import WeightSource
    from hywu_export.families.base import Family, Plan
    from hywu_export.families.generator import GeneratorPart
    from hywu_export.tracing import GraphSpec

PART = "torch"


class Original:
    """The torch side of a bundle: its plan, rebuilt from the checkpoints by what the manifest says."""

    def __init__(self, bundle: Bundle, base: Path | None, generator: Path | None):
        from hywu_export.deltas import DeltaSpec
        from hywu_export.exporter import make_plan
        from hywu_export.families import open_base
        from hywu_export.families.base import Limits
        from hywu_export.families.generator import GeneratorPart
        from hywu_runtime.codec import encode

        manifest = bundle.manifest
        self.family: Family | None = None if base is None else open_base(base)
        part: GeneratorPart | None = None if generator is None else GeneratorPart(generator)
        spec = None if manifest.deltas is None else DeltaSpec.from_manifest(encode(manifest.deltas))
        policy, batch = manifest.image, manifest.axes["batch"].max
        limits = Limits(
            batch or 1,
            policy.max if policy is not None else None,
            policy.default_area if policy is not None else None,
            text_length(manifest),
            _tile(bundle),
            photo_count(manifest),
        )
        rows = [t.shape[0] for t in manifest.tensors.values() if t.column == "coefficients"]
        width = rows[0] if rows and isinstance(rows[0], int) else 0
        reads = {value.name for graph in manifest.graphs.values() for value in graph.inputs}
        unread = [t.module for t in (spec.targets if spec is not None else ()) if t.a_name not in reads]
        self.plan: Plan = make_plan(self.family, part, spec, limits, base_prompt(manifest), width, unread)
        self.weights: dict[str, WeightSource] = {}
        if self.family is not None:
            self.weights |= {name: component.tensors for name, component in self.family.components.items()}
        if part is not None:
            self.weights.update(part.weights)


def _tile(bundle: Bundle) -> int | None:
    """The side of the VAE's tiles, which its graph knows alone."""
    import onnx_ir as ir

    from hywu_export.tracing.spec import TILE

    last = {call.graph for call in bundle.manifest.program if call.phase == "final"}
    found = (ir.load(bundle.file(bundle.manifest.graphs[name].file)).metadata_props for name in last)
    return next((int(properties[TILE]) for properties in found if TILE in properties), None)


def base_prompt(manifest: Manifest) -> str | None:
    """What the base is told instead of the instruction; None if it is told the instruction."""
    texts = (t.constant for name, t in manifest.tensors.items() if name.startswith("base_prompt."))
    return next((text for text in texts if text is not None), None)


def photo_count(manifest: Manifest) -> int:
    """How many photos a request has."""
    return 1 + max((t.index or 0 for t in manifest.tensors.values() if t.source == "image"), default=0)


def text_length(manifest: Manifest) -> int | None:
    """Tokens of a prompt, where the pipeline leaves them open."""
    from hywu_export.families.base import LONG_TEXT

    entry = manifest.tokenizers.get(LONG_TEXT)
    return entry.max_length if entry is not None else None


def check_graph(bundle: Bundle, graph: GraphSpec, original: Original) -> Check:
    """One graph against the module that it was traced from, on random inputs of several sizes."""
    import torch

    from hywu_export.passes.quiet import quiet
    from hywu_export.tracing.loading import with_weights
    from hywu_runtime.backends.onnxruntime import OnnxRuntime

    parts = _parts(bundle.manifest, graph.name)
    if not parts:
        raise UnsupportedError(
            f"The bundle has no graph {graph.name!r}",
            "Expected the graphs that this version makes of these checkpoints",
            "Export the bundle again with this version",
        )
    checks = {
        tensor.name: TensorCheck(tensor.name, LEVEL if tensor.dtype == "uint8" else TORCH)
        for tensor in graph.outputs
    }
    wrong = _signature_difference(graph, _whole(parts.values()))
    if wrong:
        failed = (replace(check, failure="shape", detail=wrong) for check in checks.values())
        return Check(PART, graph.name, tuple(failed))
    backend = OnnxRuntime("ort-cpu", 0, None)
    sessions = {
        part: backend.load(bundle.file(declared.file), bundle.initializers(declared.file))
        for part, declared in parts.items()
    }
    inputs = RandomInputs(bundle, graph, parts)
    with quiet(), with_weights(graph.module, original.weights), torch.no_grad():
        for sizes in sizes_to_try(graph, original.plan.axes):
            arrays = inputs.draw(sizes)
            made = graph.module(*(torch.from_numpy(arrays[tensor.name]) for tensor in graph.inputs))
            got = dict(arrays)
            for part, session in sessions.items():
                got |= session.run({value.name: got[value.name] for value in parts[part].inputs})
            for tensor, expected in zip(graph.outputs, made):
                name = tensor.name
                checks[name] = checks[name].seen(got[name], expected.numpy(), sizes)
    return Check(PART, graph.name, tuple(checks.values()))


def _parts(manifest: Manifest, name: str) -> dict[str, Graph]:
    """What a graph was parted into, in order: work of once per request, then stages."""
    parts: dict[str, Graph] = {}
    for part in (PREFIX + name, name):
        if part in manifest.graphs:
            parts[part] = manifest.graphs[part]
        stages = {stage: graph for stage, graph in manifest.graphs.items() if graph.stage_of == part}
        parts |= dict(sorted(stages.items(), key=lambda item: item[1].stage))
    return parts


def _whole(parts: Collection[Graph]) -> Graph:
    """The signature of parts as one graph: without what they give to each other."""
    made = {value.name for part in parts for value in part.outputs}
    inputs = {value.name: value for part in parts for value in part.inputs}
    crossing = made & inputs.keys()
    return Graph(
        "",
        tuple(value for name, value in inputs.items() if name not in made),
        tuple(value for part in parts for value in part.outputs if value.name not in crossing),
    )


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


def check_edit(bundle: Bundle, family: Family) -> Check:
    """A whole edit without deltas against the pipeline's own, on the same noise.

    The pipeline's VAE sees the picture as a whole, whatever the bundle's does.
    """
    import torch

    from hywu_export.families.base import ReferenceEdit
    from hywu_export.passes.quiet import quiet
    from hywu_runtime.backends import create_backend
    from hywu_runtime.editor import Editor
    from hywu_runtime.images import working_size
    from hywu_runtime.program import resolve_shape
    from hywu_runtime.schedule import Schedule

    manifest = bundle.manifest
    policy, section = manifest.image, manifest.schedules
    assert policy is not None
    assert section is not None
    rows = Schedule(bundle.file(section.file), section)
    steps = edit_steps(bundle)
    evaluations = len(rows.rows(section.default, steps))
    side = edit_side(policy)
    random = np.random.default_rng(SEED)
    sizes = [(side, side)]  # the last photo's; the others are worked on at their own choice of a size
    sizes = [working_size(side, side, policy)] * (photo_count(manifest) - 1) + sizes
    photos = [
        random.integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
        .repeat(4, 0)
        .repeat(4, 1)[:height, :width]
        for width, height in sizes
    ]
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
            ReferenceEdit(
                photos[0],
                prompt,
                section.default,
                steps,
                latents,
                SEED,
                guidance,
                strength=None if section.strength is None else section.strength.default,
                text_length=text_length(manifest),
                more_photos=tuple(photos[1:]),
            )
        )
    with Editor(bundle, create_backend("ort-cpu")) as editor:
        got = editor.edit(
            photos, PROMPTS[0], steps=steps, guidance=guidance, delta_strength=0, latents=latents,
            noise=noise, size=(side, side), output="array",
        )  # fmt: skip
    assert isinstance(got, np.ndarray)  # as `output` asks
    tolerance = LEVEL if _tile(bundle) is None else TILED
    check = TensorCheck("picture", tolerance).seen(got, expected, {"height": side, "width": side})
    return Check(PART, f"edit without deltas, {section.default}, {steps} steps", (check,))
