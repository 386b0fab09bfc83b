"""The sizes that an engine is built for: of the bundle's axes, and what follows for every input."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from hywu_runtime.errors import InputError
from hywu_runtime.manifest import Axis, Manifest, Value

Range: TypeAlias = tuple[int, int, int]
"""Smallest, best (what the engine is tuned for) and largest size of an axis."""
Profile: TypeAlias = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, best and largest shape of every input whose shape is not fixed."""

BATCH = "batch"
_LARGEST_BATCH = 4


@dataclass(frozen=True)
class ShapeOptions:
    """What the user says; what is None, or not there, has a default that follows from the bundle."""

    sizes: str | None = None
    batch: str | None = None
    delta_batch: str | None = None
    axes: Mapping[str, str] = field(default_factory=dict)


def engine_shapes(manifest: Manifest, graphs: Collection[str], options: ShapeOptions) -> dict[str, Range]:
    """The range of every axis that has limits of its own and that one of the ``graphs`` uses.

    Raises:
        InputError: a range is not understood, names no axis, or leaves the limits of the bundle.
    """
    given: dict[str, Range] = {}
    for option, axis_name, text in _given(manifest, options):
        if axis_name is None or axis_name not in manifest.axes or manifest.axes[axis_name].derived:
            have = ", ".join(name for name, a in manifest.axes.items() if not a.derived) or "none"
            raise InputError(
                f"{option} {text!r}: the bundle has no such axis", f"Its axes are {have}", "Correct it"
            )
        given[axis_name] = _parse_range(option, text)
    if options.sizes is not None:
        given |= _parse_sizes(manifest, options.sizes)
    used = {root for name in _names(manifest, graphs) for root in _roots(manifest, name)}
    shapes: dict[str, Range] = {}
    roots = [name for name, axis in manifest.axes.items() if not axis.derived]
    for name in sorted(roots, key=lambda name: manifest.axes[name].one_or is not None):  # the batch first
        shapes[name] = given.get(name) or _default(manifest, name, shapes)
        _check(manifest, name, shapes)
    shapes = {name: shapes[name] for name in roots}
    return {name: sizes for name, sizes in shapes.items() if name in used}


def profile(manifest: Manifest, inputs: Sequence[Value], shapes: Mapping[str, Range]) -> Profile:
    """The shapes of a graph's inputs at the three points of ``shapes``.

    Raises:
        InputError: a size is no multiple of what an axis that depends on it is divided by.
    """
    return {
        value.name: (
            _shape(manifest, value, shapes, 0),
            _shape(manifest, value, shapes, 1),
            _shape(manifest, value, shapes, 2),
        )
        for value in inputs
        if any(isinstance(size, str) for size in value.shape)
    }


def _given(manifest: Manifest, options: ShapeOptions) -> list[tuple[str, str | None, str]]:
    delta_axis = next((name for name, axis in manifest.axes.items() if axis.one_or is not None), None)
    found = [("--batch", BATCH, options.batch), ("--delta-batch", delta_axis, options.delta_batch)]
    found += [(f"--axis {name}", name, text) for name, text in options.axes.items()]
    return [(option, axis, text) for option, axis, text in found if text is not None]


def _parse_range(option: str, text: str) -> Range:
    if not re.fullmatch(r"\d{1,9}(:\d{1,9}:\d{1,9})?", text):
        raise InputError(
            f"{option} {text!r} is not understood",
            "Expected one size, or the smallest, the best and the largest, as 1:1:4",
            "Correct it",
        )
    sizes = [int(size) for size in text.split(":")]
    return _ordered(f"{option} {text!r}", (sizes[0], sizes[0], sizes[0]) if len(sizes) == 1 else sizes)


def _parse_sizes(manifest: Manifest, text: str) -> dict[str, Range]:
    """``WxH`` or ``WxH:WxH:WxH`` as ranges of the photograph's two axes."""
    shape = manifest.tensors[manifest.image.tensor].shape if manifest.image is not None else ()
    names = shape[1:3]
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"--shapes {text!r}: the bundle takes no pictures of various sizes",
            "Expected a bundle with an image, whose height and width are axes",
            "Leave it out, or give the axes with --axis NAME=MIN:BEST:MAX",
        )
    height, width = str(names[0]), str(names[1])
    if not re.fullmatch(r"\d{1,6}x\d{1,6}(:\d{1,6}x\d{1,6}:\d{1,6}x\d{1,6})?", text):
        raise InputError(
            f"--shapes {text!r} is not understood",
            "Expected WIDTHxHEIGHT, or the smallest, the best and the largest, as 256x256:512x512:768x768",
            "Correct it",
        )
    sizes = [tuple(map(int, size.split("x"))) for size in text.split(":")]
    sizes = sizes * 3 if len(sizes) == 1 else sizes
    what = f"--shapes {text!r}"
    return {
        width: _ordered(what, [size[0] for size in sizes]),
        height: _ordered(what, [size[1] for size in sizes]),
    }


def _ordered(what: str, sizes: Sequence[int]) -> Range:
    low, best, high = sizes
    if not low <= best <= high:
        raise InputError(
            f"{what}: the sizes are not in order", "Smallest, best, largest: none below the one before it",
            "Correct the order",
        )  # fmt: skip
    return low, best, high


def _default(manifest: Manifest, name: str, shapes: Mapping[str, Range]) -> Range:
    axis, image = manifest.axes[name], manifest.image
    low, high = axis.min or 1, axis.max or 1
    if name == BATCH:
        return low, low, min(high, max(low, _LARGEST_BATCH))
    if axis.one_or is not None:  # as many as samples, or one for all
        best, most = shapes[axis.one_or][1:] if axis.one_or in shapes else (low, high)
        return low, min(best, high), min(most, high)
    pictures = [t for t in manifest.tensors.values() if t.source == "image" and name in t.shape[1:3]]
    if image is not None and pictures:
        area, step = image.default_area, math.lcm(axis.multiple, image.multiple)
        smallest, largest = max(low, image.min), min(high, image.max)
        for resize in pictures[0].resize:
            area = min(max(resize.area or area, resize.min_area or 1), resize.max_area or area)
            step, smallest, largest = axis.multiple, low, high
        best = _to_step(math.sqrt(area), step, smallest, largest)
        if image.sizes and not pictures[0].resize:  # photos come to one of these
            sides = [side for size in image.sizes for side in size]
            return min(sides), best, max(sides)
        return (
            _to_step(best / 2, step, smallest, largest),
            best,
            _to_step(1.5 * best, step, smallest, largest),
        )
    return low, high, high  # what it means is not known here: it works at any size, best at the largest


def _to_step(size: float, step: int, low: int, high: int) -> int:
    """The multiple of ``step`` within the limits that is nearest to ``size``."""
    return min(max(round(size / step), -(-low // step)), high // step) * step


def _check(manifest: Manifest, name: str, shapes: Mapping[str, Range]) -> None:
    axis, (low, best, high) = manifest.axes[name], shapes[name]
    text = f"Axis {name!r} from {low} to {high}, best {best}"
    if low < (axis.min or 1) or (axis.max is not None and high > axis.max):
        raise InputError(
            f"{text}, leaves the limits of the bundle",
            f"The bundle takes {axis.min or 1} to {axis.max}",
            "Choose sizes within them, or export a bundle with others",
        )
    if any(size % axis.multiple for size in (low, best, high)):
        raise InputError(
            f"{text}: not all are multiples of {axis.multiple}",
            f"The bundle takes {axis.min or 1} to {axis.max} in steps of {axis.multiple}",
            "Choose multiples",
        )
    if axis.one_or is not None and axis.one_or in shapes:
        most = shapes[axis.one_or][2]
        if high > most:
            raise InputError(
                f"{text}, leaves what {axis.one_or!r} allows",
                f"It is 1 or as large as {axis.one_or!r}, here at most {most}",
                f"Choose sizes up to {most}",
            )


def _names(manifest: Manifest, graphs: Collection[str]) -> set[str]:
    values = [v for g in graphs for v in (*manifest.graphs[g].inputs, *manifest.graphs[g].outputs)]
    return {size for value in values for size in value.shape if isinstance(size, str)}


def _roots(manifest: Manifest, name: str) -> set[str]:
    axis = manifest.axes[name]
    return {root for term in axis.terms for root in term.of} if axis.derived else {name}


def _shape(manifest: Manifest, value: Value, shapes: Mapping[str, Range], point: int) -> tuple[int, ...]:
    return tuple(
        size if isinstance(size, int) else _size(manifest, size, shapes, point) for size in value.shape
    )


def _size(manifest: Manifest, name: str, shapes: Mapping[str, Range], point: int) -> int:
    axis: Axis = manifest.axes[name]
    if not axis.derived:
        return shapes[name][point]
    total = 0
    for term in axis.terms:
        sizes = [shapes[root][point] for root in term.of]
        size, rest = divmod(term.times * math.prod(sizes), term.divide)
        if rest or not size:
            raise InputError(
                f"Axis {name!r} is {' · '.join(term.of)} divided by {term.divide}, which leaves {rest}",
                f"Sizes of {' and '.join(term.of)} are multiples of what divides them",
                "Choose multiples",
            )
        total += size
    return total
