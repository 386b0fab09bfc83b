"""One projection of all experts of a layer, as a module that deltas can act on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Picked(NamedTuple):
    """The experts of blocks of rows: their numbers, int64 ``[batch, pieces, blocks of a piece]``, and the
    same as zeros and ones, ``[batch, blocks, experts]``."""

    number: Tensor
    hit: Tensor


class ExpertLinear(nn.Module):
    """``y = x W_eᵀ`` for every expert e. The weights are the caller's: checkpoints hold them in many ways.

    An instance is the place where the deltas of one projection (``experts.w1``, say) come in, and has no
    parameters.
    """

    def __init__(self, experts: int, in_features: int, out_features: int):
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features

    def forward(self, x: Tensor, weight: Tensor, picked: Picked | None = None) -> Tensor:
        """Either all experts, or those that were picked.

        Args:
            x: ``[batch, experts, n, in]``, or ``[batch, 1, n, in]`` where all experts read the same; if some
                were picked, a block of n rows for each: ``[batch, blocks, n, in]``. Pieces are multiplied one
                after the other: only one holds its copies of weights.
            weight: ``[experts, out, in]``.
        Returns:
            ``[batch, experts or blocks, n, out]``.
        """
        turned = weight.transpose(1, 2)
        if picked is None:
            return x @ turned
        batch, pieces, each = picked.number.shape
        parts = torch.unflatten(x, 1, (pieces, each))
        made = []
        for piece in range(pieces):
            own = turned.index_select(0, picked.number[:, piece].flatten())
            made.append(parts[:, piece] @ torch.unflatten(own, 0, (batch, each)))
        return torch.cat(made, dim=1)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"
