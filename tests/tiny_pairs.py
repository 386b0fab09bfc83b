"""Small random models for tests: an InstructPix2Pix pipeline, and a generator for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ["make it sepia", "blur the photo", "a cat", "ugly"]
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1"]
LORA_TARGETS += ["downsamplers.0.conv"]
ONE_BLOCK: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (32,),
}
"""For `make_base`: the smallest UNet with attention, which is exported fastest."""


def make_base(folder: Path, seed: int = 0, **unet: Any) -> None:
    """A random ``StableDiffusionInstructPix2PixPipeline``: two levels, one with attention; factor-2 VAE."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from demo.recipe.tokenizer import train_tokenizer

    train_tokenizer(WORDS, folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 8,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**(settings | unet)),
        scheduler=EulerAncestralDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_generator(folder: Path, base: Path, seed: int = 1) -> None:
    """A random generator for the UNet's 32-channel query and value projections, and its encoder."""
    import torch
    from diffusers import UNet2DConditionModel

    from hywu_export.generator import GeneratorConfig, ParameterGenerator, TextImageConditionEncoder
    from hywu_export.generator.condition import TextImageConditionConfig

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    targets = [
        name
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "to_v")) and (module.in_features, module.out_features) == (32, 32)
    ]
    config = GeneratorConfig.from_dict(
        {
            "model_type": "parameter_generator",
            "token_dim": 16,
            "output_dim": 16,
            "rank": 4,
            "alpha": 8,
            "input_dim": 24,
            "dim_accumulation": 2,
            "d_model": 32,
            "head_dim": 8,
            "num_base_model_layers": len(targets),
            "num_pg_layers": 2,
            "prefix": "blocks.",
            "pg_mapping": {"projection": {"lora_A_dim": 32, "lora_B_dim": 32}},
        }
    )
    torch.manual_seed(seed)
    generator = ParameterGenerator(config)
    torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.1)
    generator.save_pretrained(folder)
    encoder = TextImageConditionEncoder(
        TextImageConditionConfig(text_dim=32, latent_channels=4, output_dim=24)
    )
    encoder.save_pretrained(folder / "condition_encoder")
    names = {f"blocks.{layer}.projection": name for layer, name in enumerate(targets)}
    (folder / "targets.json").write_text(json.dumps(names))
