"""The editor: photographs and instructions in, pictures or deltas out."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from hywu_runtime.backends import Backend
from hywu_runtime.bundle import Bundle
from hywu_runtime.choice import choose
from hywu_runtime.codec import show
from hywu_runtime.deltas import Deltas
from hywu_runtime.engines import BATCH, narrowed, sides
from hywu_runtime.errors import BundleError, DeltaError, InputError, UnsupportedError
from hywu_runtime.images import Photo, Pixels, Size, load_photo, resize, resized_sizes
from hywu_runtime.manifest import ImagePolicy, ProvidedTensor, is_guided
from hywu_runtime.noise import normal
from hywu_runtime.program import Executor, Plan, Request, Timings, make_plan, resolve_axes, resolve_shape
from hywu_runtime.schedule import Rows, Schedule
from hywu_runtime.text import PromptEncoder

if TYPE_CHECKING:
    from PIL import Image

Array = npt.NDArray[Any]
Cancel: TypeAlias = Callable[[], object] | threading.Event
Scale: TypeAlias = float | Sequence[float]
T = TypeVar("T")

MAX_NOISE = 2**30  # far above any latents: what a damaged manifest asks for must not take hours


@dataclass(frozen=True)
class Limits:
    """What an editor accepts.

    ``steps``: sampler to its step counts. ``guidance``: scale to its default. ``rank``: the largest rank of
    deltas, 0 without deltas. ``default_strength``: None where every edit starts from noise.
    ``photos``: how many each request has. ``outputs``: what `Editor.run` gives.
    """

    batch: tuple[int, int]
    size: ImagePolicy | None
    steps: Mapping[str, tuple[int, ...]]
    default_sampler: str | None
    default_steps: int | None
    guidance: Mapping[str, float]
    rank: int
    edits: bool
    generates: bool
    default_strength: float | None = None
    photos: int = 1
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Samples:
    """What a batch of requests says, one entry per sample."""

    pictures: Mapping[str, list[Pixels]]  # by tensor
    texts: Mapping[str, list[str]]
    seeds: list[tuple[int, int]]  # (seed, sample)
    scales: Mapping[str, list[float]]
    strengths: list[float]

    def __len__(self) -> int:
        return len(self.strengths)


class Editor:
    """An opened bundle on a backend. Several threads may call one editor: it serves them one after another.

    After a call returns, or raises, the editor holds nothing of the request.
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
        """Prepares an editor; :meth:`load` is the usual way to one. Raises BundleError, InputError."""
        self.bundle, self.backend, self.variant, self.engines = bundle, backend, variant, tuple(engines)
        manifest = self._manifest = bundle.manifest
        if variant is not None:
            for graph in manifest.graphs:
                bundle.graph_file(graph, variant)
        self._executor = Executor(
            bundle, backend, variant=variant, low_memory=low_memory, engines=self.engines
        )
        self._encoders = {
            name: PromptEncoder(bundle.file(t.file), t) for name, t in manifest.tokenizers.items()
        }
        self._schedule = None
        if manifest.schedules is not None:
            self._schedule = Schedule(bundle.file(manifest.schedules.file), manifest.schedules)
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        device: int | None = None,
        threads: int | None = None,
        low_memory: bool = False,
        verify: bool = False,
        sources: Mapping[str, str | Path] | None = None,
        variant: str | None = None,
        engine: str | None = None,
    ) -> Editor:
        """Opens a bundle. Graphs are loaded when they are first needed; see :meth:`warm_up`.

        Args:
            path: the bundle directory.
            backend: one of :data:`hywu_runtime.backends.ORDER`, or ``auto``: the first of them that works
                here; of ``tensorrt`` and ``tensorrt-rtx``, where the bundle has an engine that does.
            device: index of the GPU.
            threads: CPU threads.
            low_memory: hold the graphs of one stage at a time, and load them for every request.
            verify: check the SHA-256 of every file.
            sources: source id to checkpoint directory, for a bundle with linked weights.
            variant: a precision variant of the bundle; None is the bundle's own graphs.
            engine: one of the bundle's engines, by key; None is the newest that serves a request.
        Raises:
            BundleError: the bundle is damaged.
            DeviceError: the backend is not there.
            EngineError: the backend has no engine in the bundle that can be used here.
            InputError: an argument cannot be used.
        """
        bundle = Bundle.open(path, verify, sources)
        choice = choose(bundle, backend, device, threads, variant, engine)
        return cls(
            bundle, choice.backend, variant=choice.variant, low_memory=low_memory, engines=choice.engines
        )

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees graphs and buffers. The editor cannot be used afterwards."""
        with self._lock:
            self._closed = True
            self._executor.close()

    @property
    def timings(self) -> Timings:
        """Seconds of the last call, per graph and per evaluation."""
        return self._executor.timings

    def limits(self) -> Limits:
        """What this editor accepts: of the bundle's limits, what its engines cover if it runs on engines.

        The ``size`` is that of the newest of them.
        """
        m, schedule = self._manifest, self._schedule
        steps = (
            {name: tuple(schedule.accepted(name)) for name in m.schedules.samplers}
            if m.schedules and schedule
            else {}
        )
        return Limits(
            batch=self._batch_limits(),
            size=self._policy(self._batch_limits()[0]),
            steps=steps,
            default_sampler=m.schedules.default if m.schedules is not None else None,
            default_steps=m.schedules.default_steps if m.schedules is not None else None,
            guidance={g.name: g.default for g in m.guidance},
            rank=m.deltas.rank if m.deltas is not None else 0,
            edits=m.results.image is not None,
            generates=bool(m.results.deltas),
            default_strength=m.schedules.strength.default if m.schedules and m.schedules.strength else None,
            photos=self._photos,
            outputs=m.results.outputs,
        )

    def edit(
        self,
        photo: Photo | Sequence[Photo],
        prompt: str,
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        strength: float | None = None,
        seed: int = 0,
        guidance: float | Mapping[str, float] | None = None,
        image_guidance: float | None = None,
        delta_strength: float = 1.0,
        deltas: Deltas | None = None,
        sampler: str | None = None,
        size: Size | None = None,
        noise: Array | None = None,
        latents: Array | None = None,
        inputs: Mapping[str, Array] | None = None,
        output: Literal["pil", "array"] = "pil",
        progress: Callable[[int, int], object] | None = None,
        cancel: Cancel | None = None,
    ) -> Image.Image | Pixels:
        """Edits one photograph; the arguments are those of :meth:`edit_batch`.

        Returns:
            a PIL image, or with ``output="array"`` uint8 ``[H, W, 3]``.
        """
        return self.edit_batch(
            [(photo, prompt)], negative_prompt=negative_prompt, steps=steps, strength=strength, seed=seed,
            guidance=guidance, image_guidance=image_guidance, delta_strength=delta_strength, deltas=deltas,
            sampler=sampler, size=size, noise=noise, latents=latents, inputs=inputs, output=output,
            progress=progress, cancel=cancel,
        )[0]  # fmt: skip

    def edit_batch(
        self,
        requests: Sequence[tuple[Photo | Sequence[Photo], str]],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int | None = None,
        strength: float | None = None,
        seed: int | Sequence[int] = 0,
        guidance: Scale | Mapping[str, Scale] | None = None,
        image_guidance: Scale | None = None,
        delta_strength: Scale = 1.0,
        deltas: Deltas | Sequence[Deltas] | None = None,
        sampler: str | None = None,
        size: Size | None = None,
        noise: Array | None = None,
        latents: Array | None = None,
        inputs: Mapping[str, Array] | None = None,
        output: Literal["pil", "array"] = "pil",
        progress: Callable[[int, int], object] | None = None,
        cancel: Cancel | None = None,
    ) -> list[Image.Image] | list[Pixels]:
        """Edits photographs in one batch, each with its own deltas.

        Where a sequence is taken, it has one entry per photograph.

        Args:
            requests: (photo, instruction) pairs; for a bundle that takes several photos, a list of them in
                place of each photo. All are brought to the working size of those of the first request, or
                to ``size``; of several photos, this is the size of the one whose size the picture has.
            negative_prompt: what guidance leads away from.
            steps: step count; None is the bundle's default.
            strength: of a bundle that starts from the photo: the part of the steps that runs, above 0 and
                at most 1, where nothing of the photo is kept; None is the bundle's default.
            seed: 0 to 2**64 - 1. One seed gives each sample noise of its own; from a sequence, sample i is
                what ``seed[i]`` alone gives.
            guidance: the scale named ``text``, or a mapping of names to scales; None is the bundle's
                default. All samples run guided if the scales ask for it.
            image_guidance: the scale named ``image``.
            delta_strength: 1 is as generated, 0 the base model.
            deltas: use these and do not run the generator; one set for all, a set for the batch, or one set
                per photo.
            sampler: one of the bundle's; None is its default.
            size: ``"512x384"``, (width, height), or one number for a square.
            noise: float32 ``[evaluations, batch, …]``, in place of the random numbers of the steps.
            latents: float32 ``[batch, …]``, in place of the initial random numbers; standard deviation 1.
            inputs: values for tensors of the program, by name: those with source ``input``, or intermediate
                results.
            output: ``pil`` or ``array`` (uint8 ``[H, W, 3]``).
            progress: called with (evaluations done, evaluations in all).
            cancel: a function or ``threading.Event``; asked before every graph and step.
        Raises:
            InputError: an argument cannot be used.
            DeltaError: deltas do not fit, are needed and not given, or are not finite.
            CancelledError: cancelled; the editor can be used again.
            UnsupportedError: this bundle makes no images.
            BundleError, EngineError, DeviceError: a graph cannot be loaded or run.
        """
        image = self._manifest.results.image
        if image is None:
            raise UnsupportedError(
                "This bundle makes no images",
                "It holds a generator of deltas alone, or a module that is no editor",
                "Use `generate` or `run`, or export with a base",
            )
        if output not in ("pil", "array"):
            raise InputError(f"`output` is {show(output)}", "Expected pil or array", "Correct it")
        samples = self._samples(
            requests, negative_prompt, seed, guidance, image_guidance, delta_strength, size
        )
        given = self._given(inputs, latents)
        if deltas is not None:
            given |= self._checked(deltas, len(samples))
        guided = is_guided(self._manifest.guidance, samples.scales)
        plan = make_plan(self._manifest, [image], frozenset(given), guided)
        given |= self._absent(plan, samples)
        rows = self._schedule.rows(sampler, steps, strength) if self._schedule is not None else None
        if rows is None and not (steps is None and sampler is None and strength is None):
            raise InputError(
                "This bundle has no schedule",
                "Expected neither `steps` nor `sampler` nor `strength`",
                "Leave them out",
            )
        generated = tuple(
            name for name in self._manifest.results.deltas if deltas is None and name not in given
        )
        pictures = self._run(plan, samples, given, rows, noise, generated, progress, cancel)[image]
        if output == "array":
            return list(pictures)
        from PIL import Image

        return [Image.fromarray(picture) for picture in pictures]

    def generate(
        self,
        photo: Photo | Sequence[Photo] | None = None,
        prompt: str = "",
        *,
        size: Size | None = None,
        inputs: Mapping[str, Array] | None = None,
    ) -> Deltas:
        """The deltas that an edit of ``photo`` with ``prompt`` would use.

        Args:
            photo, prompt, size: as in :meth:`edit`; not needed where ``inputs`` stands in for what is made
                of them.
            inputs: values for tensors of the program, by name, for example ``condition`` of a bundle that is
                a generator alone. Their batch is that of the deltas.
        Raises:
            InputError, DeltaError, UnsupportedError, BundleError, EngineError, DeviceError: as
                :meth:`edit_batch`.
        """
        wanted = self._manifest.results.deltas
        if not wanted:
            raise UnsupportedError(
                "This bundle has no generator", "Deltas are given to `edit`", "Export with a generator"
            )
        given = self._given(inputs, None)
        batch = self._batch_of(given)
        samples = self._samples([(photo, prompt)] * batch, "", 0, None, None, 1.0, size)
        plan = make_plan(self._manifest, wanted, frozenset(given))
        given |= self._absent(plan, samples)
        deltas = Deltas(self._run(plan, samples, given, None, None, (), None, None))
        for name, tensor in deltas.items():
            if not np.isfinite(tensor).all():
                raise DeltaError(
                    f"The generator made values of {show(name, 200)} that are not finite",
                    "Expected finite numbers",
                    "Check the bundle and the request's inputs",
                )
        return deltas

    def run(
        self,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] | None = None,
        deltas: Deltas | Sequence[Deltas] | None = None,
        delta_strength: Scale = 1.0,
        cancel: Cancel | None = None,
    ) -> dict[str, Array]:
        """Runs a module that is no image editor (``hywu_export.trace``): tensors in, tensors out.

        Args:
            inputs: values for tensors of the program, by name, of their dtypes. Their batch is the request's.
            outputs: which results to compute; None is all that the bundle names.
            deltas, delta_strength, cancel: as in :meth:`edit_batch`; one entry per sample.
        Returns:
            arrays by the names of ``outputs``.
        Raises:
            UnsupportedError: this bundle names no outputs.
            InputError, DeltaError, CancelledError, BundleError, EngineError, DeviceError: as
                :meth:`edit_batch`.
        """
        named = self._manifest.results.outputs
        if not named:
            raise UnsupportedError(
                "This bundle names no outputs",
                "It makes images or deltas",
                "Use `edit` or `generate`, or make a bundle with hywu_export.trace",
            )
        wanted = tuple(outputs) if outputs is not None else named
        for name in wanted:
            if name not in named:
                raise InputError(
                    f"This bundle has no output {show(name)}",
                    f"It has: {', '.join(named)}",
                    "Correct `outputs`",
                )
        given = self._given(inputs, None)
        count = self._batch_of(given)
        samples = self._samples([(None, "")] * count, "", 0, None, None, delta_strength, None)
        if deltas is not None:
            given |= self._checked(deltas, count)
        plan = make_plan(self._manifest, wanted, frozenset(given))
        given |= self._absent(plan, samples)
        generated = tuple(
            name for name in self._manifest.results.deltas if deltas is None and name not in given
        )
        return self._run(plan, samples, given, None, None, generated, None, cancel)

    def warm_up(self) -> None:
        """Loads what a default request needs, and runs one on a gray photo if no input is missing."""
        m = self._manifest
        guided = is_guided(m.guidance)
        main = [m.results.image] if m.results.image is not None else m.results.outputs
        plan = make_plan(m, main or m.results.deltas, guided=guided)
        with self._lock:
            self._check_open()
            self._executor.load(plan)
        if m.results.image is None or any(m.tensors[name].source == "input" for name in plan.provided):
            return
        width, height = self._warm_up_size()
        fewest = (
            min(self._schedule.accepted(m.schedules.default), default=None)
            if self._schedule and m.schedules
            else None
        )
        gray = np.full((height, width, 3), 128, np.uint8)
        photos = [gray] * self._photos
        self.edit_batch(
            [(photos, "")] * self._batch_limits()[0],
            steps=fewest,
            delta_strength=0.0 if plan.absent else 1.0,
            size=(width, height) if m.image is not None else None,
        )

    def _warm_up_size(self) -> tuple[int, int]:
        """Width and height: the size that the newest engine is tuned for, or a small one."""
        policy, axes = self._manifest.image, sides(self._manifest)
        if self.engines and len(axes) == 2:
            shapes = self._manifest.engines[self.engines[0]].shapes
            if all(name in shapes for name in axes):
                height, width = (shapes[name][1] for name in axes)
                return width, height
        side = -(-policy.min // policy.multiple) * policy.multiple if policy is not None else 64
        return side, side

    def _batch_limits(self) -> tuple[int, int]:
        axis = self._manifest.axes.get(BATCH)
        low, high = (axis.min or 1, axis.max or 1) if axis is not None else (1, 1)
        ranges = [self._manifest.engines[key].shapes.get(BATCH) for key in self.engines]
        known = [sizes for sizes in ranges if sizes is not None]
        if known and len(known) == len(ranges):
            low, high = max(low, min(r[0] for r in known)), min(high, max(r[2] for r in known))
        return low, high

    def _policy(self, batch: int) -> ImagePolicy | None:
        """How a photo's size is chosen: within the newest engine that takes the batch."""
        for key in self.engines:
            engine = self._manifest.engines[key]
            if engine.covers({BATCH: batch}) is None:
                return narrowed(self._manifest, engine)
        return self._manifest.image

    def _samples(
        self,
        requests: Sequence[tuple[Photo | Sequence[Photo] | None, str]],
        negative_prompt: str | Sequence[str],
        seed: int | Sequence[int],
        guidance: Scale | Mapping[str, Scale] | None,
        image_guidance: Scale | None,
        delta_strength: Scale,
        size: Size | None,
    ) -> _Samples:
        pairs = list(requests) if isinstance(requests, (list, tuple)) else []
        if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise InputError(
                "There is no request", "Expected (photo, instruction) pairs", "Give at least one"
            )
        count = len(pairs)
        low, high = self._batch_limits()
        if not low <= count <= high:
            raise InputError(
                f"The batch has {count} photos", f"This bundle takes {low} to {high}", "Split the batch"
            )
        alone = not isinstance(seed, Iterable)
        seeds = [(_seed(s), i if alone else 0) for i, s in enumerate(_per_sample("seed", seed, count))]
        return _Samples(
            pictures=self._pictures([photo for photo, _ in pairs], size),
            texts={
                "prompt": [prompt for _, prompt in pairs],
                "negative_prompt": _per_sample("negative_prompt", negative_prompt, count),
            },
            seeds=seeds,
            scales=self._scales(guidance, image_guidance, count),
            strengths=[
                _number("delta_strength", s) for s in _per_sample("delta_strength", delta_strength, count)
            ],
        )

    def _pictures(
        self, requests: Sequence[Photo | Sequence[Photo] | None], size: Size | None
    ) -> dict[str, list[Pixels]]:
        """What every tensor with source ``image`` shows of the photos of every request."""
        tensors = {name: t for name, t in self._manifest.tensors.items() if t.source == "image"}
        # What others start from comes first.
        order = sorted(tensors, key=lambda name: (tensors[name].origin is not None, name))
        made: dict[str, list[Pixels]] = {name: [] for name in tensors}
        fitted: dict[str, list[tuple[int, int]]] = {}  # the first request's sizes, for all
        for request in requests:
            if request is None:
                continue
            photos: list[Any] = list(request) if isinstance(request, (list, tuple)) else [request]
            if len(photos) != self._photos:
                raise InputError(
                    f"The request has {len(photos)} photo{'s' if len(photos) != 1 else ''}",
                    f"This bundle takes {self._photos} for each",
                    "Give so many (a list; `hywu edit --photo` adds one), or export with other --images",
                )
            whole: dict[int, Pixels] = {}  # photos at their own size, where a tensor starts from them
            for name in order:
                tensor = tensors[name]
                index = tensor.index or 0
                if not tensor.resize:
                    made[name].append(self._fitted(name, photos[index], made[name], size, len(requests)))
                    continue
                if tensor.origin is not None:
                    start = made[tensor.origin][-1]
                elif index in whole:
                    start = whole[index]
                else:
                    start = whole[index] = load_photo(photos[index])
                sizes = fitted.setdefault(name, resized_sizes(start.shape[1], start.shape[0], tensor.resize))
                made[name].append(resize(start, tensor.resize, sizes))
        return made

    @property
    def _photos(self) -> int:
        """How many photos a request has."""
        indices = [t.index or 0 for t in self._manifest.tensors.values() if t.source == "image"]
        return 1 + max(indices, default=0)

    def _fitted(
        self, name: str, photo: Photo, others: Sequence[Pixels], size: Size | None, batch: int
    ) -> Pixels:
        """A photo at its working size: that of the ``others``, photos of earlier requests, if there are."""
        policy = self._manifest.image
        explicit = size if policy is not None and policy.tensor == name else None
        if explicit is None:  # else it is the user's: whether an engine takes it is seen when axes are known
            policy = self._policy(batch)
        if others and policy is not None:
            explicit = (others[0].shape[1], others[0].shape[0])
        return load_photo(photo, policy, explicit)

    def _scales(
        self, guidance: Scale | Mapping[str, Scale] | None, image_guidance: Scale | None, count: int
    ) -> dict[str, list[float]]:
        asked: dict[str, Scale] = {}
        if isinstance(guidance, Mapping):
            asked |= guidance
        elif guidance is not None:
            asked["text"] = guidance
        if image_guidance is not None:
            asked["image"] = image_guidance
        known = {g.name: g.default for g in self._manifest.guidance}
        for name in asked:
            if name not in known:
                raise InputError(
                    f"This bundle has no guidance scale {show(name)}",
                    f"It has: {', '.join(known) or 'none'}",
                    "Leave it out",
                )
        return {
            name: [
                _number(f"guidance {name}", s)
                for s in _per_sample(f"guidance {name}", asked.get(name, default), count)
            ]
            for name, default in known.items()
        }

    def _given(self, inputs: Mapping[str, Array] | None, latents: Array | None) -> dict[str, Array]:
        """Tensors that the caller gives by name: no deltas, and nothing that changes from step to step."""
        m = self._manifest
        given = {name: np.asarray(array) for name, array in (inputs or {}).items()}
        late = {name for call in m.program if call.phase == "step" for name in m.writes(call).values()}
        late |= {state.tensor for state in m.state} | (
            set(m.deltas.tensors) if m.deltas is not None else set()
        )
        late |= {name for name, tensor in m.tensors.items() if tensor.changes}
        for name in given:
            if name not in m.signatures or name in late:
                raise InputError(
                    f"{show(name)} cannot be given as an input",
                    "Expected a tensor that the bundle knows before the steps, and that is no delta",
                    "See `hywu inspect`",
                )
        if latents is not None:
            names = [name for name, tensor in m.tensors.items() if tensor.draw == "initial"]
            if len(names) != 1:
                raise InputError(
                    f"This bundle draws {len(names)} initial noise tensors",
                    "`latents` stands for exactly one",
                    "Give them by name as `inputs`",
                )
            given[names[0]] = _floats("latents", latents)
        return given

    def _batch_of(self, given: Mapping[str, Array]) -> int:
        for name, array in given.items():
            if self._manifest.signatures[name].shape[:1] == ("batch",) and array.ndim:
                return len(array)
        return 1

    def _checked(self, deltas: Deltas | Sequence[Deltas], batch: int) -> dict[str, Array]:
        spec = self._manifest.deltas
        if spec is None:
            raise DeltaError(
                "This bundle takes no deltas",
                "It was exported without targets",
                "Leave `deltas` out, or export with targets",
            )
        if not isinstance(deltas, Deltas):
            sets = list(deltas) if isinstance(deltas, (list, tuple)) else []
            if len(sets) != batch or not all(isinstance(one, Deltas) for one in sets):
                raise DeltaError(
                    f"`deltas` is {show(deltas)}",
                    f"Expected a Deltas, or a list of {batch} of them",
                    "Give one set for each photo",
                )
            deltas = Deltas.stack([one.pad(spec) for one in sets])
        deltas = deltas.pad(spec)
        deltas.check(spec, batch)
        return dict(deltas)

    def _absent(self, plan: Plan, samples: _Samples) -> dict[str, Array]:
        """Deltas that nobody makes: zeros, which is what strength 0 means, or an error."""
        spec = self._manifest.deltas
        if not plan.absent or spec is None:
            return {}
        if any(samples.strengths):
            raise DeltaError(
                "This bundle has no generator, and no deltas were given",
                f"It takes {len(spec.targets)} targets of rank {spec.rank}",
                "Give `deltas`, or delta_strength=0 for the base model",
            )
        return {name: np.zeros((1, *spec.tensors[name]), np.float32) for name in plan.absent}

    def _run(
        self,
        plan: Plan,
        samples: _Samples,
        given: Mapping[str, Array],
        rows: Rows | None,
        noise: Array | None,
        finite: tuple[str, ...],
        progress: Callable[[int, int], object] | None,
        cancel: Cancel | None,
    ) -> dict[str, Array]:
        """Gathers the provided tensors of a plan and runs it."""
        tensors = {name: self._manifest.tensors[name] for name in sorted(plan.provided - given.keys())}
        values = {name: self._value(name, samples, rows) for name, t in tensors.items() if not _needs_axes(t)}
        values |= given  # last, so that it is the caller's tensor that is blamed for a size
        axes = resolve_axes(self._manifest, len(samples), values)
        per_step: dict[str, Callable[[int], Array]] = {}
        for name, tensor in tensors.items():
            if tensor.draw == "initial":
                values[name] = _draw(resolve_shape(self._manifest, name, axes), samples.seeds, 0)
            elif tensor.draw == "step":
                shape = resolve_shape(self._manifest, name, axes)
                per_step[name] = self._step_noise(shape, samples, rows, noise)
            elif tensor.changes and rows is not None:
                per_step[name] = _column(rows, name, tensor)
        evaluations = len(rows) if rows is not None else 1
        cancelled = cancel.is_set if isinstance(cancel, threading.Event) else cancel
        request = Request(axes, values, per_step, evaluations, finite, progress, cancelled)
        with self._lock:
            self._check_open()
            return self._executor.run(plan, request)

    def _value(self, name: str, samples: _Samples, rows: Rows | None) -> Array:
        """A provided tensor whose size the request alone determines."""
        tensor = self._manifest.tensors[name]
        if tensor.source == "image":
            if len(samples.pictures[name]) != len(samples):
                raise InputError(
                    "A photo is missing", "This bundle needs one for each request", "Give a photo"
                )
            return np.stack(self._same_size(samples.pictures[name]))
        if tensor.source == "text":
            return self._encode(name, samples)[0].astype(tensor.dtype)
        if tensor.source == "mask":
            return self._encode(tensor.of or "", samples)[1].astype(tensor.dtype)
        if tensor.source == "guidance":
            return np.array(samples.scales[tensor.guidance or ""], np.float32)
        if tensor.source == "gate":
            return np.array(samples.strengths, np.float32)
        if tensor.column == "initial_scale" and rows is not None:
            return np.asarray(rows.initial_scale)
        if tensor.column == "start" and rows is not None and rows.start is not None:
            if rows.start.shape != tensor.shape:
                raise BundleError(
                    f"The schedule starts with {len(rows.start)} coefficients",
                    f"Expected {list(tensor.shape)}, as tensor {show(name)}",
                    "Export the bundle again",
                )
            return rows.start
        raise InputError(
            f"The tensor {show(name)} is missing",
            "This bundle takes it from the caller",
            f"Give inputs={{{name!r}: array}}",
        )

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("The editor is closed", "Expected an open one", "Load the bundle again")

    def _same_size(self, pixels: Sequence[Pixels]) -> Sequence[Pixels]:
        if len({p.shape for p in pixels}) > 1:
            raise InputError(
                "The photos of the batch differ in size",
                "This bundle has no output-size policy to bring them to one size",
                "Resize them",
            )
        return pixels

    def _encode(self, name: str, samples: _Samples) -> tuple[Array, Array]:
        tensor = self._manifest.tensors[name]
        texts = (
            samples.texts.get(tensor.text or "")
            if tensor.text is not None
            else [tensor.constant or ""] * len(samples)
        )
        if texts is None:
            raise UnsupportedError(
                f"The bundle asks for a text called {show(tensor.text)}",
                f"This runtime has {', '.join(samples.texts)}",
                f"Give the token ids: inputs={{{name!r}: …}}",
            )
        return self._encoders[tensor.tokenizer or ""].encode(texts)

    def _step_noise(
        self, shape: tuple[int, ...], samples: _Samples, rows: Rows | None, noise: Array | None
    ) -> Callable[[int], Array]:
        """The random numbers of the steps; zeros for a sampler that does not use them."""
        if noise is not None:
            wanted = (len(rows) if rows is not None else 1, *shape)
            array = _floats("noise", noise)
            if array.shape != wanted:
                raise InputError(
                    f"`noise` has shape {list(array.shape)}",
                    f"Expected [evaluations, batch, …] = {list(wanted)}",
                    "Correct it",
                )
            return lambda k: array[k]
        schedules = self._manifest.schedules
        if rows is not None and schedules is not None and not schedules.samplers[rows.sampler].stochastic:
            zeros = np.zeros(shape, np.float32)
            return lambda k: zeros
        return lambda k: _draw(shape, samples.seeds, k + 1)


def _draw(shape: tuple[int, ...], seeds: Sequence[tuple[int, int]], draw: int) -> npt.NDArray[np.float32]:
    if math.prod(shape) > MAX_NOISE:
        raise BundleError(
            f"The bundle asks for {math.prod(shape)} random numbers at once",
            f"Expected at most {MAX_NOISE}",
            "Use a smaller size or batch; if it is as small as can be, the bundle is damaged",
        )
    return np.stack([normal(shape[1:], seed, sample, draw) for seed, sample in seeds])


def _needs_axes(tensor: ProvidedTensor) -> bool:
    """Whether a tensor is drawn at a size that others determine, or changes from step to step."""
    return tensor.draw is not None or tensor.changes


def _column(rows: Rows, name: str, tensor: ProvidedTensor) -> Callable[[int], Array]:
    """A column of the schedule by evaluation."""
    table = rows.timesteps if tensor.column == "timesteps" else rows.coefficients
    if table.shape[1:] != tensor.shape:
        raise BundleError(
            f"The schedule has {table.shape[1]} coefficients",
            f"Expected {list(tensor.shape)}, as tensor {show(name)}",
            "Export the bundle again",
        )
    return lambda k: np.asarray(table[k])


def _per_sample(name: str, value: T | Iterable[T], count: int) -> list[T]:
    """``value`` for every sample; a string is one value."""
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        values = list(value)
        if len(values) != count:
            raise InputError(
                f"`{name}` has {len(values)} entries",
                f"Expected {count}, one for each photo, or a single value",
                "Correct it",
            )
        return values
    return [value] * count


def _seed(seed: object) -> int:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise InputError(
            f"The seed is {show(seed)}", "Expected an integer from 0 to 2**64 - 1", "Choose another seed"
        )
    return int(seed)


def _number(name: str, value: object) -> float:
    if isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.complexfloating)):
        with np.errstate(over="ignore"):
            try:
                if np.isfinite(np.float32(value)):
                    return float(value)
            except OverflowError:  # an integer beyond any float
                pass
    raise InputError(f"`{name}` is {show(value)}", "Expected a finite number", "Correct it")


def _floats(name: str, array: object) -> npt.NDArray[np.float32]:
    result = np.asarray(array)
    if result.dtype.kind != "f" or not np.isfinite(result).all():
        raise InputError(
            f"`{name}` is {result.dtype} {list(result.shape)}, or not finite",
            "Expected finite float32 numbers",
            "Correct the array",
        )
    return result.astype(np.float32)
