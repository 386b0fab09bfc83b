"""The decoder layers: grouped-query attention on 2-D rotary positions, and a mixture of experts."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hywu_export.families.hunyuan.config import HunyuanConfig
from hywu_export.families.hunyuan.experts import MixtureOfExperts
from hywu_export.families.hunyuan.rotary import Rotary, rotate

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer, each ``[batch, kv_heads, length, head_dim]``; keys are turned and normed."""


class RMSNorm(nn.Module):
    """``weight * (x / sqrt(mean(x²) + eps))`` over the last axis, the quotient in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class Attention(nn.Module):
    """Queries of ``heads``, keys and values of ``kv_heads``; rotary first, then a norm per head."""

    def __init__(self, config: HunyuanConfig):
        super().__init__()
        self.kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        self.group = config.num_heads // config.num_kv_heads
        width = config.num_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width + 2 * self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim, config.norm_eps)
        self.key_layernorm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Attend from ``x`` ``[batch, n, hidden]`` to ``past`` and to itself.

        ``mask`` is boolean, ``[1 or batch, 1, n, past length + n]``, true where a query may attend. Returns
        the output, and the keys and values of ``x`` alone.
        """
        # Per key-value head: its queries, its key, its value.
        heads = self.qkv_proj(x).unflatten(-1, (self.kv_heads, self.group + 2, self.head_dim))
        query = heads[:, :, :, : self.group].flatten(2, 3).transpose(1, 2)
        key, value = (heads[:, :, :, self.group + i].transpose(1, 2) for i in (0, 1))
        query = self.query_layernorm(rotate(query, rotary))
        key = self.key_layernorm(rotate(key, rotary))
        own = (key, value)
        if past is not None:
            key, value = (torch.cat([before, now], dim=2) for before, now in zip(past, own))
        attended = F.scaled_dot_product_attention(query, self._spread(key), self._spread(value), mask)
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out, own

    def _spread(self, x: Tensor) -> Tensor:
        """``[batch, kv_heads, n, d]`` to ``[batch, heads, n, d]``: a head for each of its queries."""
        return x.unsqueeze(2).expand(-1, -1, self.group, -1, -1).flatten(1, 2)


class DecoderLayer(nn.Module):
    """Two pre-norm residual branches."""

    def __init__(self, config: HunyuanConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MixtureOfExperts(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        attended, own = self.self_attn(self.input_layernorm(x), rotary, mask, past)
        x = x + attended
        transformed: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + transformed, own


class Decoder(nn.Module):
    """Token embeddings, layers, and the final norm, which edits do not use: they read the last layer's
    output."""

    def __init__(self, config: HunyuanConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.norm_eps)

    @property
    def typed_layers(self) -> list[DecoderLayer]:
        """The layers, as what they are rather than as plain modules."""
        return cast("list[DecoderLayer]", list(self.layers))

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the layers on ``x`` ``[batch, n, hidden]``.

        Returns the last layer's output before the final norm, and each layer's keys and values of ``x``.
        """
        made: list[KeyValue] = []
        for index, layer in enumerate(self.typed_layers):
            x, own = layer(x, rotary, mask, None if past is None else past[index])
            made.append(own)
        return x, made
