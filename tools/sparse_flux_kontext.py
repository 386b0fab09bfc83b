"""The public FLUX.1 Kontext at full size as sparse files, see `tools.sparse_checkpoints`.

python -m tools.sparse_flux_kontext OUT [--layers 19] [--single-layers 38]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from tools.sparse_checkpoints import TEXT_ENCODER, _clip_tokenizer, write_sparse

# The public configuration, black-forest-labs/FLUX.1-Kontext-dev.
TRANSFORMER: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
T5: dict[str, Any] = {  # T5 v1.1 XXL
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
VAE: dict[str, Any] = {
    "sample_size": 1024,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SCHEDULER: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0}
CLASSES = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_flux_kontext(out: Path, transformer: Mapping[str, Any] | None = None) -> None:
    """Write the pipeline folder ``out`` in BF16; ``transformer`` replaces settings of the transformer.

    Its tokenizers know letters alone.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip, t5 = CLIPTextConfig(**TEXT_ENCODER), T5Config(**T5)
    with torch.device("meta"):
        model = FluxTransformer2DModel(**TRANSFORMER | dict(transformer or {}))
        vae = AutoencoderKL(**VAE)
        text_encoder, text_encoder_2 = CLIPTextModel(clip), T5EncoderModel(t5)
    out.mkdir(parents=True, exist_ok=True)
    index = {"_class_name": "FluxKontextPipeline", **CLASSES}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(out / "scheduler")
    _clip_tokenizer().save_pretrained(out / "tokenizer")
    _t5_tokenizer().save_pretrained(out / "tokenizer_2")
    model.save_config(out / "transformer")
    vae.save_config(out / "vae")
    clip.save_pretrained(out / "text_encoder")
    t5.save_pretrained(out / "text_encoder_2")
    _write(out / "transformer", "diffusion_pytorch_model", model.state_dict(), "10GB")
    _write(out / "vae", "diffusion_pytorch_model", vae.state_dict())
    _write(
        out / "text_encoder", "model", {f"text_model.{k}": v for k, v in text_encoder.state_dict().items()}
    )
    # The embedding is tied; the file has one of its names.
    shared = {k: v for k, v in text_encoder_2.state_dict().items() if k != "encoder.embed_tokens.weight"}
    _write(out / "text_encoder_2", "model", shared, "5GB")


def _write(folder: Path, stem: str, state: Mapping[str, torch.Tensor], shard: str = "5GB") -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=shard
    )
    for file, names in split.filename_to_tensors.items():
        write_sparse(folder / file, {name: tuple(state[name].shape) for name in names}, "bfloat16")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=unigram, extra_ids=0, model_max_length=512)


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", default=TRANSFORMER["num_layers"], show_default=True)
@click.option("--single-layers", default=TRANSFORMER["num_single_layers"], show_default=True)
def main(out: Path, layers: int, single_layers: int) -> None:
    write_flux_kontext(out, {"num_layers": layers, "num_single_layers": single_layers})


if __name__ == "__main__":
    main()
