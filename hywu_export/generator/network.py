"""The parameter generator of HY-WU (arXiv 2603.07236): a condition in, low-rank weight deltas out.

Written from the published formulas. Everything is a primitive, real-valued operation on static or symbolic
shapes, so that ``torch.export`` gives a plain graph with a dynamic batch and a dynamic number of condition tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import GeneratorConfig
from .layout import TokenLayout

_NORM_EPSILON = 1e-6
_ROTARY_THETA = 10000.0

Rotary = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """``w * x / sqrt(mean(x²) + 1e-6)`` over the last axis, the mean in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + _NORM_EPSILON)
        return (wide * scale).to(x.dtype) * self.weight


def rotary_phases(positions: Tensor, dim: int) -> Tensor:
    """Phases ``position * 10000^(-2i/dim)`` of one rotary axis, float32 ``[len(positions), dim // 2]``."""
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    return positions.float()[:, None] * _ROTARY_THETA ** (-pairs / dim)


def rotary_table(phases: Tensor, dtype: torch.dtype) -> Rotary:
    """Cosine and sine of ``[length, pairs]`` phases, with an axis for the heads: ``[length, 1, pairs]``."""
    return phases.cos().to(dtype)[:, None], phases.sin().to(dtype)[:, None]


def grid_phases(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Phases of two axes, half of ``dim`` each, over a grid in row-major order: ``[rows * columns, dim // 2]``."""
    first = rotary_phases(rows, dim // 2)[:, None].expand(-1, len(columns), -1)
    second = rotary_phases(columns, dim // 2)[None].expand(len(rows), -1, -1)
    return torch.cat([first, second], dim=-1).flatten(0, 1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the interleaved pairs of the last axis of ``x`` ``[batch, length, heads, head_dim]``."""
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; no mask."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.W_q = nn.Linear(dim, dim)
        self.W_k = nn.Linear(dim, dim)
        self.W_v = nn.Linear(dim, dim)
        self.W_o = nn.Linear(dim, dim)

    def forward(self, x: Tensor, source: Tensor, rotary_q: Rotary, rotary_k: Rotary) -> Tensor:
        """Queries from ``x`` ``[batch, length, dim]``, keys and values from ``source`` ``[batch, other, dim]``."""
        heads = (-1, self.head_dim)
        query = rotate(self.W_q(x).unflatten(-1, heads), rotary_q).transpose(1, 2)
        key = rotate(self.W_k(source).unflatten(-1, heads), rotary_k).transpose(1, 2)
        value = self.W_v(source).unflatten(-1, heads).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.W_o(attended.transpose(1, 2).flatten(-2))
        return out


class FeedForward(nn.Module):
    """Two Linears with SiLU between, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.silu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Four pre-norm residual branches on tokens ``[batch, layers, hw, dim]``."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        dim = config.d_model
        self.self_attn_n = Attention(dim, config.head_dim)
        self.self_attn_hw = Attention(dim, config.head_dim)
        self.self_attn_cross = Attention(dim, config.head_dim)
        self.feed_forward = FeedForward(dim)
        self.norm1 = RMSNorm(dim)
        self.norm2 = RMSNorm(dim)
        self.norm3 = RMSNorm(dim)
        self.norm4 = RMSNorm(dim)

    def attend_tokens(self, x: Tensor, rotary_n: Rotary, rotary_hw: Rotary) -> Tensor:
        """The two self-attention branches: over the base layers, then over the tokens of each."""
        columns = self.norm1(x).transpose(1, 2)  # [batch, hw, layers, dim]
        flat = columns.flatten(0, 1)
        x = x + self.self_attn_n(flat, flat, rotary_n, rotary_n).view(columns.shape).transpose(1, 2)
        flat = self.norm2(x).flatten(0, 1)
        return x + self.self_attn_hw(flat, flat, rotary_hw, rotary_hw).view(x.shape)

    def attend_condition(self, x: Tensor, condition: Tensor, rotary_q: Rotary, rotary_k: Rotary) -> Tensor:
        """The cross-attention branch, all tokens against ``condition`` ``[batch, length, dim]``, and the MLP."""
        attended = self.self_attn_cross(self.norm3(x).flatten(1, 2), condition, rotary_q, rotary_k)
        x = x + attended.view(x.shape)
        x = x + self.feed_forward(self.norm4(x))
        return x


class TokenTransformer(nn.Module):
    """The generator without its input Linear; its names are those of the checkpoint under ``model.``."""

    def __init__(self, config: GeneratorConfig, layout: TokenLayout):
        super().__init__()
        chunk = config.d_model // config.dim_accumulation
        self.norm_input = RMSNorm(config.d_model)
        self.norm_tokens = RMSNorm(config.d_model)
        self.norm_final = RMSNorm(config.d_model)
        self.hw_pos = nn.Embedding(layout.t * config.rank, chunk)
        self.layer_pos = nn.Embedding(config.num_base_model_layers, chunk)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_pg_layers))
        self.proj_out_A = nn.Linear(chunk, config.output_dim)
        self.proj_out_B = nn.Linear(chunk, config.output_dim)


class ParameterGenerator(nn.Module):
    """Makes the deltas of every target of every base layer from a condition.

    A fresh generator gives B = 0, so that training starts from the base model as it is.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.layout = TokenLayout(config)
        self.hidden_in = nn.Linear(config.input_dim, config.d_model)
        self.model = TokenTransformer(config, self.layout)
        nn.init.zeros_(self.model.proj_out_B.weight)
        nn.init.zeros_(self.model.proj_out_B.bias)

    def forward(self, condition: Tensor) -> dict[str, Tensor]:
        """Deltas as the published model returns them.

        Args:
            condition: ``[B, L, input_dim]`` or ``[B, 1, L, input_dim]``.

        Returns:
            ``<prefix><layer>.<entry>.lora_A`` ``[B, (experts,) rank, in]`` and ``….lora_B``
            ``[B, (experts,) out, rank]``, and ``scale``, the number alpha / rank that B·A is multiplied with.
        """
        outputs = self._generate(condition, scale_b=1.0)
        outputs["scale"] = torch.tensor(self.config.scale, dtype=condition.dtype, device=condition.device)
        return outputs

    def deltas(self, condition: Tensor) -> dict[str, Tensor]:
        """As `forward`, but alpha / rank is already in B and there is no ``scale``."""
        return self._generate(condition, scale_b=self.config.scale)

    def _generate(self, condition: Tensor, scale_b: float) -> dict[str, Tensor]:
        model = self.model
        if condition.dim() == 4:
            condition = condition.squeeze(1)
        source = model.norm_input(self.hidden_in(condition))
        batch, length, _ = source.shape
        layers, hw = self.config.num_base_model_layers, self.layout.hw

        rotary_n, rotary_hw, rotary_q, rotary_k = self._rotary(length, source.dtype, source.device)
        x = self._start_tokens()
        for index, block in enumerate(model.blocks):
            x = block.attend_tokens(x, rotary_n, rotary_hw)
            if index == 0:  # up to here nothing depends on the condition, and one sample stands for all
                x = x.expand(batch, layers, hw, -1)
            x = block.attend_condition(x, source, rotary_q, rotary_k)
        return self._detokenise(model.norm_final(x), scale_b)

    def _start_tokens(self) -> Tensor:
        """Query tokens ``[1, layers, hw, d_model]``: the rows of one token lie side by side in its channels."""
        model = self.model
        rows = model.layer_pos.weight[:, None] + model.hw_pos.weight[None]
        tokens: Tensor = model.norm_tokens(rows.reshape(1, len(rows), self.layout.hw, self.config.d_model))
        return tokens

    def _rotary(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Rotary, ...]:
        """Tables of the layer axis, the token grid, the cross-attention's queries and its ``length`` keys."""

        def positions(count: int) -> Tensor:
            return torch.arange(count, device=device)

        dim, layout = self.config.head_dim, self.layout
        layers = positions(self.config.num_base_model_layers)
        keys = rotary_phases(positions(length) + max(layout.t, layout.w), dim // 2)
        phases = (
            rotary_phases(layers, dim),
            grid_phases(positions(layout.t), positions(layout.w), dim),
            grid_phases(layers, positions(layout.hw), dim),
            torch.cat([keys, keys], dim=-1),
        )
        return tuple(rotary_table(phase, dtype) for phase in phases)

    def _detokenise(self, x: Tensor, scale_b: float) -> dict[str, Tensor]:
        """Cut final tokens ``[B, layers, hw, d_model]`` into the tensors of the layout."""
        model, layout, config = self.model, self.layout, self.config
        batch, layers = x.shape[0], config.num_base_model_layers
        rows = x.reshape(batch, layers, layout.t * config.rank, -1)
        boundary = layout.t_a * config.rank
        numbers = {
            "A": model.proj_out_A(rows[:, :, :boundary]).flatten(2),
            "B": F.linear(
                rows[:, :, boundary:], model.proj_out_B.weight * scale_b, model.proj_out_B.bias * scale_b
            ).flatten(2),
        }
        outputs: dict[str, Tensor] = {}
        for slot in layout.slots:
            start = slot.offset * layout.area
            tensors = numbers[slot.kind][:, :, start : start + slot.size].reshape(batch, layers, *slot.shape)
            for layer, tensor in enumerate(tensors.unbind(1)):
                outputs[slot.key(config.prefix, layer)] = tensor
        return outputs
