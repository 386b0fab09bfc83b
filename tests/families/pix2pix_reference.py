"""What the bundles are compared with: diffusers' pipeline, with deltas as PEFT adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from parity import add_adapter


class Reference:
    """``StableDiffusionInstructPix2PixPipeline`` from ``base``, called as an editor is called."""

    def __init__(self, base: Path, scheduler: str | None = None):
        import diffusers

        self.pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(base)
        self.pipe.set_progress_bar_config(disable=True)
        if scheduler is not None:
            self.pipe.scheduler = getattr(diffusers, scheduler).from_config(self.pipe.scheduler.config)

    def add_adapter(
        self, deltas: Mapping[str, np.ndarray], name: str = "default", strength: float = 1.0
    ) -> None:
        """Puts deltas with D = 1 into the UNet as the PEFT adapter ``name``, scaled by ``strength``."""
        add_adapter(self.pipe, "unet", deltas, name, strength)

    def __call__(
        self,
        requests: Sequence[tuple[np.ndarray, str]],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int,
        guidance: float = 5.0,
        image_guidance: float = 1.5,
        latents: np.ndarray,
        noise_seed: int = 0,
    ) -> list[np.ndarray]:
        from PIL import Image

        negatives = [negative_prompt] * len(requests) if isinstance(negative_prompt, str) else negative_prompt
        result = self.pipe(
            prompt=[prompt for _, prompt in requests],
            image=[Image.fromarray(photo) for photo, _ in requests],
            negative_prompt=list(negatives),
            num_inference_steps=steps,
            guidance_scale=guidance,
            image_guidance_scale=image_guidance,
            latents=torch.from_numpy(latents),
            generator=torch.Generator().manual_seed(noise_seed),
        )
        return [np.array(picture) for picture in result.images]
