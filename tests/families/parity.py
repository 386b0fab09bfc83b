"""The parity kit: a family's bundle against its diffusers pipeline, with and without deltas.

A family's tests say in a `Case` how a tiny random pipeline is made and how it is called; the rest is here:

    CASE = Case("sdxl", "StableDiffusionXLInstructPix2PixPipeline", make_base, call)

    @pytest.fixture(scope="module")
    def parity(once):
        with Parity(CASE, once) as parity:
            yield parity

    def test_without_deltas(parity):
        parity.check(parity.request(["a cat"], negative=["ugly"]))

    def test_with_deltas(parity):
        parity.check(parity.request(["a cat"]), parity.deltas())

Pictures are compared in levels of uint8. What differs by more than `SAME` is another picture; a test that
says nothing because deltas, prompts or guidance change nothing fails (`CHANGED`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hywu_export import ExportOptions, export
from hywu_runtime import Deltas, Editor, Manifest
from hywu_runtime.engines import sides
from hywu_runtime.program import resolve_shape
from hywu_runtime.schedule import Schedule

SAME = 1
"""Levels by which equal pictures may differ: values on either side of a rounding edge."""
CHANGED = 20
"""Levels by which a picture must differ, somewhere, from one without the deltas, or of other prompts."""

Once = Callable[[str, Callable[[Path], None]], Path]


def photos(count: int, height: int = 32, width: int = 32, seed: int = 0) -> list[np.ndarray]:
    """Coarse random pictures, uint8 [H, W, 3]: large areas, edges, every brightness."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, -(-height // 4), -(-width // 4), 3), np.uint8)
    return list(coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width])


def draws(count: int, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """What a ``torch.Generator`` gives a pipeline that asks ``count`` times for noise of ``shape``."""
    generator = torch.Generator().manual_seed(seed)
    return np.stack([torch.randn(tuple(shape), generator=generator).numpy() for _ in range(count)])


def largest(got: Sequence[Any], expected: Sequence[Any]) -> int:
    """The largest difference between pictures, in levels."""
    assert [np.shape(picture) for picture in got] == [np.shape(picture) for picture in expected]
    return max(int(np.abs(np.int16(a) - np.int16(b)).max()) for a, b in zip(got, expected))


def random_deltas(
    spec: Any, seed: int = 0, scale: float = 0.3, rank: int | None = None, batch: int = 1
) -> Deltas:
    """Deltas for a manifest's ``deltas`` that change the picture; B is scaled, A is of unit size."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in spec.tensors.items():
        if name.endswith(".lora_A"):
            sizes, size = (rank or shape[0], *shape[1:]), 1 / np.sqrt(np.prod(shape[1:]))
        else:
            sizes, size = (shape[0], rank or shape[1]), scale
        tensors[name] = (rng.standard_normal((batch, *sizes)) * size).astype(np.float32)
    return Deltas(tensors)


@dataclass(frozen=True)
class Request:
    """One request, for the bundle and for the pipeline.

    Attributes:
        prompts, photos: one per sample; an entry of ``photos`` is whatever `Editor.edit_batch` takes.
        negative: negative prompts, one per sample; None gives none.
        steps, guidance: as for the editor; all scales of the bundle.
        latents: float32 as the bundle's initial noise, standard normal.
        noise_seed: of the ``torch.Generator`` from which the pipeline's scheduler draws.
        sampler: the bundle's name for it.
        options: further arguments of the editor, by its names; `Case.call` gives them to the pipeline.
    """

    prompts: Sequence[str]
    photos: Sequence[Any]
    negative: Sequence[str] | None
    steps: int
    guidance: Mapping[str, float]
    latents: np.ndarray
    noise_seed: int
    sampler: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the edited picture."""
        first = self.photos[0]
        height, width, _ = (first if isinstance(first, np.ndarray) else first[0]).shape
        return width, height

    @property
    def pictures(self) -> list[Any]:
        """The photos as PIL images."""
        from PIL import Image

        return [
            Image.fromarray(photo)
            if isinstance(photo, np.ndarray)
            else [Image.fromarray(one) for one in photo]
            for photo in self.photos
        ]

    @property
    def generator(self) -> torch.Generator:
        """A new one, for the pipeline."""
        return torch.Generator().manual_seed(self.noise_seed)


@dataclass(frozen=True)
class Case:
    """A family under test.

    Attributes:
        name: unique among the tests.
        pipeline: class of diffusers.
        make_base: writes a tiny random pipeline into a folder.
        call: what the pipeline makes of a request: uint8 ``[H, W, 3]`` per sample.
        options: of the export.
        more: further bundles of this pipeline: name → what of ``options`` is different. Graphs must not be,
            but for tiles: each is traced once for each size of its tiles.
        load: further arguments of ``from_pretrained``.
        denoiser: the component whose targets have no prefix.
        scale: of random deltas, so that they change the picture.
    """

    name: str
    pipeline: str
    make_base: Callable[[Path], None]
    call: Callable[[Any, Request], Sequence[np.ndarray]]
    options: ExportOptions = field(
        default_factory=lambda: ExportOptions(max_rank=4, max_steps=8, max_batch=2)
    )
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    denoiser: str = "unet"
    scale: float = 0.3


class Parity:
    """A case's pipeline and bundle, made once per test run, and compared."""

    def __init__(self, case: Case, once: Once):
        self.case = case
        self.base = once(f"{case.name}_base", case.make_base)
        self.bundles = once(f"{case.name}_bundles", self._export)
        self.bundle = self.bundles / "own"
        self.manifest = Manifest.read(self.bundle)
        self._editor: Editor | None = None
        self._plain: Any = None

    def _export(self, folder: Path) -> None:
        folder.mkdir()
        bundles = {"own": {}, "linked": {"link_weights": True}, **self.case.more}
        with _traced_once():
            for name, changes in bundles.items():
                export(folder / name, self.base, options=replace(self.case.options, **changes))

    def __enter__(self) -> Parity:
        return self

    def __exit__(self, *_: object) -> None:
        if self._editor is not None:
            self._editor.close()

    @property
    def editor(self) -> Editor:
        """The bundle, opened once."""
        if self._editor is None:
            self._editor = Editor.load(self.bundle, "ort-cpu")
        return self._editor

    @property
    def plain(self) -> Any:
        """The pipeline, opened once. Tests do not change it."""
        if self._plain is None:
            self._plain = self.pipeline()
        return self._plain

    def pipeline(self) -> Any:
        """The pipeline, opened anew, to put adapters into."""
        import diffusers

        pipe = getattr(diffusers, self.case.pipeline).from_pretrained(self.base, **self.case.load)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def request(
        self,
        prompts: Sequence[str],
        photos_: Sequence[Any] | None = None,
        *,
        size: tuple[int, int] = (32, 32),
        negative: Sequence[str] | None = None,
        steps: int = 2,
        guidance: Mapping[str, float] | None = None,
        seed: int = 7,
        sampler: str | None = None,
        **options: Any,
    ) -> Request:
        """A request for every prompt; without ``photos_``, random ones of ``size``, width and height."""
        width, height = size
        section = self.manifest.schedules
        assert section is not None
        request = Request(
            prompts=prompts,
            photos=photos(len(prompts), height, width, seed) if photos_ is None else photos_,
            negative=negative,
            steps=steps,
            guidance={scale.name: scale.default for scale in self.manifest.guidance} | dict(guidance or {}),
            latents=np.empty(0),
            noise_seed=seed + 1,
            sampler=sampler or section.default,
            options=options,
        )
        return replace(request, latents=draws(1, self._noise_shape(request), seed)[0])

    def edit(
        self,
        request: Request,
        deltas: Deltas | Sequence[Deltas] | None = None,
        strength: float | Sequence[float] = 1.0,
        editor: Editor | None = None,
    ) -> list[np.ndarray]:
        """What the bundle makes of a request; without deltas, at strength 0."""
        editor = editor or self.editor
        section = self.manifest.schedules
        assert section is not None
        noise = None
        if section.samplers[request.sampler].stochastic:
            schedule = Schedule(editor.bundle.file(section.file), section)
            part = request.options.get("strength")
            evaluations = len(schedule.rows(request.sampler, request.steps, part))
            noise = draws(evaluations, self._noise_shape(request), request.noise_seed)
        made: list[Any] = editor.edit_batch(
            list(zip(request.photos, request.prompts)),
            negative_prompt=list(request.negative or [""] * len(request.prompts)),
            steps=request.steps,
            guidance=dict(request.guidance),
            deltas=deltas,
            delta_strength=strength if deltas is not None else 0.0,
            sampler=request.sampler,
            size=request.size,
            latents=request.latents,
            noise=noise,
            output="array",
            **request.options,
        )
        return made

    def expected(self, request: Request, pipe: Any = None) -> list[np.ndarray]:
        """What the pipeline makes of a request, on the same noise."""
        from hywu_export.schedules import make_scheduler

        pipe = self.plain if pipe is None else pipe
        section = self.manifest.schedules
        assert section is not None
        own = pipe.scheduler
        if request.sampler != section.default:
            pipe.scheduler = make_scheduler(request.sampler, own.config)
        try:
            with torch.no_grad():
                return [np.asarray(picture) for picture in self.case.call(pipe, request)]
        finally:
            pipe.scheduler = own

    def deltas(self, seed: int = 0, scale: float | None = None, rank: int | None = None) -> Deltas:
        """Random ones that change the picture."""
        return random_deltas(self.manifest.deltas, seed, scale or self.case.scale, rank)

    def adapted(self, *adapters: tuple[Mapping[str, np.ndarray], float]) -> Any:
        """The pipeline with deltas of D = 1 put into it by PEFT, each with its strength."""
        pipe = self.pipeline()
        for number, (deltas, strength) in enumerate(adapters):
            add_adapter(pipe, self.case.denoiser, deltas, f"adapter{number}", strength)
        return pipe

    def check(
        self, request: Request, deltas: Deltas | None = None, strength: float = 1.0
    ) -> list[np.ndarray]:
        """The bundle's pictures are the pipeline's: without deltas, or with PEFT's layers. Returns them."""
        got = self.edit(request, deltas, strength)
        pipe = None if deltas is None else self.adapted((deltas, strength))
        assert largest(got, self.expected(request, pipe)) <= SAME
        if deltas is not None:
            assert largest(got, self.edit(request)) > CHANGED, "the deltas change nothing"
        return got

    def check_per_sample(self, request: Request, strengths: Sequence[float] = (1.0, 0.5)) -> None:
        """Every sample of a batch has deltas and a strength of its own."""
        sets = [self.deltas(seed) for seed in range(1, 1 + len(request.prompts))]
        got = self.edit(request, sets, strengths)
        for sample, (deltas, strength) in enumerate(zip(sets, strengths)):
            expected = self.expected(request, self.adapted((deltas, strength)))
            assert largest([got[sample]], [expected[sample]]) <= SAME

    def check_lora_file(self, request: Request, folder: Path) -> None:
        """Deltas saved as diffusers saves a LoRA, read back by its ``load_lora_weights``."""
        deltas = self.deltas(seed=5)
        save_lora(self.case.denoiser, deltas, folder)
        pipe = self.pipeline()
        pipe.load_lora_weights(folder)
        got = self.edit(request, deltas)
        assert largest(got, self.expected(request, pipe)) <= SAME
        assert largest(got, self.edit(request)) > CHANGED, "the deltas change nothing"

    def check_verify(self, bundle: str = "own") -> None:
        """``hywu verify BUNDLE --base DIR`` finds every graph and a whole edit as they should be."""
        from hywu_export.verify import verify

        report = verify(self.bundles / bundle, self.base)
        assert report.failure is None, [check for check in report.checks if check.failure is not None]
        graphs = self.manifest.graphs
        parts = {f"prepare_{name}" for name in graphs} & set(graphs)  # checked with what they prepare
        assert {check.name for check in report.checks} > set(graphs) - parts  # the edit is one more

    def check_linked(self, request: Request) -> None:
        """Exported with links to the checkpoint in place of weights, it makes the same bytes."""
        manifest = Manifest.read(self.bundles / "linked")
        places = {
            (tensor.file, tensor.offset): tensor.length
            for graph in manifest.linked.values()
            for tensor in graph.values()
        }
        stored = sum(path.stat().st_size for path in self.base.rglob("*.safetensors"))
        assert sum(places.values()) > 0.5 * stored
        deltas = self.deltas()
        with Editor.load(self.bundles / "linked", "ort-cpu", sources={"base": self.base}) as editor:
            got = self.edit(request, deltas, editor=editor)
        for ours, theirs in zip(got, self.edit(request, deltas)):
            np.testing.assert_array_equal(ours, theirs)

    def check_lint(self, bundle: str = "own") -> None:
        """The lint has nothing against any graph."""
        import onnx_ir as ir

        from hywu_export.passes import lint
        from hywu_export.tracing import Axis, TensorSpec

        axes = {name: Axis(**axis) for name, axis in self.manifest.to_dict()["axes"].items()}
        for name, entry in self.manifest.graphs.items():
            inputs, outputs = (
                [TensorSpec(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in side]
                for side in (entry.inputs, entry.outputs)
            )
            assert lint(ir.load(self.bundles / bundle / entry.file), axes, inputs, outputs) == [], name

    def check_tensorrt_rtx(self, bundle: str = "own", graphs: Sequence[str] = ()) -> None:
        """TensorRT-RTX parses and compiles graphs, all if none is named. It needs no GPU for that."""
        from hywu_export.engines.shapes import ShapeOptions, engine_shapes, profile
        from hywu_export.engines.tensorrt import Settings, TensorRT

        settings = Settings(compute_capabilities=("8.9",))
        shapes = engine_shapes(self.manifest, list(self.manifest.graphs), ShapeOptions())
        for name in graphs or self.manifest.graphs:
            entry = self.manifest.graphs[name]
            with open(os.devnull, "w") as log:
                compiler = TensorRT("tensorrt-rtx", log)
                network = compiler.parse(self.bundles / bundle / entry.file)
                plan = compiler.compile(network, profile(self.manifest, entry.inputs, shapes), settings)
                assert len(plan) > 0, name

    def _noise_shape(self, request: Request) -> tuple[int, ...]:
        """Shape of the initial noise for a request's batch and size."""
        (name,) = (name for name, tensor in self.manifest.tensors.items() if tensor.draw == "initial")
        axes = {"batch": len(request.prompts), **dict(zip(sides(self.manifest), reversed(request.size)))}
        for axis, entry in self.manifest.axes.items():
            if entry.of in axes:
                axes[axis] = axes[entry.of] // (entry.divide or 1)
        return resolve_shape(self.manifest, name, axes)


@contextlib.contextmanager
def _traced_once() -> Iterator[None]:
    """Exports of one plan inside it trace every graph once: tracing is what takes time."""
    from unittest.mock import patch

    import hywu_export.tracing as tracing

    traced: dict[Any, Any] = {}
    trace = tracing.trace

    def remembered(spec: Any, axes: Any) -> Any:
        key = spec.name, spec.tile, tuple(value.name for value in spec.inputs)
        if key not in traced:
            traced[key] = trace(spec, axes)
        return traced[key]

    with patch.object(tracing, "trace", remembered):
        yield


def by_component(denoiser: str, deltas: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Component → deltas with the paths of its modules: a target outside the denoiser has its component's
    name before its path."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in deltas.items():
        first, _, rest = name.partition(".")
        outside = first.startswith("text_encoder")
        parts.setdefault(first if outside else denoiser, {})[rest if outside else name] = array
    return parts


def add_adapter(
    pipe: Any, denoiser: str, deltas: Mapping[str, np.ndarray], name: str = "default", strength: float = 1.0
) -> None:
    """Puts deltas of D = 1 into a pipeline as the PEFT adapter ``name``, scaled by ``strength``."""
    from peft import LoraConfig

    for component, part in by_component(denoiser, deltas).items():
        module = getattr(pipe, component)
        if not hasattr(module, "text_model"):  # a level of CLIP in deltas, in modules by the version
            part = {key.removeprefix("text_model."): array for key, array in part.items()}
        paths = [key.removesuffix(".lora_A") for key in part if key.endswith(".lora_A")]
        ranks = {part[f"{path}.lora_A"].shape[1] for path in paths}
        assert len(ranks) == 1, "targets of one rank are asked for"
        rank = ranks.pop()
        # lora_alpha is declared to be an integer, but is only ever divided by the rank.
        module.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank * strength, target_modules=paths), adapter_name=name
        )
        wrapped = {path for path, found in module.named_modules() if hasattr(found, "lora_A")}
        assert set(paths) <= wrapped
        for path in paths:
            layer = module.get_submodule(path)
            for side in ("lora_A", "lora_B"):
                weight = getattr(layer, side)[name].weight
                value = torch.from_numpy(part[f"{path}.{side}"][0].copy())
                weight.data.copy_(value.reshape(weight.shape))


def save_lora(denoiser: str, deltas: Mapping[str, np.ndarray], folder: Path) -> None:
    """Writes deltas of D = 1 as diffusers' training scripts write a LoRA."""
    from safetensors.numpy import save_file

    tensors = {}
    for component, part in by_component(denoiser, deltas).items():
        for name, array in part.items():
            value = np.ascontiguousarray(array[0])
            kernel = part[f"{name.removesuffix('.lora_B')}.lora_A"].ndim - 3 if name.endswith("B") else 0
            if component.startswith("text_encoder"):  # PEFT's names need attention among the targets
                name = name.replace("lora_A", "lora_linear_layer.down").replace(
                    "lora_B", "lora_linear_layer.up"
                )
            tensors[f"{component}.{name}.weight"] = value.reshape(value.shape + (1,) * max(kernel, 0))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})
