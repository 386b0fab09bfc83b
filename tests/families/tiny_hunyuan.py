"""A tiny random HunyuanImage-3.0-Instruct checkpoint and a generator for it, with published names
throughout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["HunyuanImage3ForCausalMM"],
    "model_type": "hunyuan_image_3_moe",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": [32, 32],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "use_qk_norm": True,
    "num_experts": 4,
    "num_shared_expert": [1, 1],
    "moe_topk": [2, 2],
    "use_mixed_mlp_moe": True,
    "vae_downsample_factor": [4, 4],
    "img_proj_type": "unet",
    "patch_size": 1,
    "patch_embed_hidden_dim": 32,
    "image_base_size": 64,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "cond_token_attn_type": "joint_full",
    "vae": {
        "latent_channels": 4,
        "block_out_channels": [32, 32, 64],
        "layers_per_block": 1,
        "ffactor_spatial": 4,
        "ffactor_temporal": 4,
        "scaling_factor": 0.8,
    },
    "vit": {
        "hidden_size": 16,
        "patch_size": 4,
        "num_channels": 3,
        "num_patches": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-6,
    },
    "vit_processor": {"patch_size": 4, "max_num_patches": 12},
}
GENERATION = {
    "diff_infer_steps": 3,
    "diff_guidance_scale": 2.5,
    "flow_shift": 3.0,
    "use_system_prompt": "en_unified",
}
SYSTEM = '"""texts"""\nunified_system_prompt_en = """\nyou edit photos\n"""\nother_prompt_en = "no"\n'
_SPECIAL = ["<boi>", "<eoi>", "<cfg>", "<joint_img_sep>", "<img_size_64>", "<answer>", "</answer>"]
_SPECIAL += ["<think>", "</think>", "<recaption>", "</recaption>", *(f"<img_ratio_{i}>" for i in range(37))]
WORDS = ["you", "edit", "photos", "User:", "Assistant:", "make", "it", "sepia", "red", "blur", "why", "warm"]


def make_base(folder: Path, seed: int = 0, **settings: Any) -> None:
    """A checkpoint with random weights; ``settings`` replace some of CONFIG."""
    import torch
    from safetensors.torch import save_file

    from hywu_export.families.hunyuan.config import HunyuanConfig
    from hywu_export.families.hunyuan.model import HunyuanImage3

    config = CONFIG | settings
    torch.manual_seed(seed)
    network = HunyuanImage3(HunyuanConfig.from_dict(config))
    for name, parameter in network.named_parameters():
        if "experts." in name:  # torch.empty
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "system_prompt.py").write_text(SYSTEM)
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """Whole words, line breaks and the special tokens; as published, with a beginning of text of its own."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<unk>", "\n\n", *_SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|[^\s]+"), "removed", invert=True)
    tokenizer.add_special_tokens(["<pad>", "<bos>", *_SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def make_generator(folder: Path, seed: int = 1) -> None:
    """A random generator with the published targets, for CONFIG."""
    import torch

    from hywu_export.generator import GeneratorConfig, ParameterGenerator

    hidden = CONFIG["hidden_size"]
    plain = {"lora_A_dim": hidden, "lora_B_dim": hidden}
    config = GeneratorConfig.from_dict(
        {
            "token_dim": 32,
            "output_dim": 32,
            "rank": 2,
            "alpha": 4,
            "input_dim": hidden,
            "dim_accumulation": 2,
            "d_model": 16,
            "head_dim": 8,
            "num_base_model_layers": 2,
            "num_pg_layers": 1,
            "prefix": "model.layers.",
            "pg_mapping": {
                "mlp.experts": {
                    "type": "grouped",
                    "num_experts": 4,
                    "sub_weights": {"w1": plain, "w2": plain, "w3": plain},
                },
                "mlp.shared_mlp.down_proj": plain,
                "mlp.shared_mlp.gate_and_up_proj": {"lora_A_dim": hidden, "lora_B_dim": 2 * hidden},
                "self_attn.o_proj": plain,
                "self_attn.qkv_proj": {"lora_A_dim": hidden, "lora_B_dim": 2 * hidden},
            },
        }
    )
    torch.manual_seed(seed)
    generator = ParameterGenerator(config)
    torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.2)
    generator.save_pretrained(folder)
