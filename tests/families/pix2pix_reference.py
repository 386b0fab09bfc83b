"""What the bundles are compared with: diffusers' pipeline, with deltas as PEFT adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hywu_runtime import Deltas


def photos(count: int, height: int = 32, width: int = 32, seed: int = 0) -> list[np.ndarray]:
    """Coarse random pictures, uint8 [H, W, 3]: large areas, edges, every brightness."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, height // 4, width // 4, 3), np.uint8)
    return list(coarse.repeat(4, axis=1).repeat(4, axis=2))


def draws(count: int, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """What a ``torch.Generator`` gives a pipeline that asks ``count`` times for noise of ``shape``."""
    generator = torch.Generator().manual_seed(seed)
    return np.stack([torch.randn(tuple(shape), generator=generator).numpy() for _ in range(count)])


def largest(got: Sequence[Any], expected: Sequence[Any]) -> int:
    """The largest difference between pictures, in levels."""
    assert [np.shape(picture) for picture in got] == [np.shape(picture) for picture in expected]
    return max(int(np.abs(np.int16(a) - np.int16(b)).max()) for a, b in zip(got, expected))


def random_deltas(
    spec: Any, seed: int = 0, scale: float = 0.3, rank: int | None = None, batch: int = 1
) -> Deltas:
    """Deltas for a manifest's ``deltas`` that change the picture; B is scaled, A is of unit size."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in spec.tensors.items():
        if name.endswith(".lora_A"):
            sizes, size = (rank or shape[0], *shape[1:]), 1 / np.sqrt(np.prod(shape[1:]))
        else:
            sizes, size = (shape[0], rank or shape[1]), scale
        tensors[name] = (rng.standard_normal((batch, *sizes)) * size).astype(np.float32)
    return Deltas(tensors)


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
        from peft import LoraConfig

        modules = [key.removesuffix(".lora_A") for key in deltas if key.endswith(".lora_A")]
        (rank,) = {deltas[f"{module}.lora_A"].shape[1] for module in modules}
        # lora_alpha is declared to be an integer, but is only ever divided by the rank.
        self.pipe.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank * strength, target_modules=modules), adapter_name=name
        )
        for module in modules:
            layer = self.pipe.unet.get_submodule(module)
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)[name].weight
                value = torch.from_numpy(deltas[f"{module}.{part}"][0].copy())
                weight.data.copy_(value.reshape(weight.shape))

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
