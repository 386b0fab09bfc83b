"""Between ``uint8 [B, H, W, 3]`` pixels, as photos have them, and ``float [B, 3, H, W]`` in -1..1, for VAEs.

TensorRT takes uint8 only beside a Cast, so the cast comes first on the way in and last on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def from_pixels(pixels: Tensor) -> Tensor:
    """``uint8 [B, H, W, 3]`` to ``float32 [B, 3, H, W]``, as diffusers' ``VaeImageProcessor`` computes it."""
    return 2.0 * (pixels.to(torch.float32) / 255.0).permute(0, 3, 1, 2) - 1.0


def to_pixels(image: Tensor) -> Tensor:
    """``float [B, 3, H, W]`` to ``uint8 [B, H, W, 3]``: clamped, rounded half to even as NumPy does."""
    unit = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (unit * 255.0).round().to(torch.uint8)
