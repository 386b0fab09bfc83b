"""Photographs in, pictures out: everything that happens to pixels outside the graphs."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import numpy.typing as npt

from hywu_runtime.codec import show
from hywu_runtime.errors import InputError
from hywu_runtime.files import write_atomically
from hywu_runtime.manifest import ImagePolicy, Resize

if TYPE_CHECKING:
    from PIL import Image

Pixels: TypeAlias = npt.NDArray[np.uint8]
Photo: TypeAlias = Union[str, "os.PathLike[str]", bytes, "Image.Image", npt.NDArray[Any]]
Size: TypeAlias = Union[str, int, "tuple[int, int]"]

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap the sides
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def parse_size(size: Size, policy: ImagePolicy) -> tuple[int, int]:
    """``"512x384"``, ``(512, 384)`` or ``512`` as (width, height).

    Raises:
        InputError: not a size, or not a multiple within the policy's limits.
    """
    width: Any
    height: Any
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*[x×,]\s*(\d{1,6}))?\s*", size, re.ASCII)
        width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    elif isinstance(size, (tuple, list)) and len(size) == 2:
        width, height = size
    else:
        width = height = size
    for side in (width, height):
        sound = isinstance(side, (int, np.integer)) and not isinstance(side, bool)
        if not sound or not policy.min <= side <= policy.max or side % policy.multiple:
            raise InputError(
                f"The size {show(size)} cannot be used",
                f"Expected sides from {policy.min} to {policy.max} pixels, multiples of {policy.multiple}",
                "Give WIDTHxHEIGHT, or no size to keep the photo's aspect",
            )
    return int(width), int(height)


def working_size(width: int, height: int, policy: ImagePolicy) -> tuple[int, int]:
    """The (width, height) at which a photo is edited by default; see *Image sizes* in docs/bundle.md."""
    offered = [size for size in policy.sizes if policy.min <= min(size) and max(size) <= policy.max]
    if offered:
        _, w, h = min((abs(width / height - w / h), w, h) for w, h in offered)
        return w, h
    scale = math.sqrt(policy.default_area / (width * height))
    scale = scale if policy.enlarge else min(scale, 1.0)
    if min(width, height) * scale < policy.min:
        scale = policy.min / min(width, height)
    low = -(-policy.min // policy.multiple) * policy.multiple
    high = policy.max // policy.multiple * policy.multiple

    def side(length: int) -> int:
        return max(low, min(high, math.floor(length * scale / policy.multiple + 0.5) * policy.multiple))

    return side(width), side(height)


def resized_sizes(width: int, height: int, steps: Sequence[Resize]) -> list[tuple[int, int]]:
    """The (width, height) after each of the ``steps``, from a photo of this size; see *Image sizes* in
    docs/bundle.md.

    Raises:
        InputError: it would be beyond the most pixels that a photo may have.
    """
    sizes = []
    for step in steps:
        size, area = (width, height), width * height
        made = _sides(size, step, _nearest, math.sqrt(area / step.area) if step.area is not None else 1.0)
        if step.max_area is not None and made[0] * made[1] > step.max_area:
            made = _sides(size, step, math.floor, math.sqrt(area / step.max_area))
        elif step.min_area is not None and made[0] * made[1] < step.min_area:
            made = _sides(size, step, math.ceil, 1.0, math.sqrt(step.min_area / area))
        if made[0] * made[1] > MAX_PIXELS:
            raise InputError(
                f"A photo of {width}x{height} pixels would be brought to {made[0]}x{made[1]}",
                f"Expected at most {MAX_PIXELS} pixels",
                "Give a photo of another shape; if it is an ordinary one, the bundle is damaged",
            )
        width, height = made
        sizes.append(made)
    return sizes


def _sides(
    size: tuple[int, int],
    step: Resize,
    to_int: Callable[[float], int],
    divisor: float,
    factor: float = 1.0,
) -> tuple[int, int]:
    """Both sides divided or multiplied, and brought to a multiple by ``to_int``."""
    multiple = step.multiple
    width, height = (max(1, to_int(side / divisor * factor / multiple)) * multiple for side in size)
    return width, height


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def resize(photo: Pixels, steps: Sequence[Resize], sizes: Sequence[tuple[int, int]]) -> Pixels:
    """A photo uint8 ``[H, W, 3]`` brought to each of the ``sizes`` in turn, by the ``steps``' filters."""
    for step, size in zip(steps, sizes):
        photo = _resize(photo, size, step.filter)
    return photo


def load_photo(photo: Photo, policy: ImagePolicy | None = None, size: Size | None = None) -> Pixels:
    """A photograph as uint8 RGB ``[H, W, 3]``, upright; with a ``policy``, at the working size.

    EXIF orientation is applied, transparency is composited on white, animations give their first frame,
    16-bit images their upper 8 bits.

    Args:
        photo: a path, the bytes of a file, a PIL image, or an array uint8 or uint16 ``[H, W]``, ``[H, W,
            1]``, ``[H, W, 3]`` or ``[H, W, 4]``.
        policy: the manifest's ``image``.
        size: with a policy, an explicit size; see :func:`parse_size`.
    Raises:
        InputError: the photo or the size cannot be used.
    """
    from PIL import Image, ImageOps

    if isinstance(photo, np.ndarray):
        return fit(_from_array(photo), policy, size) if policy is not None else _from_array(photo)
    what = (
        "The image"
        if isinstance(photo, (bytes, bytearray, Image.Image))
        else f"The image {show(str(photo), 200)}"
    )
    if not isinstance(photo, (str, os.PathLike, bytes, bytearray, Image.Image)):
        raise InputError(
            f"The photo is a {type(photo).__name__}",
            "Expected a path, bytes, a PIL image or an array",
            "Pass one of these",
        )
    try:
        if isinstance(photo, Image.Image):
            image = photo
        else:
            image = Image.open(io.BytesIO(photo) if isinstance(photo, (bytes, bytearray)) else photo)
        with _closing(image, photo):
            width, height = image.size
            if not width or not height:
                raise InputError(f"{what} has no pixels", "Expected at least one", "Give another photo")
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"{what} has {width}x{height} pixels", f"Expected at most {MAX_PIXELS}", "Make it smaller"
                )
            if image.getexif().get(_ORIENTATION) in _TURNED:
                width, height = height, width
            target = _target(width, height, policy, size)
            if target is not None and image.format == "JPEG":
                # Decodes at a fraction of the size, never below twice the working size: a large photo costs
                # little memory.
                image.draft("RGB", (2 * max(target), 2 * max(target)))
            pixels = _to_rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise InputError(
                f"There is no file {show(str(photo), 200)}", "Expected a photograph", "Check the path"
            ) from None
        raise InputError(
            f"{what} cannot be read: {error}",
            "Expected a photograph (JPEG, PNG, WebP, …)",
            "Check that the file is whole",
        ) from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise InputError(
            f"{what} cannot be decoded: {type(error).__name__}: {error}",
            "Expected a photograph (JPEG, PNG, WebP, …)",
            "Check that the file is whole",
        ) from None
    return _resize(pixels, target)


def fit(photo: Pixels, policy: ImagePolicy, size: Size | None = None) -> Pixels:
    """A photo uint8 ``[H, W, 3]`` brought to its working size, or to an explicit one, by Lanczos resampling.

    Raises:
        InputError: the size cannot be used.
    """
    pixels = _from_array(photo)
    return _resize(pixels, _target(pixels.shape[1], pixels.shape[0], policy, size))


def check_suffix(path: str | Path) -> str:
    """The format, by Pillow's name, that a path's suffix asks for.

    Raises:
        InputError: another suffix than that of PNG, JPEG or WebP.
    """
    kind = _FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise InputError(
            f"{path} has no known picture suffix", f"Expected {', '.join(_FORMATS)}", "Change the suffix"
        )
    return kind


def save_picture(pixels: Pixels | Image.Image, path: str | Path) -> None:
    """Writes a picture, whole or not at all, as PNG, JPEG or WebP by the path's suffix.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    from PIL import Image

    kind = check_suffix(path)
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    options = {"quality": 95} if kind != "PNG" else {}
    write_atomically(path, lambda stream: image.save(stream, kind, **options))


def _closing(image: Image.Image, photo: Photo) -> Any:
    """A context that closes what was opened here, and leaves a caller's image alone."""
    import contextlib

    return contextlib.nullcontext() if image is photo else contextlib.closing(image)


def _to_rgb(image: Image.Image) -> Pixels:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F":
            values = np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0)
        elif image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values.astype(np.int64) >> 8
        gray = np.clip(values, 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _from_array(array: npt.NDArray[Any]) -> Pixels:
    from PIL import Image

    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or 0 in array.shape
        or (array.ndim == 3 and array.shape[2] not in (1, 3, 4))
    ):
        raise InputError(
            f"The photo is an array {array.dtype} {list(array.shape)}",
            "Expected uint8 [H, W, 3]",
            "Convert it; float images times 255",
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(
            f"The photo has {array.shape[1]}x{array.shape[0]} pixels",
            f"Expected at most {MAX_PIXELS}",
            "Make it smaller",
        )
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    return _to_rgb(
        Image.fromarray(
            np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
        )
    )


def _target(width: int, height: int, policy: ImagePolicy | None, size: Size | None) -> tuple[int, int] | None:
    if policy is None:
        return None
    return parse_size(size, policy) if size is not None else working_size(width, height, policy)


def _resize(pixels: Pixels, target: tuple[int, int] | None, filter: str = "lanczos") -> Pixels:
    from PIL import Image

    if target is None or target == (pixels.shape[1], pixels.shape[0]):
        return pixels
    return np.array(Image.fromarray(pixels).resize(target, Image.Resampling[filter.upper()]))
