"""Two-dimensional rotary positions, half-split.

Phase ``j`` of ``head_dim / 2`` has the frequency ``theta^(-2j / head_dim)`` and turns by the row for even
``j``, by the column for odd ``j``. A text token's row and column are both its index; a picture's tokens are
centred on the diagonal that text would take in their place.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def divide(number: Tensor, divisor: Tensor | int) -> Tensor:
    """``number // divisor`` of integers from 0 to 2²², which ONNX divides only with a detour over signs."""
    half = (number.to(torch.float32) + 0.5) / divisor
    return half.floor().to(torch.int64)


def grid_positions(start: Tensor, height: Tensor, width: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Positions of picture tokens, ``[..., 2]``: row ``floor(start + (hw - h) / 2 + row)``, column likewise.

    All arguments are integers and broadcast.
    """
    area = height * width
    half = [divide(area - side, 2) for side in (height, width)]
    return torch.stack([start + half[0] + row, start + half[1] + column], dim=-1)


def text_positions(index: Tensor) -> Tensor:
    """Positions of text tokens, ``[..., 2]``."""
    return torch.stack([index, index], dim=-1)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Cosine and sine, float32 ``[batch, 1, length, head_dim]``, of positions ``[batch, length, 2]``."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequencies = (1.0 / theta ** (pairs / head_dim)).reshape(-1, 2)  # even and odd phases side by side
    phases = (positions.to(torch.float32).unsqueeze(-2) * frequencies).flatten(-2)
    phases = torch.cat([phases, phases], dim=-1).unsqueeze(1)
    return phases.cos(), phases.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn ``x`` ``[batch, heads, length, head_dim]``."""
    cos, sin = rotary
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin
