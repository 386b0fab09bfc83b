"""Between latents and tokens: timestep embeddings, the patch embedding, the final layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_SINUSOID = 256
_GROUPS = 32
_EPSILON = 1e-5


class TimestepEmbedder(nn.Module):
    """Timesteps ``[n]`` (0 to 1000) to ``[n, width]``: a sinusoid of 256 (cosines, then sines) and an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_SINUSOID, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        half = _SINUSOID // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        phases = timestep.to(torch.float32).unsqueeze(-1) * frequencies
        out: Tensor = self.mlp(torch.cat([phases.cos(), phases.sin()], dim=-1))
        return out


class ResBlock(nn.Module):
    """A convolutional residual block whose second norm is scaled and shifted by an embedding."""

    def __init__(self, channels: int, embedding: int, out_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, channels, _EPSILON),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(_GROUPS, out_channels, _EPSILON),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` ``[batch, channels, h, w]``, ``embedding`` ``[1 or batch, width]``."""
        scale, shift = self.emb_layers(embedding)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[0](self.in_layers(x)) * (1 + scale) + shift
        out: Tensor = self.skip_connection(x) + self.out_layers[1:](h)
        return out


class PatchEmbed(nn.Module):
    """Latents ``[batch, channels, h, w]`` to tokens ``[batch, h * w, hidden]``."""

    def __init__(self, channels: int, inner: int, hidden: int):
        super().__init__()
        self.model = nn.ModuleList(
            [nn.Conv2d(channels, inner, 3, padding=1), ResBlock(inner, hidden, hidden)]
        )

    def forward(self, latents: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.model[1](self.model[0](latents), embedding)
        return out.flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    """Tokens ``[batch, h * w, hidden]`` to a velocity ``[batch, channels, h, w]``."""

    def __init__(self, hidden: int, inner: int, channels: int):
        super().__init__()
        out = nn.Sequential(
            nn.GroupNorm(_GROUPS, inner, _EPSILON), nn.SiLU(), nn.Conv2d(inner, channels, 3, padding=1)
        )
        self.model = nn.ModuleList([ResBlock(hidden, hidden, inner), out])

    def forward(self, tokens: Tensor, embedding: Tensor, height: int, width: int) -> Tensor:
        batch, _, channels = tokens.shape
        x = tokens.transpose(1, 2).reshape(batch, channels, height, width)
        out: Tensor = self.model[1](self.model[0](x, embedding))
        return out


class Aligner(nn.Module):
    """Vision features to token embeddings."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out
