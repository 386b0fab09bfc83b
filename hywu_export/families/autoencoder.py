"""`AutoencoderKL` and its like between pixels and latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hywu_export.families.pixels import from_pixels, to_pixels


class ImageEncoder(nn.Module):
    """Pixels ``uint8 [B, H, W, 3]`` to the mode of the VAE's posterior, times ``scale``: ``[B, C, h, w]``."""

    def __init__(self, vae: Any, scale: float = 1.0):
        super().__init__()
        self.vae = vae
        self.scale = scale

    def forward(self, image: Tensor) -> tuple[Tensor]:
        latents: Tensor = self.vae.encode(from_pixels(image)).latent_dist.mode()
        return (latents if self.scale == 1 else latents * self.scale,)


class ImageDecoder(nn.Module):
    """Latents ``[B, C, h, w]``, as the sampler has them, to pixels ``uint8 [B, H, W, 3]``.

    ``unscale`` brings them to what the VAE decodes.
    """

    def __init__(self, vae: Any, unscale: Callable[[Tensor], Tensor]):
        super().__init__()
        self.vae = vae
        self.unscale = unscale

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (to_pixels(self.vae.decode(self.unscale(latents)).sample),)


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
