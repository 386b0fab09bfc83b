"""The feed-forward part of a decoder layer: one shared MLP, and top-k of many routed ones.

The rows of every ``gate_and_up_proj`` are ``[up, gate]``: ``down(up * silu(gate))``. The published names of
the three parts of an expert, under which a generator makes deltas, are w1 (gate), w2 (down) and w3 (up).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hywu_export.deltas.experts import ExpertLinear, Picked
from hywu_export.families.hunyuan.config import HunyuanConfig
from hywu_export.families.hunyuan.routing import block_size, group, take
from hywu_export.tracing.stacks import Stack


class SharedMLP(nn.Module):
    """The expert that every token visits."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_and_up_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_and_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(up * F.silu(gate))
        return out


class Weight(nn.Module):
    """A matrix ``[out, in]`` that is never multiplied by itself: the experts' are stacked first."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))


class Expert(nn.Module):
    """The weights of one expert, as checkpoints hold them."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_and_up_proj = Weight(2 * width, hidden)
        self.down_proj = Weight(hidden, width)


class Experts(Stack):
    """All routed experts, dense or gathered.

    *Dense* runs each on every token: what the router left out gets the weight 0. *Gathered*, with a ``block``
    of tokens, runs each on the tokens that chose it; see `routing`.

    Checkpoints hold every expert apart. They are stacked in the graph, which a runtime computes once, when it
    loads: nothing is copied on disk.
    """

    def __init__(self, count: int, hidden: int, width: int, block: int = 0):
        super().__init__([Expert(hidden, width) for _ in range(count)])
        self.width, self.block = width, block
        self.w1 = ExpertLinear(count, hidden, width)
        self.w2 = ExpertLinear(count, width, hidden)
        self.w3 = ExpertLinear(count, hidden, width)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The weighted sum of the chosen experts.

        Args:
            x: ``[batch, n, hidden]``.
            chosen: which experts, int64 ``[batch, n, k]``.
            shares: their weights, float32 ``[batch, n, k]``.
        """
        return (self._gathered if self.block else self._dense)(x, chosen, shares)

    def _dense(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        made = self._run(x.unsqueeze(1), self._weights(), None)  # [batch, experts, n, hidden]
        hit = chosen.unsqueeze(-1) == torch.arange(self.count)
        share = (hit * shares.unsqueeze(-1)).sum(2)  # [batch, n, experts]
        weighted: Tensor = made * share.transpose(1, 2).unsqueeze(-1).to(made.dtype)
        return weighted.sum(1)

    def _gathered(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        groups = group(chosen, self.count, self.block)
        number = groups.expert.flatten(1)
        rows = torch.unflatten(take(x, groups.token), 0, (*number.shape, self.block))
        hit = (number.unsqueeze(-1) == torch.arange(self.count)).to(x.dtype)
        made = self._run(rows, self._weights(), Picked(groups.expert, hit)).flatten(1, 2)
        pairs = torch.unflatten(take(made, groups.slot.flatten(1)), 0, shares.shape)
        weighted: Tensor = shares.unsqueeze(-2).to(x.dtype) @ pairs
        return weighted.squeeze(-2)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """``[experts, 2 * width, hidden]`` and ``[experts, hidden, width]``."""
        return self.stacked("gate_and_up_proj.weight"), self.stacked("down_proj.weight")

    def _run(self, x: Tensor, weights: tuple[Tensor, Tensor], picked: Picked | None) -> Tensor:
        both, down = weights
        up = self.w3(x, both[:, : self.width], picked)
        gate = self.w1(x, both[:, self.width :], picked)
        out: Tensor = self.w2(up * F.silu(gate), down, picked)
        return out


class Router(nn.Module):
    """Which experts a token visits, and with what weights."""

    def __init__(self, hidden: int, count: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.wg = nn.Linear(hidden, count, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[batch, n, k]`` expert numbers, and their weights in float32, whose sum is 1."""
        probabilities = F.softmax(self.wg(x).to(torch.float32), dim=-1)
        shares, chosen = probabilities.topk(self.top_k, dim=-1)
        return chosen, shares / shares.sum(-1, keepdim=True).clamp(min=1e-8)


class MixtureOfExperts(nn.Module):
    """``shared_mlp(x)`` plus the routed experts."""

    def __init__(self, config: HunyuanConfig):
        super().__init__()
        self.shared_mlp = SharedMLP(config.hidden_size, config.shared_size)
        self.gate = Router(config.hidden_size, config.num_experts, config.top_k)
        block = block_size(config.num_experts, config.top_k, (config.base_size // config.downsample) ** 2)
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_size, block)

    def forward(self, x: Tensor) -> Tensor:
        chosen, shares = self.gate(x)
        shared: Tensor = self.shared_mlp(x)
        routed: Tensor = self.experts(x, chosen, shares)
        return shared + routed
