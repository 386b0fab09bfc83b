"""The sampler update as torch operations, for step graphs."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_row(
    coefficients: Tensor, x: Tensor, m: Tensor, noise: Tensor, history: Tensor
) -> tuple[Tensor, Tensor]:
    """One evaluation of a traced sampler (docs/bundle.md, *Schedules*).

    Args:
        coefficients: ``[K]``, K = 2H + 4, a row of a :class:`~hywu_export.schedules.ScheduleTable`; its first
            element scales the model input and is the caller's to apply.
        x: latents before the update, ``[B, …]``; everything is computed in its dtype (float32 in a bundle).
        m: model output for ``coefficients[0] * x``, like ``x``.
        noise: standard normal numbers, like ``x``; must be finite even where its coefficient is 0.
        history: ``[B, 2H, …]``, latents and model outputs of 1, 2, …, H ≥ 1 evaluations ago; zeros at first.

    Returns:
        The next latents, and the history for the next evaluation.
    """
    c, m, noise = coefficients.to(x.dtype), m.to(x.dtype), noise.to(x.dtype)
    past = (c[4:].reshape(1, -1, *[1] * (x.dim() - 1)) * history).sum(dim=1)
    x_next = c[1] * x + c[2] * m + c[3] * noise + past
    newest = torch.stack((x, m), dim=1)
    return x_next, torch.cat((newest, history[:, :-2]), dim=1)
