"""The public Qwen-Image-Edit at full size as sparse files, see `tools.sparse_checkpoints`.

python -m tools.sparse_qwen_image OUT [--pipeline QwenImageEditPlusPipeline] [--layers 60]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from tools.sparse_checkpoints import SHARD_BYTES, write_sparse

TRANSFORMER: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
TEXT: dict[str, Any] = {  # Qwen2.5-VL-7B-Instruct
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "tokens_per_second": 2,
}
SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def write_qwen_image_edit(out: Path, pipeline: str = "QwenImageEditPipeline", layers: int = 60) -> None:
    """Write the pipeline folder ``out`` in BF16, as published: names of the text encoder are those of
    transformers before 4.52. Its tokenizer has letters and the special tokens alone."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageTransformer2DModel,
    )
    from tokenizers import pre_tokenizers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: number for number, letter in enumerate(letters)},
        merges=[],
        additional_special_tokens=SPECIAL,
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(**TRANSFORMER | {"num_layers": layers})
        text_encoder = Qwen2_5_VLForConditionalGeneration(config)
        vae = AutoencoderKLQwenImage()
    out.mkdir(parents=True, exist_ok=True)
    classes = {
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (out / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **classes}, indent=2) + "\n")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(out / "scheduler")
    tokenizer.save_pretrained(out / "tokenizer")
    (out / "processor").mkdir(exist_ok=True)
    (out / "processor" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    transformer.save_config(out / "transformer")
    vae.save_config(out / "vae")
    config.save_pretrained(out / "text_encoder")
    _write(out / "transformer", "diffusion_pytorch_model", transformer.state_dict())
    _write(out / "vae", "diffusion_pytorch_model", vae.state_dict())
    names = {name: _published(name) for name in text_encoder.state_dict()}
    _write(out / "text_encoder", "model", {names[name]: t for name, t in text_encoder.state_dict().items()})


def _published(name: str) -> str:
    for new, old in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def _write(folder: Path, stem: str, state: Mapping[str, torch.Tensor]) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        write_sparse(folder / file, {name: tuple(state[name].shape) for name in names}, "bfloat16")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--pipeline", default="QwenImageEditPipeline", show_default=True)
@click.option("--layers", default=TRANSFORMER["num_layers"], show_default=True)
def main(out: Path, pipeline: str, layers: int) -> None:
    write_qwen_image_edit(out, pipeline, layers)


if __name__ == "__main__":
    main()
