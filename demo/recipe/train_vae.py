"""Train the demo's VAE: factor 4, 8 latent channels, 0.8 M parameters, mean squared error and a little KL.

python -m demo.recipe.train_vae --photos DIR --work DIR --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from . import operations, photos
from .training import Checkpoint, run

SIZE, BATCH, STEPS, PEAK_LR, KL_WEIGHT = 64, 16, 4000, 2.5e-3, 1e-4


def make_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; a killed run resumes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()

    pictures = photos.load(args.photos / "train")
    names = [operation.name for operation in operations.OPERATIONS]
    vae = make_vae()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, weight_decay=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_LR, total_steps=args.steps + 1, pct_start=0.1
    )

    def batch(i: int, size: int = BATCH) -> torch.Tensor:
        rng = np.random.default_rng([1, i])
        crops = []
        for _ in range(size):
            crop = photos.random_crop(pictures[rng.integers(len(pictures))], SIZE, rng)[None]
            # Half the crops are edited, so that the decoder can draw what the editor will ask for.
            if rng.random() < 0.5:
                crop = operations.apply(names[rng.integers(len(names))], crop)
            crops.append(crop)
        return torch.cat(crops) * 2 - 1

    def step(i: int) -> dict[str, float]:
        torch.manual_seed(i)
        x = batch(i)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        error = (y.float() - x).square().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        optimiser.zero_grad()
        (error + KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        return {"psnr_db": float(10 * torch.log10(4 / error.detach())), "kl": float(kl.detach())}

    parts = {"vae": vae, "optimiser": optimiser, "schedule": schedule}
    run(args.steps, step, Checkpoint(args.work / "vae.pt", parts))

    with torch.no_grad():
        latents = vae.encode(batch(-1 % 2**32, 256)).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    vae.save_pretrained(args.out / "vae")
    print("scaling factor", vae.config.scaling_factor)


if __name__ == "__main__":
    main()
