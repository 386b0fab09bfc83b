"""Checkpoints of full size that take no room: the header of every file is right, the data is a hole of zeros.

    python -m tools.sparse_checkpoints instruct-pix2pix OUT [--dtype float16]
    python -m tools.sparse_checkpoints hywu-generator OUT [--blocks 24] [--width 4096]
    python -m tools.sparse_checkpoints hunyuan-image3 OUT [--layers 32] [--experts 64]

They have the names, shapes, dtypes and files of the public checkpoints, and load as these do, so exports of
full size can be measured on any machine. The names come from the model classes themselves, made without data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import torch

SHARD_BYTES = "5GB"  # what save_pretrained writes at most into one file
_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}

# The public configuration, timbrooks/instruct-pix2pix.
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 8,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "attention_head_dim": 8,  # of this class of models, the number of heads
    "cross_attention_dim": 768,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER: dict[str, Any] = {  # CLIP ViT-L/14
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
SCHEDULER: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

# The default configuration of HY-WU's parameter generator, keys sorted as in the released file.
GENERATOR: dict[str, Any] = {
    "alpha": 64,
    "architectures": ["ParameterGenerator"],
    "d_model": 4096,
    "dim_accumulation": 4,
    "dtype": "float32",
    "head_dim": 128,
    "input_dim": 4096,
    "model_type": "parameter_generator",
    "num_base_model_layers": 32,
    "num_pg_layers": 24,
    "output_dim": 1024,
    "pg_mapping": {
        "mlp.experts": {
            "num_experts": 64,
            "sub_weights": {
                "w1": {"lora_A_dim": 4096, "lora_B_dim": 3072},
                "w2": {"lora_A_dim": 3072, "lora_B_dim": 4096},
                "w3": {"lora_A_dim": 4096, "lora_B_dim": 3072},
            },
            "type": "grouped",
        },
        "mlp.shared_mlp.down_proj": {"lora_A_dim": 3072, "lora_B_dim": 4096},
        "mlp.shared_mlp.gate_and_up_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
        "self_attn.o_proj": {"lora_A_dim": 4096, "lora_B_dim": 4096},
        "self_attn.qkv_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
    },
    "prefix": "model.layers.",
    "rank": 16,
    "token_dim": 1024,
}

# The public configuration of HunyuanImage-3.0-Instruct: 80 billion parameters, 13 of them used for a token.
HUNYUAN: dict[str, Any] = {
    "architectures": ["HunyuanImage3ForCausalMM"],
    "model_type": "hunyuan_image_3_moe",
    "vocab_size": 133120,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attention_head_dim": 128,
    "num_experts": 64,
    "moe_topk": 8,
    "num_shared_expert": 1,
    "intermediate_size": 3072,
    "moe_intermediate_size": 3072,
    "max_position_embeddings": 22800,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "patch_embed_hidden_dim": 1024,
    "image_base_size": 1024,
    "vae_downsample_factor": [16, 16],
    "vae": {
        "latent_channels": 32,
        "block_out_channels": [128, 256, 512, 1024, 1024],
        "layers_per_block": 2,
        "ffactor_spatial": 16,
        "ffactor_temporal": 4,
        "scaling_factor": 0.562679178327931,
    },
    "vit": {  # SigLIP 2, so400m, patches of 16 pixels
        "hidden_size": 1152,
        "patch_size": 16,
        "num_patches": 256,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
    },
    "vit_processor": {"max_num_patches": 1024},
    "bos_token_id": 127958,
    "eos_token_id": 127957,
    "pad_token_id": 128009,
}
HUNYUAN_TOKENS = {
    "<|startoftext|>": 127958, "<boi>": 128000, "<eoi>": 128001, "<img>": 128006, "<pad>": 128009,
    "<cfg>": 128010, "<timestep>": 128017, "<recaption>": 128018, "</recaption>": 128019,
    "<joint_img_sep>": 128022, "<think>": 128023, "</think>": 128024, "<answer>": 128025,
    "</answer>": 128026, "<img_size_1024>": 128037,
    **{f"<img_ratio_{i}>": 128044 + i for i in range(33)},
    **{f"<img_ratio_{i}>": 130103 + i - 33 for i in range(33, 37)},
}  # fmt: skip


def write_instruct_pix2pix(out: Path, dtype: str = "float32", unet: Mapping[str, Any] | None = None) -> None:
    """Write the pipeline folder ``out``; ``unet`` replaces settings of the UNet."""
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _clip_tokenizer()
    scheduler = EulerAncestralDiscreteScheduler(**SCHEDULER)
    with torch.device("meta"):
        pipeline = StableDiffusionInstructPix2PixPipeline(
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**UNET | dict(unet or {})),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    out.mkdir(parents=True, exist_ok=True)
    pipeline.save_config(out)
    scheduler.save_pretrained(out / "scheduler")
    tokenizer.save_pretrained(out / "tokenizer")
    pipeline.unet.save_config(out / "unet")
    pipeline.vae.save_config(out / "vae")
    pipeline.text_encoder.config.save_pretrained(out / "text_encoder")
    for file, module, public_name in (
        ("unet/diffusion_pytorch_model.safetensors", pipeline.unet, str),
        ("vae/diffusion_pytorch_model.safetensors", pipeline.vae, _public_vae_name),
        ("text_encoder/model.safetensors", pipeline.text_encoder, "text_model.{}".format),
    ):
        state = module.state_dict().items()
        write_sparse(out / file, _shapes((public_name(name), tensor) for name, tensor in state), dtype)


def write_generator(out: Path, dtype: str = "float32", settings: Mapping[str, Any] | None = None) -> None:
    """Write the generator folder ``out``, in shards with an index; ``settings`` replace some of GENERATOR."""
    from hywu_export.generator import GeneratorConfig, ParameterGenerator

    config = GENERATOR | {"dtype": dtype} | dict(settings or {})
    with torch.device("meta"):
        module = ParameterGenerator(GeneratorConfig.from_dict(config)).to(getattr(torch, dtype))
    # The release has hidden_in last, which decides where its shards are cut.
    state = dict(sorted(module.state_dict().items(), key=lambda item: item[0].startswith("hidden_in")))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_shards(out, state, dtype)


def write_hunyuan_image3(
    out: Path, dtype: str = "bfloat16", settings: Mapping[str, Any] | None = None
) -> None:
    """Write the folder ``out`` of HunyuanImage-3.0-Instruct, in shards; ``settings`` replace some of HUNYUAN.

    Its tokenizer has the special tokens under their numbers, and otherwise letters alone.
    """
    from hywu_export.families.hunyuan.config import HunyuanConfig
    from hywu_export.families.hunyuan.model import HunyuanImage3

    config = HUNYUAN | dict(settings or {})
    with torch.device("meta"):
        module = HunyuanImage3(HunyuanConfig.from_dict(config)).to(getattr(torch, dtype))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"diff_infer_steps": 50, "diff_guidance_scale": 2.5, "flow_shift": 3.0}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _write_letters(out / "tokenizer.json", HUNYUAN_TOKENS)
    _write_shards(out, module.state_dict(), dtype)


def _write_shards(out: Path, state: Mapping[str, torch.Tensor], dtype: str) -> None:
    """The files ``model*.safetensors``, with an index if there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    for file, names in split.filename_to_tensors.items():
        write_sparse(out / file, _shapes((name, state[name]) for name in names), dtype)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "float32") -> None:
    """Write a safetensors file with these tensors, all of them zeros that take no room on the disk."""
    code, itemsize = _DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + itemsize * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _public_vae_name(name: str) -> str:
    """As the VAE of 2022 called its attention."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _shapes(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _clip_tokenizer() -> Any:
    """CLIP's tokenizer with a vocabulary of single bytes, and the length limit of the real one."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[], model_max_length=TEXT_ENCODER["max_position_embeddings"]
    )


def _write_letters(path: Path, special: Mapping[str, int]) -> None:
    """A tokenizer of single bytes, with these tokens beside them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | dict(special)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(path))


@click.group(help=__doc__)
def main() -> None: ...


_out = click.argument("out", type=click.Path(path_type=Path))
_dtype = click.option("--dtype", type=click.Choice(list(_DTYPES)), default="float32", show_default=True)


@main.command("instruct-pix2pix")
@_out
@_dtype
def _instruct_pix2pix(out: Path, dtype: str) -> None:
    """The pipeline folder of the public InstructPix2Pix."""
    write_instruct_pix2pix(out, dtype)


@main.command("hywu-generator")
@_out
@_dtype
@click.option("--blocks", default=GENERATOR["num_pg_layers"], show_default=True)
@click.option("--width", default=GENERATOR["d_model"], show_default=True)
def _hywu_generator(out: Path, dtype: str, blocks: int, width: int) -> None:
    """The default parameter generator."""
    write_generator(out, dtype, {"num_pg_layers": blocks, "d_model": width})


@main.command("hunyuan-image3")
@_out
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bfloat16", show_default=True)
@click.option("--layers", default=HUNYUAN["num_hidden_layers"], show_default=True)
@click.option("--experts", default=HUNYUAN["num_experts"], show_default=True)
def _hunyuan_image3(out: Path, dtype: str, layers: int, experts: int) -> None:
    """The public HunyuanImage-3.0-Instruct."""
    write_hunyuan_image3(out, dtype, {"num_hidden_layers": layers, "num_experts": experts})


if __name__ == "__main__":
    main()
