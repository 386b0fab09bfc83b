"""One projection of all experts of a layer, as a module that deltas can act on."""

from __future__ import annotations

from torch import Tensor, nn


class ExpertLinear(nn.Module):
    """``y = x W_eᵀ`` for every expert e. The weights are the caller's: checkpoints hold them in many ways.

    An instance is the place where the deltas of one projection (``experts.w1``, say) come in, and has no
    parameters.
    """

    def __init__(self, experts: int, in_features: int, out_features: int):
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` ``[batch, experts, n, in]``, or ``[batch, 1, n, in]`` where all experts read the same;
        ``weight`` ``[experts, out, in]``. Gives ``[batch, experts, n, out]``."""
        return x @ weight.transpose(1, 2)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"
