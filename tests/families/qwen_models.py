"""Tiny random Qwen-Image editing pipelines, saved as the public ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
WORDS = [
    "Describe the key features of the input image",
    "make it sepia",
    "a cat in the snow",
    "ugly, blurred",
]


def make_tokenizer() -> Any:
    """Qwen's kind, with merges learnt from a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, min_frequency=1, show_progress=False, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(WORDS, trainer)
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        additional_special_tokens=SPECIAL,
    )


def make_base(folder: Path, pipeline: str = "QwenImageEditPipeline", **transformer: Any) -> None:
    """A pipeline whose components are of the public ones' form: windows and one full block in the vision
    tower, two key heads' worth of queries, a VAE that halves twice, a schedule with a dynamic shift."""
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in [*SPECIAL, tokenizer.pad_token]}
    torch.manual_seed(0)
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer) + 4,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                "bos_token_id": ids[tokenizer.pad_token],
                "eos_token_id": ids["<|im_end|>"],
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.2, 1.0],
    )
    settings = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    denoiser = diffusers.QwenImageTransformer2DModel(**(settings | transformer))
    # The classes' own initial values are so small that prompts and pictures would change nothing.
    for module, gain in ((text_encoder, 1.0), (denoiser, 1.6), (vae, 1.3)):
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "gamma" not in name:
                # Of a kernel over frames, a still picture meets the last slice.
                fan = parameter[0, :, -1].numel() if parameter.ndim == 5 else parameter[0].numel()
                torch.nn.init.normal_(parameter, std=1.0 if "embed_tokens" in name else gain / fan**0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    made = getattr(diffusers, pipeline)(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=None,  # whose class asks for torchvision
        transformer=denoiser,
        scheduler=scheduler,
    )
    made.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    tokenizer.save_pretrained(folder / "processor")
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12845056)
    processor.save_pretrained(folder / "processor")
