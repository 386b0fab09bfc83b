"""The demo's instructions: for each an exact pixel operation and the phrasings that ask for it.

The operations are the ground truth of the training and of the table in ``docs/demo.md``. They come in
conflicting pairs (blur and sharpen, brighten and darken, warm and cool), so no single set of weights
can serve them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def gaussian_blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Separable Gaussian blur of ``x [B, 3, H, W]`` with ``sigma`` in pixels, edges repeated."""
    import torch
    import torch.nn.functional as F

    radius = int(3 * sigma + 0.5)
    grid = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (grid / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    x = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    x = F.conv2d(x, kernel[:, :, :, None], groups=3)
    return F.conv2d(x, kernel[:, :, None, :], groups=3)


def _mix(x: torch.Tensor, rows: list[list[float]]) -> torch.Tensor:
    import torch

    return torch.einsum("oc,bchw->bohw", torch.tensor(rows, dtype=x.dtype, device=x.device), x)


def _gain(x: torch.Tensor, red: float, green: float, blue: float) -> torch.Tensor:
    return _mix(x, [[red, 0, 0], [0, green, 0], [0, 0, blue]])


_LUMA = [0.299, 0.587, 0.114]
_SEPIA = [[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]]


@dataclass(frozen=True)
class Operation:
    """``apply`` maps RGB ``[B, 3, H, W]`` in 0..1 to RGB of the same shape (clamped by the caller)."""

    name: str
    apply: Callable[[torch.Tensor], torch.Tensor]
    phrasings: tuple[str, ...]


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "invert",
        lambda x: 1 - x,
        (
            "invert the colors",
            "make it a negative",
            "turn it into a photo negative",
            "invert it",
            "show the negative image",
        ),
    ),
    Operation(
        "grayscale",
        lambda x: _mix(x, [_LUMA] * 3),
        (
            "make it black and white",
            "turn it grayscale",
            "remove the color",
            "make it monochrome",
            "convert to grayscale",
        ),
    ),
    Operation(
        "sepia",
        lambda x: _mix(x, _SEPIA),
        (
            "make it sepia",
            "give it a sepia tone",
            "make it look like an old photograph",
            "add a vintage sepia look",
            "turn it sepia",
        ),
    ),
    Operation(
        "swap",
        lambda x: x.flip(1),
        (
            "swap red and blue",
            "exchange red and blue",
            "make red things blue and blue things red",
            "swap the red and blue channels",
            "switch blue and red",
        ),
    ),
    Operation(
        "brighten",
        lambda x: 1 - (1 - x) ** 2.4,
        (
            "make it brighter",
            "brighten the photo",
            "make it much lighter",
            "increase the brightness",
            "turn up the light",
        ),
    ),
    Operation(
        "darken",
        lambda x: x**2.4,
        (
            "make it darker",
            "darken the photo",
            "make it look like dusk",
            "lower the brightness",
            "turn down the light",
        ),
    ),
    Operation(
        "warm",
        lambda x: _gain(x, 1.3, 1.0, 0.45),
        (
            "make it warmer",
            "give it warm colors",
            "make it golden",
            "add a warm tone",
            "warm it up",
        ),
    ),
    Operation(
        "cool",
        lambda x: _gain(x, 0.45, 1.0, 1.3),
        (
            "make it colder",
            "give it cool colors",
            "make it icy",
            "add a cool blue tone",
            "cool it down",
        ),
    ),
    Operation(
        "blur",
        lambda x: gaussian_blur(x, 3.0),
        (
            "blur the photo",
            "make it blurry",
            "make it out of focus",
            "soften it strongly",
            "blur it",
        ),
    ),
    Operation(
        "sharpen",
        lambda x: x + 3.0 * (x - gaussian_blur(x, 4.0)),
        (
            "sharpen the photo",
            "make it very sharp",
            "increase the sharpness",
            "bring out the details",
            "sharpen it",
        ),
    ),
)

BY_NAME = {operation.name: operation for operation in OPERATIONS}


def apply(name: str, x: torch.Tensor) -> torch.Tensor:
    """The exact result of operation ``name`` on ``x [B, 3, H, W]`` in 0..1, clamped to 0..1."""
    return BY_NAME[name].apply(x).clamp(0, 1)
