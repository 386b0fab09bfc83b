"""The ways to run an edit whose LoRA changes from request to request.

``edit(number)`` brings in the LoRA ``number``, if another one is in, and edits the subject's photo;
``picture`` is what the last edit made. Times are what the peer's own clock says, in seconds:

    swap          what bringing in the LoRA took, before the first step
    first, steady the first step, and the median of the others
    edit          the whole call, without the swap

A peer without pictures has ``swap``, ``first`` and ``steady`` alone. All make the same steps of the same
model, in float32, on the same number of threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bench.generators import Eager, Exported
from bench.subjects import PROMPT, Subject

GUIDANCE, IMAGE_GUIDANCE = 7.5, 1.5
Times = dict[str, float]


class Peer(Protocol):
    """What a worker runs."""

    picture: npt.NDArray[np.uint8] | None

    def edit(self, number: int) -> Times: ...


class Ours:
    """This project: deltas are inputs of the graph."""

    def __init__(
        self,
        subject: Subject,
        mode: str = "low-rank",
        batch: int = 1,
        sets: int = 1,
        variant: str | None = None,
    ):
        from hywu_export.benchmark.stages import stages_of
        from hywu_runtime import Deltas, Editor

        self.subject, self.batch = subject, batch
        self.picture: npt.NDArray[np.uint8] | None = None
        self.editor = Editor.load(
            subject.bundles[mode],
            "ort-cpu",
            variant=variant,
            threads=subject.threads,
            sources={"base": str(subject.base)},
        )
        one = [Deltas(subject.deltas(number)) for number in range(2 * sets)]
        self.sets = [one[:sets] if sets > 1 else one[0], one[sets:] if sets > 1 else one[1]]
        self.photo, self.latents = subject.photo(), subject.latents(batch)
        self.stage_of = stages_of(self.editor.bundle.manifest, guided=True)

    def edit(self, number: int) -> Times:
        start = time.perf_counter()
        pictures = self.editor.edit_batch(
            [(self.photo, PROMPT)] * self.batch, steps=self.subject.steps, deltas=self.sets[number],
            latents=self.latents, size=(self.subject.side,) * 2, guidance=GUIDANCE,
            image_guidance=IMAGE_GUIDANCE, sampler="euler", seed=0, output="array",
        )  # fmt: skip
        whole = time.perf_counter() - start
        self.picture = np.asarray(pictures[0])
        timings = self.editor.timings
        prepare = sum(t for name, t in timings.graphs.items() if self.stage_of[name] == "prepare")
        return {
            "swap": timings.bind + prepare,
            "first": timings.steps[0],
            "steady": statistics.median(timings.steps[1:]),
            "edit": whole,  # deltas come in with the call: the swap is in it
        }


class Pipeline:
    """diffusers' pipeline with the LoRA in PEFT: taken out and loaded anew, or swapped in place."""

    def __init__(self, subject: Subject, hotswap: bool = False, compiled: bool = False):
        import torch
        from diffusers import EulerDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

        torch.set_num_threads(subject.threads)
        self.torch, self.subject, self.hotswap = torch, subject, hotswap
        self.picture: npt.NDArray[np.uint8] | None = None
        self.pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            subject.base, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        )
        self.pipe.scheduler = EulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.sets = [_state_dict(subject.deltas(number)) for number in range(2)]
        self.loaded: int | None = None
        from PIL import Image

        self.photo = Image.fromarray(subject.photo())
        self.latents = torch.from_numpy(subject.latents())
        self._load(0)
        if compiled:
            self.pipe.unet.compile()

    def _load(self, number: int) -> None:
        unet = self.pipe.unet
        swap = self.hotswap and self.loaded is not None
        if self.loaded is not None and not swap:
            unet.delete_adapters("lora")
        unet.load_lora_adapter(dict(self.sets[number]), prefix=None, adapter_name="lora", hotswap=swap)
        self.loaded = number

    def edit(self, number: int) -> Times:
        start = time.perf_counter()
        if self.loaded != number:
            self._load(number)
        begin = time.perf_counter()
        marks: list[float] = []

        def mark(*_: Any) -> dict[str, Any]:
            marks.append(time.perf_counter())
            return {}

        # The first mark is before the first step: the pipeline asks the scheduler for its timesteps there.
        scheduler = self.pipe.scheduler
        scale, steps = scheduler.scale_model_input, self.subject.steps

        def scaled(*arguments: Any) -> Any:
            if not marks:
                mark()
            return scale(*arguments)

        scheduler.scale_model_input = scaled
        try:
            with self.torch.no_grad():
                made = self.pipe(
                    PROMPT, image=self.photo, num_inference_steps=steps, guidance_scale=GUIDANCE,
                    image_guidance_scale=IMAGE_GUIDANCE, latents=self.latents.clone(), output_type="np",
                    callback_on_step_end=mark,
                )  # fmt: skip
        finally:
            del scheduler.scale_model_input
        end = time.perf_counter()
        self.picture = (255 * made.images[0]).round().astype(np.uint8)
        passed = np.diff(marks)
        return {
            "swap": begin - start,
            "first": float(passed[0]),
            "steady": float(np.median(passed[1:])),
            "edit": end - begin,
        }


class OrtAdapter:
    """ONNX Runtime's own LoRA support, as Olive uses it: an adapter file, mapped and handed to every run.

    The graph is that of this project. Its delta inputs have zeros as defaults, which the adapter replaces:
    without defaults ONNX Runtime asks for them among the inputs.
    """

    picture = None

    def __init__(self, subject: Subject):
        import onnx
        import onnxruntime

        from hywu_runtime import Bundle
        from hywu_runtime.backends.onnxruntime import OnnxRuntime

        self.subject, self.ort = subject, onnxruntime
        bundle = Bundle.open(subject.bundles["low-rank"], sources={"base": str(subject.base)})
        file = bundle.graph_file("step")
        model = onnx.load(bundle.file(file), load_external_data=False)
        read = set()
        for value in model.graph.input:
            if ".lora_" in value.name:
                read.add(value.name)
                shape = [d.dim_value or 1 for d in value.type.tensor_type.shape.dim]
                zeros = np.zeros(shape, np.float32)
                model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, value.name))
        graph = Path(f"{subject.bundles['low-rank']}.adaptable.onnx")
        graph.write_bytes(model.SerializeToString())
        backend = OnnxRuntime("ort-cpu", 0, subject.threads)
        self.session = backend.load(graph, bundle.initializers(file))._session
        self.feeds = step_inputs(bundle, subject, deltas=False)
        self.files = [Path(f"{subject.bundles['low-rank']}.{number}.onnx_adapter") for number in range(2)]
        for number, path in enumerate(self.files):
            adapter = onnxruntime.AdapterFormat()
            adapter.set_adapter_version(1)
            adapter.set_model_version(1)
            adapter.set_parameters(
                {
                    name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
                    for name, array in subject.deltas(number).items()
                    if name in read
                }
            )
            adapter.export_adapter(str(path))
        self.loaded: int | None = None

    def edit(self, number: int) -> Times:
        start = time.perf_counter()
        if self.loaded != number:
            self.adapter = self.ort.LoraAdapter()
            self.adapter.Load(str(self.files[number]))
            self.options = self.ort.RunOptions()
            self.options.add_active_adapter(self.adapter)
            self.loaded = number
        swap = time.perf_counter() - start
        steps = [
            _timed(lambda: self.session.run(None, self.feeds, self.options))
            for _ in range(self.subject.steps)
        ]
        return {"swap": swap, "first": steps[0], "steady": statistics.median(steps[1:])}


class NewSession:
    """Merge the LoRA into the weights, and make a session of the plain graph with them: a rebuild."""

    picture = None

    def __init__(self, subject: Subject):
        import onnx

        from hywu_export.benchmark.plain import without_deltas
        from hywu_runtime import Bundle

        self.subject = subject
        self.loaded: int | None = None
        self.bundle = Bundle.open(subject.bundles["low-rank"], sources={"base": str(subject.base)})
        file = self.bundle.graph_file("step")
        plain = without_deltas(onnx.load(self.bundle.file(file), load_external_data=False))
        self.graph = Path(f"{subject.bundles['low-rank']}.plain.onnx")
        self.graph.write_bytes(plain.SerializeToString())
        names = {initializer.name for initializer in plain.graph.initializer}
        self.weights = {n: w for n, w in self.bundle.initializers(file).items() if n in names}
        read = {value.name for value in plain.graph.input}
        self.feeds = {n: a for n, a in step_inputs(self.bundle, subject, deltas=False).items() if n in read}
        self.session: Any = None

    def edit(self, number: int) -> Times:
        from hywu_runtime.backends.onnxruntime import OnnxRuntime
        from hywu_runtime.bundle import Weight

        start = time.perf_counter()
        if self.loaded != number:
            self.session = None
            weights, deltas = dict(self.weights), self.subject.deltas(number)
            start = time.perf_counter()
            for name in [n for n in deltas if n.endswith(".lora_A")]:
                module = name.removesuffix(".lora_A")
                weight = next((n for n in weights if n.endswith(f"{module}.weight")), None)
                if weight is None:  # its product left the step, with the text's keys and values
                    continue
                held = weights[weight]
                old = held.data.view(held.dtype).reshape(held.shape)  # float32, or float16 of the demo
                new = (old + deltas[f"{module}.lora_B"][0] @ deltas[name][0]).astype(held.dtype)
                weights[weight] = Weight(new.reshape(-1).view(np.uint8), held.dtype, held.shape)
            backend = OnnxRuntime("ort-cpu", 0, self.subject.threads)
            self.session = backend.load(self.graph, weights)
            self.loaded = number
        swap = time.perf_counter() - start
        steps = [_timed(lambda: self.session.run(self.feeds)) for _ in range(self.subject.steps)]
        return {"swap": swap, "first": steps[0], "steady": statistics.median(steps[1:])}


def step_inputs(bundle: Any, subject: Subject, deltas: bool) -> dict[str, npt.NDArray[Any]]:
    """Random inputs of the step's graph at the subject's size; scalars are 1."""
    from hywu_runtime.program import resolve_axes, resolve_shape

    manifest = bundle.manifest
    axes = resolve_axes(manifest, 1, {manifest.image.tensor: subject.photo()[None]})
    call = next(c for c in manifest.program if c.graph == "step")
    rng = np.random.default_rng(0)
    feeds = {}
    for value in manifest.graphs["step"].inputs:
        if not deltas and ".lora_" in value.name:
            continue
        shape = resolve_shape(manifest, call.inputs.get(value.name, value.name), axes)
        made = 0.1 * rng.standard_normal(shape) if shape else np.ones(())
        feeds[value.name] = np.asarray(made, value.dtype)
    return feeds


def _state_dict(deltas: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Deltas under PEFT's names, without an alpha: the scale is 1."""
    import torch

    return {f"{name}.weight": torch.from_numpy(array[0].copy()) for name, array in deltas.items()}


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


PEERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "low-rank": (Ours, {}),
    "winograd": (Ours, {"mode": "winograd"}),
    "int8": (Ours, {"mode": "winograd", "variant": "int8"}),
    "merged": (Ours, {"mode": "merged"}),
    "peft": (Pipeline, {}),
    "hotswap": (Pipeline, {"hotswap": True}),
    "compiled": (Pipeline, {"hotswap": True, "compiled": True}),
    "ort-adapter": (OrtAdapter, {}),
    "new-session": (NewSession, {}),
    "batch-one-set": (Ours, {"batch": 4}),
    "batch-four-sets": (Ours, {"batch": 4, "sets": 4}),
}
GENERATORS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "generator": (Exported, {}),
    "generator-eager": (Eager, {}),
    "generator-plain": (Exported, {"plain": True}),
}
