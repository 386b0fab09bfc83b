"""`AutoencoderKL` and its like between pixels and latents, whole or in tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hywu_export.families.pixels import from_pixels, to_pixels
from hywu_export.families.tiling import Tiles, in_tiles


class ImageEncoder(nn.Module):
    """Pixels ``uint8 [B, H, W, 3]`` to the mode of the VAE's posterior, times ``scale``: ``[B, C, h, w]``."""

    def __init__(self, vae: Any, scale: float = 1.0, tiles: Tiles | None = None):
        super().__init__()
        self.vae = vae
        self.scale = scale
        self.tiles = tiles

    def forward(self, image: Tensor) -> tuple[Tensor]:
        latents = encode(self.vae, from_pixels(image), self.tiles)
        return (latents if self.scale == 1 else latents * self.scale,)


class ImageDecoder(nn.Module):
    """Latents ``[B, C, h, w]``, as the sampler has them, to pixels ``uint8 [B, H, W, 3]``.

    ``unscale`` brings them to what the VAE decodes.
    """

    def __init__(self, vae: Any, unscale: Callable[[Tensor], Tensor], tiles: Tiles | None = None):
        super().__init__()
        self.vae = vae
        self.unscale = unscale
        self.tiles = tiles

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (to_pixels(decode(self.vae, self.unscale(latents), self.tiles)),)


def pixels_per_latent(vae: Any) -> int:
    """Of one side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def encode(vae: Any, image: Tensor, tiles: Tiles | None) -> Tensor:
    """The mode of the posterior ``[B, C, h, w]`` for ``image [B, 3, H, W]`` in -1..1."""

    def mode(part: Tensor) -> Tensor:
        latents: Tensor = vae.encode(part).latent_dist.mode()
        return latents

    return mode(image) if tiles is None else in_tiles(mode, image, tiles, pixels_per_latent(vae), 1)


def decode(vae: Any, latents: Tensor, tiles: Tiles | None) -> Tensor:
    """The picture ``[B, 3, H, W]`` in about -1..1 for ``latents [B, C, h, w]`` of the VAE's own scale."""

    def picture(part: Tensor) -> Tensor:
        image: Tensor = vae.decode(part).sample
        return image

    return picture(latents) if tiles is None else in_tiles(picture, latents, tiles, 1, pixels_per_latent(vae))


def unscaled(config: Any, latents: Tensor) -> Tensor:
    """Latents as Stable Diffusion's samplers have them, brought to the VAE's own scale."""
    scaled: Tensor = latents / config.scaling_factor
    return scaled


def denormalized(config: Any, latents: Tensor) -> Tensor:
    """As `unscaled`, but by mean and standard deviation of every channel where the configuration has both."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return unscaled(config, latents)
    mean, deviation = (
        torch.tensor(values, dtype=latents.dtype)[None, :, None, None] for values in (mean, deviation)
    )
    denormal: Tensor = latents * deviation / config.scaling_factor + mean
    return denormal
