"""The autoencoder: 3-D convolutions over frames, of which a picture is one.

Written for pictures: what a single frame goes through. The published encoder repeats the frame
``ffactor_temporal`` times and brings the frames down to one; the decoder makes ``ffactor_temporal`` frames
and the last is kept. Its graph takes the mean of the posterior, where the published code draws from it: two
edits of one photo then read the same latents.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from hywu_export.families.hunyuan.config import VAEConfig

_GROUPS = 32
_EPSILON = 1e-6


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, channels, _EPSILON)


class ResnetBlock(nn.Module):
    """Two norm-SiLU-convolution stages and a shortcut."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(out_channels)
        self.conv1 = nn.Conv3d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut: Tensor = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        out: Tensor = shortcut + h
        return out


class AttnBlock(nn.Module):
    """Attention over all positions, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v = (nn.Conv3d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (
            conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = x + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))
        return out


def _fold(x: Tensor, frames: int) -> Tensor:
    """Blocks of ``frames`` x 2 x 2 into channels: ``[B, C, t, h, w]`` to ``[B, frames*4*C, …]``."""
    batch, channels, t, h, w = x.shape
    x = x.reshape(batch, channels, t // frames, frames, h // 2, 2, w // 2, 2)
    return x.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(batch, -1, t // frames, h // 2, w // 2)


def _unfold(x: Tensor, frames: int) -> Tensor:
    """The inverse of `_fold`."""
    batch, channels, t, h, w = x.shape
    x = x.reshape(batch, frames, 2, 2, channels // (4 * frames), t, h, w)
    return x.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(batch, -1, t * frames, h * 2, w * 2)


class Downsample(nn.Module):
    """A convolution, folded; its shortcut is the folded input, averaged over groups of channels."""

    def __init__(self, channels: int, out_channels: int, frames: int):
        super().__init__()
        self.frames, self.group = frames, 4 * frames * channels // out_channels
        self.conv = nn.Conv3d(channels, out_channels // (4 * frames), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = _averaged(_fold(x, self.frames), self.group)
        return _fold(self.conv(x), self.frames) + shortcut


def _averaged(x: Tensor, group: int) -> Tensor:
    """The mean of every ``group`` channels that lie side by side."""
    batch, channels, t, h, w = x.shape
    return x.reshape(batch, channels // group, group, t, h, w).mean(2)


class Upsample(nn.Module):
    """A convolution, unfolded; its shortcut is the input with repeated channels, unfolded."""

    def __init__(self, channels: int, out_channels: int, frames: int):
        super().__init__()
        self.frames, self.repeats = frames, 4 * frames * out_channels // channels
        self.conv = nn.Conv3d(channels, out_channels * 4 * frames, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _unfold(self.conv(x), self.frames) + _unfold(_repeat(x, self.repeats), self.frames)


def _repeat(x: Tensor, times: int) -> Tensor:
    """Every channel ``times`` times, side by side."""
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1, -1).flatten(1, 2)


class Level(nn.Module):
    """The blocks of one resolution, and the change to the next."""

    def __init__(self, channels: int, out_channels: int, blocks: int):
        super().__init__()
        sizes = [channels, *[out_channels] * blocks]
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """Two blocks with attention between."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.block_2 = (ResnetBlock(channels, channels) for _ in range(2))
        self.attn_1 = AttnBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


def _levels(factor: int) -> int:
    """How many levels double or halve for a ``factor``, a power of two."""
    return factor.bit_length() - 1


class Encoder(nn.Module):
    """``[B, 3, frames, H, W]`` to the posterior's mean and log variance, in one frame."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        sizes = config.block_out_channels
        self.group = sizes[-1] // (2 * config.latent_channels)
        self.conv_in = nn.Conv3d(config.in_channels, sizes[0], 3, padding=1)
        spatial, temporal = _levels(config.ffactor_spatial), _levels(config.ffactor_temporal)
        self.down = nn.ModuleList()
        channels = sizes[0]
        for index, size in enumerate(sizes):
            level = Level(channels, size, config.layers_per_block)
            channels = size
            if index < spatial:
                channels = sizes[index + 1]
                level.downsample = Downsample(size, channels, 2 if index >= spatial - temporal else 1)
            self.down.append(level)
        self.mid = Middle(channels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv3d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        shortcut = _averaged(h, self.group)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h))) + shortcut
        return out


class Decoder(nn.Module):
    """Latents ``[B, C, 1, h, w]`` to frames ``[B, 3, frames, H, W]``; ``sizes`` of its levels are in the
    order of computation, widest first."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        sizes = config.block_out_channels[::-1]
        self.repeats = sizes[0] // config.latent_channels
        self.conv_in = nn.Conv3d(config.latent_channels, sizes[0], 3, padding=1)
        self.mid = Middle(sizes[0])
        spatial, temporal = _levels(config.ffactor_spatial), _levels(config.ffactor_temporal)
        self.up = nn.ModuleList()
        channels = sizes[0]
        for index, size in enumerate(sizes):
            level = Level(channels, size, config.layers_per_block + 1)
            channels = size
            if index < spatial:
                channels = sizes[index + 1]
                level.upsample = Upsample(size, channels, 2 if index < temporal else 1)
            self.up.append(level)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv3d(channels, config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents) + _repeat(latents, self.repeats))
        for level in self.up:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class VAE(nn.Module):
    """Pictures ``[B, 3, H, W]`` in -1..1 to scaled latents ``[B, C, h, w]``, and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, picture: Tensor) -> Tensor:
        frames = picture.unsqueeze(2).expand(-1, -1, self.config.ffactor_temporal, -1, -1)
        mean = self.encoder(frames)[:, : self.config.latent_channels, 0]
        return cast(Tensor, (mean - self.config.shift_factor) * self.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents / self.config.scaling_factor + self.config.shift_factor
        out: Tensor = self.decoder(scaled.unsqueeze(2))[:, :, -1]
        return out
