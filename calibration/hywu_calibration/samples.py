"""What a variant is calibrated with: photographs, instructions, and which evaluations of which edits.

A sample is one edit: a photograph, an instruction, a seed, a size, a number of steps, with or without
guidance, and the evaluations of its trajectory that are looked at. The list of samples depends on its
arguments and the seed alone.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from hywu_runtime.errors import HywuError, InputError
from hywu_runtime.images import load_photo, working_size
from hywu_runtime.manifest import Guidance, ImagePolicy, is_guided

T = TypeVar("T")
OBSERVED = 2
"""Evaluations that are looked at in one edit, or all if there are fewer."""
MAX_PROMPTS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Photographs:
    """Photographs that can be read, in the order of their names, and those that cannot, with the reason."""

    paths: tuple[Path, ...]
    skipped: tuple[tuple[Path, str], ...] = ()


@dataclass(frozen=True)
class Sample:
    """One edit. ``size`` is (width, height) or None for the photograph's own; ``evaluations`` ascend."""

    number: int
    photo: Path
    prompt: str
    seed: int
    size: tuple[int, int] | None
    steps: int | None
    guided: bool
    guidance: tuple[tuple[str, float], ...]
    evaluations: tuple[int, ...]


def find_photographs(folder: Path, policy: ImagePolicy | None) -> Photographs:
    """Reads every picture of a folder once. Files that are no pictures by their suffix are passed over.

    Raises:
        InputError: no folder, a folder that cannot be read, or without a single picture that can.
    """
    from PIL import Image

    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    try:
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in suffixes and not f.is_dir())
    except OSError as error:
        raise InputError(
            f"The photographs' folder {folder} cannot be read: {error.strerror or error}",
            "Expected a folder of photographs (JPEG, PNG, WebP, …)",
            "Check the path given with --images, and its permissions",
        ) from None
    readable, skipped = [], []
    for file in files:
        try:
            load_photo(file, policy)
            readable.append(file)
        except HywuError as error:
            skipped.append((file, error.wrong))
    if not readable:
        found = f"the {len(skipped)} there cannot be read ({skipped[0][1]})" if skipped else "it has none"
        raise InputError(
            f"The folder {folder} has no photograph to calibrate with: {found}",
            "Expected at least one photograph (JPEG, PNG, WebP, …) like those that will be edited",
            "Give another folder with --images",
        )
    return Photographs(tuple(readable), tuple(skipped))


def read_prompts(file: Path) -> tuple[str, ...]:
    """The instructions of a file, one a line, in UTF-8; empty lines are passed over.

    Raises:
        InputError: the file cannot be read, is not UTF-8 (line and byte are named), or has no instruction.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_PROMPTS_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"The prompts file {file} cannot be read: {error.strerror or error}",
            "Expected a text file with one instruction a line",
            "Check the path given with --prompts",
        ) from None
    if len(content) > MAX_PROMPTS_BYTES:
        raise InputError(
            f"The prompts file {file} is larger than {MAX_PROMPTS_BYTES >> 20} MiB",
            "Expected a text file with one instruction a line",
            "Give fewer instructions: a sample takes one",
        )
    prompts = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            prompts.append(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise InputError(
                f"The prompts file {file} is not UTF-8: "
                f"byte {error.start + 1} of line {number} is 0x{line[error.start]:02x}",
                "Expected UTF-8 text with one instruction a line",
                "Save the file as UTF-8",
            ) from None
    if not any(prompts):
        raise InputError(
            f"The prompts file {file} is empty",
            "Expected one instruction a line, like those that will be given",
            "Write some instructions into it",
        )
    return tuple(filter(None, prompts))


def draw_samples(
    photos: Sequence[Path],
    prompts: Sequence[str],
    count: int,
    seed: int,
    *,
    evaluations: int,
    steps: int | None = None,
    guidance: Sequence[Guidance] = (),
    forms: Sequence[bool] = (False,),
    policy: ImagePolicy | None = None,
) -> list[Sample]:
    """The samples of a calibration.

    Every photograph and every instruction is used as often as any other, give or take one, in random company.
    The evaluations of all samples together are spread evenly over the trajectory. One sample in three has
    another size than an edit has by default, smaller or larger in turn.

    Args:
        count: how many samples.
        seed: of the draw; samples get seeds of their own from it.
        evaluations: how many a trajectory of ``steps`` has.
        guidance: the bundle's scales.
        forms: guided or not: one, or both, the first of them for three samples in four.
        policy: the bundle's sizes; None for photographs as they are.
    """
    random = np.random.default_rng([seed, 0x68797775])
    chosen_photos, chosen_prompts = _evenly(photos, count, random), _evenly(prompts, count, random)
    observed = min(OBSERVED, evaluations)
    start = float(random.random())
    golden = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, are spread evenly whatever their number
    samples = []
    for i, (photo, prompt) in enumerate(zip(chosen_photos, chosen_prompts)):
        place = (start + i * golden) % 1
        looked_at = {min(evaluations - 1, int((place + j) / observed * evaluations)) for j in range(observed)}
        other = policy is not None and i % 3 == 2
        guided = forms[1] if len(forms) > 1 and i % 4 == 3 else forms[0]
        samples.append(
            Sample(
                number=i,
                photo=photo,
                prompt=prompt,
                seed=int(random.integers(2**63)),
                size=_other_size(photo, policy, 0.5 if i % 2 else 1.5) if other and policy else None,
                steps=steps,
                guided=guided,
                guidance=scales_for(guidance, guided),
                evaluations=tuple(sorted(looked_at)),
            )
        )
    return samples


def scales_for(guidance: Sequence[Guidance], guided: bool) -> tuple[tuple[str, float], ...]:
    """Guidance scales for which a request is guided, or is not: the defaults, or what is nearest to them."""
    scales = {scale.name: scale.default for scale in guidance}
    if guided:
        for scale in guidance:
            if scale.decides and not scale.satisfied(scale.default):
                limit = _limit(scale)
                scales[scale.name] = max(2 * limit, limit + 1)
    elif is_guided(guidance):
        first = next(scale for scale in guidance if scale.decides)
        limit = _limit(first)
        scales[first.name] = limit if first.above is not None else limit - 1
    return tuple(scales.items())


def _limit(scale: Guidance) -> float:
    limit = scale.above if scale.above is not None else scale.at_least
    assert limit is not None  # the manifest's reader has checked it
    return limit


def _evenly(items: Sequence[T], count: int, random: np.random.Generator) -> Iterator[T]:
    """``count`` items in rounds, each a shuffle of all of them."""
    for start in range(0, count, len(items)):
        order = random.permutation(len(items))
        yield from (items[i] for i in order[: count - start])


def _other_size(photo: Path, policy: ImagePolicy, area: float) -> tuple[int, int]:
    """The size that the photograph would have if the default area were ``area`` times what it is."""
    height, width = load_photo(photo).shape[:2]
    area = max(1, int(policy.default_area * area))
    return working_size(width, height, replace(policy, default_area=area, sizes=()))
