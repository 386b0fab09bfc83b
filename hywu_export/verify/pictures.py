"""What is edited to see what a bundle makes of a whole request: a photograph, with and without deltas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hywu_export.verify.inputs import PROMPTS, SEED
from hywu_runtime.bundle import Bundle
from hywu_runtime.deltas import Deltas
from hywu_runtime.editor import Editor
from hywu_runtime.manifest import Guidance, ImagePolicy, Manifest, is_guided

EDIT_STEPS = 4
EDIT_SIDE = 256  # pixels; larger models are edited at no more than this
_EXAMPLE = Path(__file__).parents[2] / "demo/photos/coffee.jpg"  # of a checkout


@dataclass(frozen=True)
class Wish:
    """One request: what it is called, its photographs, and the arguments of ``Editor.edit_batch``."""

    name: str
    photos: tuple[Any, ...]
    prompt: str
    options: Mapping[str, Any]

    def edit(self, editor: Editor) -> npt.NDArray[np.uint8]:
        """The pictures, uint8 ``[batch, H, W, 3]``."""
        several = editor.limits().photos
        requests = [(photo if several == 1 else [photo] * several, self.prompt) for photo in self.photos]
        pictures = editor.edit_batch(requests, **self.options, output="array")
        return np.stack([np.asarray(picture, np.uint8) for picture in pictures])


def edit_steps(bundle: Bundle) -> int:
    """A number of steps that the default sampler takes, near ``EDIT_STEPS``."""
    from hywu_runtime.schedule import Schedule

    section = bundle.manifest.schedules
    assert section is not None
    accepted = Schedule(bundle.file(section.file), section).accepted(section.default)
    return min(accepted, key=lambda n: abs(n - EDIT_STEPS))


def edit_side(policy: ImagePolicy) -> int:
    """The side of a square that the bundle takes, near its default area and at most about ``EDIT_SIDE``."""
    side = min(EDIT_SIDE, math.isqrt(policy.default_area)) // policy.multiple * policy.multiple
    return min(
        max(side, -(-policy.min // policy.multiple) * policy.multiple),
        policy.max // policy.multiple * policy.multiple,
    )


def wishes(
    bundle: Bundle, photo: str | Path | None, prompt: str | None, axes: Mapping[str, int]
) -> list[Wish]:
    """The requests that a variant or an engine is compared on, of one size.

    Args:
        photo, prompt: None is an example.
        axes: sizes of axes that the caller wants; the others are chosen.
    """
    from hywu_runtime.engines import BATCH, sides

    manifest = bundle.manifest
    if manifest.results.image is None:
        return []
    batch = axes.get(BATCH, 1)
    options: dict[str, Any] = {"seed": SEED}
    if manifest.schedules is not None:
        options["steps"] = edit_steps(bundle)
    side = edit_side(manifest.image) if manifest.image is not None else 64
    names = sides(manifest)
    height, width = (axes.get(name, side) for name in names) if len(names) == 2 else (side, side)
    if manifest.image is not None:
        options["size"] = (width, height)
    first = photo if photo is not None else _EXAMPLE if _EXAMPLE.is_file() else draw_picture(width, height)
    photos = (first, *(draw_picture(width, height, seed) for seed in range(1, batch)))
    options["inputs"] = _inputs(manifest, {**axes, BATCH: batch, **dict(zip(names, (height, width)))}, side)
    text = prompt or PROMPTS[0]
    found = []
    if manifest.deltas is not None:
        own = {} if manifest.results.deltas else {"deltas": random_deltas(manifest)}
        found.append(Wish("edit", photos, text, {**options, **own}))
        found.append(Wish("edit without deltas", photos, text, {**options, "delta_strength": 0.0}))
    else:
        found.append(Wish("edit", photos, text, options))
    deciding = [scale for scale in manifest.guidance if scale.decides]
    if deciding and {call.guided for call in manifest.program} >= {True, False}:
        guided = is_guided(deciding)
        other = {scale.name: _other(scale, not guided) for scale in deciding}
        name = "edit without guidance" if guided else "edit with guidance"
        found.append(Wish(name, photos, text, {**found[0].options, "guidance": other}))
    return found


def _other(scale: Guidance, guided: bool) -> float:
    """A value of a scale with a condition that asks for guidance, or one that does not."""
    limit = scale.above if scale.above is not None else scale.at_least or 0.0
    if guided:
        return limit + 0.5
    return limit if scale.above is not None else limit - 1


def _inputs(manifest: Manifest, axes: Mapping[str, int], side: int) -> dict[str, npt.NDArray[Any]]:
    """Random values of the tensors that a caller gives."""
    random = np.random.default_rng(SEED)

    def size(dimension: int | str) -> int:
        if isinstance(dimension, int):
            return dimension
        axis = manifest.axes[dimension]
        if axis.derived:
            return axis.size({root: size(root) for term in axis.terms for root in term.of}) or 1
        return axes.get(
            dimension, min(max(axis.min or 1, side // axis.multiple * axis.multiple), axis.max or 1)
        )

    return {
        name: np.asarray(random.standard_normal([size(d) for d in tensor.shape]), tensor.dtype)
        for name, tensor in manifest.tensors.items()
        if tensor.source == "input"
    }


def random_deltas(manifest: Manifest) -> Deltas:
    """Deltas of the kind that a trained generator makes: small beside the weights."""
    random = np.random.default_rng(SEED)
    assert manifest.deltas is not None
    tensors = {}
    for name, shape in manifest.deltas.tensors.items():
        fan = math.prod(shape[1:]) if name.endswith(".lora_A") else 400
        tensors[name] = (random.standard_normal((1, *shape)) / math.sqrt(fan)).astype(np.float32)
    return Deltas(tensors)


def draw_picture(width: int, height: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A picture of smooth areas, edges and some texture, where there is no photograph."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height, 1)
    picture = np.stack(
        [128 + 90 * np.sin(5 * x + p) * np.cos(4 * y - p) for p in random.uniform(0, 6, 3)], -1
    )
    for _ in range(6):
        cx, cy, radius = random.uniform(0, 1, 3) * (1, 1, 0.3)
        picture[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = random.uniform(0, 255, 3)
    picture += random.normal(0, 6, picture.shape)
    pixels: npt.NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels
