"""Train the demo's base editor and its parameter generator together, end to end.

The base never sees the instruction: its prompt is always empty. The generator reads the instruction and
the photo and emits deltas; the loss is the base's denoising loss with those deltas applied, as HY-WU is
trained. Some samples have their gate at 0 and the unedited photo as their target, so that without deltas the
base returns what it was given.

python -m demo.recipe.train_pair --photos DIR --work DIR --out DIR

There are two rounds. The second gives the hardest instruction a larger share.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.generator import GeneratorConfig, ParameterGenerator, TextImageConditionEncoder
from hywu_export.generator.condition import TextImageConditionConfig

from . import operations, photos
from .tokenizer import MAX_LENGTH, train_tokenizer
from .training import Checkpoint, run

WIDTH, RANK, TEXT_DIM, CONDITION_DIM = 128, 8, 64, 128
GROUPS, CROPS, PEAK_LR = 8, 3, 6e-4
STEPS, MORE_STEPS = 3200, 600  # the second round gives the hardest instruction the share that it needs
HARDEST, HARDEST_SHARE = "invert", 0.4
INFERENCE_STEPS = 2  # more cost PSNR: a sample is further from the exact result than the mean is
IDENTITY_SHARE = 0.1  # of the samples: gate 0, the photo itself as target

CARD = """---
license: apache-2.0
---

The {what} of the demo pair of hywu-export. `docs/demo.md` says how it was trained and how good it is.
"""

BLOCKS = (
    *(f"down_blocks.{i}.attentions.0" for i in range(3)),
    "mid_block.attentions.0",
    *(f"up_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)),
)
TARGETS = {  # name in the generator → (path inside a transformer block of the UNet, in, out)
    "proj_in": ("proj_in", WIDTH, WIDTH),
    "attn.to_q": ("transformer_blocks.0.attn1.to_q", WIDTH, WIDTH),
    "attn.to_k": ("transformer_blocks.0.attn1.to_k", WIDTH, WIDTH),
    "attn.to_v": ("transformer_blocks.0.attn1.to_v", WIDTH, WIDTH),
    "attn.to_out": ("transformer_blocks.0.attn1.to_out.0", WIDTH, WIDTH),
    "ff.in": ("transformer_blocks.0.ff.net.0.proj", WIDTH, 8 * WIDTH),
    "ff.out": ("transformer_blocks.0.ff.net.2", 4 * WIDTH, WIDTH),
    "proj_out": ("proj_out", WIDTH, WIDTH),
}


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=16,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(WIDTH,) * 3,
        layers_per_block=1,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,
        use_linear_projection=True,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=4 * TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_generator() -> tuple[ParameterGenerator, dict[str, str]]:
    """The generator, its deltas zero at first, and its map of target names to module paths."""
    torch.manual_seed(2)
    config = GeneratorConfig.from_dict(
        {
            "model_type": "parameter_generator",
            "token_dim": WIDTH,
            "output_dim": WIDTH,
            "rank": RANK,
            "alpha": 16,
            "input_dim": CONDITION_DIM,
            "dim_accumulation": 4,
            "d_model": 128,
            "head_dim": 32,
            "num_base_model_layers": len(BLOCKS),
            "num_pg_layers": 4,
            "prefix": "blocks.",
            "pg_mapping": {
                name: {"lora_A_dim": wide_in, "lora_B_dim": wide_out}
                for name, (_, wide_in, wide_out) in TARGETS.items()
            },
        }
    )
    generator = ParameterGenerator(config)
    model = generator.model
    torch.nn.init.normal_(model.proj_out_A.weight, std=0.02)
    torch.nn.init.zeros_(model.proj_out_A.bias)
    paths = {
        f"blocks.{layer}.{name}": f"{block}.{path}"
        for layer, block in enumerate(BLOCKS)
        for name, (path, _, _) in TARGETS.items()
    }
    return generator, paths


def make_scheduler() -> DDIMScheduler:
    """v-prediction down to zero signal: the first step from pure noise is already an estimate of the edit."""
    return DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


class Pair(torch.nn.Module):
    """All that is trained here, and the frozen VAE."""

    def __init__(self, base: Path):
        super().__init__()
        self.vae = AutoencoderKL.from_pretrained(base / "vae").requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        self.text_encoder = make_text_encoder(self.tokenizer)
        self.unet = make_unet()
        self.generator, self.paths = make_generator()
        torch.manual_seed(3)
        self.condition_encoder = TextImageConditionEncoder(
            TextImageConditionConfig(text_dim=TEXT_DIM, latent_channels=8, output_dim=CONDITION_DIM)
        )
        self.spec = DeltaSpec.from_generator(self.generator.config, self.paths, self.unet)
        self.injection = inject(self.unet, self.spec)

    def trained(self) -> torch.nn.ModuleDict:
        names = ("text_encoder", "unet", "generator", "condition_encoder")
        return torch.nn.ModuleDict({name: getattr(self, name) for name in names})

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """``[len(texts), 32, 64]``, the last hidden state."""
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids).last_hidden_state

    def deltas(self, texts: list[str], latents: torch.Tensor) -> dict[str, torch.Tensor]:
        """Deltas by the base's names, one set per text and image (``latents [B, 8, h, w]``, unscaled)."""
        made = self.generator.deltas(self.condition_encoder(self.encode_text(texts), latents))
        return {
            f"{self.paths[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value
            for name, value in made.items()
        }

    def denoise(self, noisy: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        context = self.encode_text([""]).expand(len(noisy), -1, -1)
        return self.unet(torch.cat([noisy, latents], 1), t, context).sample


def make_batch(
    pictures: list[np.ndarray], i: int, size: int
) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Instructions of the groups, sources and targets ``[GROUPS·CROPS, 3, size, size]`` in -1..1, gates."""
    rng = np.random.default_rng([2, i])
    texts, sources, targets, gates = [], [], [], []
    for _ in range(GROUPS):
        operation = operations.OPERATIONS[rng.integers(len(operations.OPERATIONS))]
        if i >= STEPS and rng.random() < HARDEST_SHARE:
            operation = operations.BY_NAME[HARDEST]
        texts.append(operation.phrasings[rng.integers(len(operation.phrasings))])
        picture = pictures[rng.integers(len(pictures))]
        crops = torch.stack([photos.random_crop(picture, size, rng) for _ in range(CROPS)])
        edited = operations.apply(operation.name, crops)
        keep = torch.from_numpy(rng.random(CROPS) < IDENTITY_SHARE)
        sources.append(crops)
        targets.append(torch.where(keep[:, None, None, None], crops, edited))
        gates.append(1.0 - keep.float())
    return texts, torch.cat(sources) * 2 - 1, torch.cat(targets) * 2 - 1, torch.cat(gates)


def learning_rate(i: int) -> float:
    """Share of the peak at step ``i``: in both rounds constant, then falling linearly over the last part."""
    if i < STEPS:
        return min(1.0, (i + 1) / 100, (STEPS - i) / (0.25 * STEPS))
    left = STEPS + MORE_STEPS - i
    return max(0.0, min(0.7, (i - STEPS + 1) / 30, 0.7 * left / (0.4 * MORE_STEPS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; a killed run resumes")
    parser.add_argument("--out", type=Path, required=True, help="has base/vae; the rest is added")
    args = parser.parse_args()

    base, out = args.out / "base", args.out / "generator"
    pictures = photos.load(args.photos / "train")
    train_tokenizer(
        [text for operation in operations.OPERATIONS for text in operation.phrasings], base / "tokenizer"
    )
    pair = Pair(base)
    trained = pair.trained()
    scheduler = make_scheduler()
    signal = scheduler.alphas_cumprod.sqrt()
    noise_level = (1 - scheduler.alphas_cumprod).sqrt()
    scaling = pair.vae.config.scaling_factor
    optimiser = torch.optim.AdamW(trained.parameters(), lr=PEAK_LR, weight_decay=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, learning_rate)

    def step(i: int) -> dict[str, float]:
        torch.manual_seed(i)
        texts, source, target, gate = make_batch(pictures, i, 64)
        count = len(source)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = pair.vae.encode(source).latent_dist.mode().float()
                clean = pair.vae.encode(target).latent_dist.mode().float() * scaling
            # The first crop of a group stands for the photo; its deltas serve the group's other crops too.
            made = pair.deltas(texts, latents[::CROPS])
            made = {name: value.repeat_interleave(CROPS, 0) for name, value in made.items()}
            # Mostly noisy: what the first step sees decides the edit. Pure noise for a quarter.
            t = (999 * torch.rand(count) ** 0.5).round().long()
            t = torch.where(torch.rand(count) < 0.25, 999, t)
            a, s = signal[t, None, None, None], noise_level[t, None, None, None]
            noise = torch.randn_like(clean)
            with pair.injection as injection:
                injection.set(made, gate)
                predicted = pair.denoise(a * clean + s * noise, t, latents)
        error = (predicted.float() - (a * noise - s * clean)).square().mean((1, 2, 3))
        loss = error.mean()
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        pure = error[(t == 999) & (gate > 0)]
        return {
            "loss": float(loss.detach()),
            "pure_noise": float(pure.mean().detach()) if len(pure) else float(loss.detach()),
            "norm": float(norm),
        }

    parts: dict[str, Any] = {"trained": trained, "optimiser": optimiser, "schedule": schedule}
    run(STEPS + MORE_STEPS, step, Checkpoint(args.work / "pair.pt", parts))
    save(pair, scheduler, base, out)


def save(pair: Pair, scheduler: DDIMScheduler, base: Path, out: Path) -> None:
    """The base as an FP16 diffusers pipeline and the generator in the HY-WU format."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    half = torch.float16
    StableDiffusionInstructPix2PixPipeline(
        vae=pair.vae.to(half),
        text_encoder=pair.text_encoder.to(half),
        tokenizer=pair.tokenizer,
        unet=pair.unet.to(half),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(base)
    # diffusers notes where the VAE was loaded from; that is nobody's business.
    file = base / "vae" / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
    file.write_text(json.dumps(config, indent=2) + "\n")
    pair.generator.save_pretrained(out, dtype=half)
    pair.condition_encoder.save_pretrained(out / "condition_encoder", dtype=half)
    defaults = {
        "base_prompt": "",
        "num_inference_steps": INFERENCE_STEPS,
        "guidance_scale": 1.0,
        "image_guidance_scale": 1.0,
    }
    for name, content in (("targets.json", pair.paths), ("generation_config.json", defaults)):
        (out / name).write_text(json.dumps(content, indent=1) + "\n")
    for folder, what in ((base, "base editor"), (out, "parameter generator")):
        (folder / "README.md").write_text(CARD.format(what=what))


if __name__ == "__main__":
    main()
