"""The configuration of a HunyuanImage-3.0 checkpoint, as its ``config.json`` states it.

Two things the public files leave open are settled by the file itself: ``cond_token_attn_type`` (``full``:
the VAE tokens and the ViT tokens of a reference picture attend among themselves; ``joint_full``: all of
them, with the separator, among each other) and whether there is a VAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hywu_runtime.errors import CheckpointError, UnsupportedError

# Settings that change the network and have one value in every published checkpoint.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_qk_norm": (True,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_mixed_mlp_moe": (True,),
    "moe_layer_num_skipped": (0,),
    "img_proj_type": ("unet",),
    "patch_size": (1,),
    "rope_type": ("2d",),
    "cond_image_type": ("vae_vit",),
    "norm_topk_prob": (True,),
    "use_cla": (False,),
    "use_mla": (False,),
    "tie_word_embeddings": (False,),
}
_ATTENTION_TYPES = ("full", "joint_full")


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP 2 vision transformer: sizes, and how many patches a picture is cut into at most."""

    hidden_size: int
    patch_size: int
    num_channels: int
    num_patches: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float
    max_num_patches: int

    @property
    def patch_features(self) -> int:
        """Numbers of one patch: rows, columns, channels."""
        return self.patch_size**2 * self.num_channels


@dataclass(frozen=True)
class VAEConfig:
    """The 3-D convolutional autoencoder; a picture is one frame."""

    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    ffactor_spatial: int
    ffactor_temporal: int
    scaling_factor: float
    shift_factor: float
    in_channels: int = 3
    out_channels: int = 3


@dataclass(frozen=True)
class HunyuanConfig:
    """Sizes of the whole network."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    patch_hidden: int
    base_size: int
    latent_channels: int
    downsample: int
    joint_attention: bool
    vision: VisionConfig
    vae: VAEConfig | None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HunyuanConfig:
        """Read the settings of ``config.json``.

        Raises:
            CheckpointError: a setting is missing or of another type.
            UnsupportedError: the network is another than the published one.
        """
        for key, allowed in _FIXED.items():
            if data.get(key, allowed[0]) not in allowed:
                raise UnsupportedError(
                    f"config.json sets {key} to {data[key]!r}",
                    f"HunyuanImage-3.0-Instruct has {allowed[0]!r}",
                    "Export a checkpoint of that network",
                )
        attention = data.get("cond_token_attn_type", "full")
        if attention not in _ATTENTION_TYPES:
            raise UnsupportedError(
                f"config.json sets cond_token_attn_type to {attention!r}",
                f"Expected {' or '.join(map(repr, _ATTENTION_TYPES))}",
                "Export a checkpoint with one of them",
            )
        try:
            return cls._read(data, attention == "joint_full")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"config.json cannot be read: {type(error).__name__} {error}",
                "The settings of a HunyuanImage-3.0 checkpoint",
                "Fetch the checkpoint whole",
            ) from error

    @classmethod
    def _read(cls, data: Mapping[str, Any], joint: bool) -> HunyuanConfig:
        hidden, heads = int(data["hidden_size"]), int(data["num_attention_heads"])
        expert_size = _uniform(data, "moe_intermediate_size", data.get("intermediate_size"))
        factors = set(data.get("vae_downsample_factor", (16, 16)))
        if len(factors) != 1:
            raise ValueError("vae_downsample_factor differs between height and width")
        vae = dict(data["vae"])
        return cls(
            vocab_size=int(data["vocab_size"]),
            hidden_size=hidden,
            num_layers=int(data["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(data.get("num_key_value_heads") or heads),
            head_dim=int(data.get("attention_head_dim") or hidden // heads),
            num_experts=_uniform(data, "num_experts"),
            top_k=_uniform(data, "moe_topk"),
            expert_size=expert_size,
            # Several shared experts are one that is wider.
            shared_size=expert_size * _uniform(data, "num_shared_expert", 1),
            norm_eps=float(data.get("rms_norm_eps", 1e-5)),
            rope_theta=float(data.get("rope_theta", 1e4)),
            max_positions=int(data["max_position_embeddings"]),
            patch_hidden=int(data.get("patch_embed_hidden_dim", 1024)),
            base_size=int(data.get("image_base_size", 1024)),
            latent_channels=int(vae["latent_channels"]),
            downsample=int(factors.pop()),
            joint_attention=joint,
            vision=_vision(data["vit"], data["vit_processor"]),
            vae=_vae(vae) if "block_out_channels" in vae else None,
        )


def _uniform(data: Mapping[str, Any], key: str, default: Any = None) -> int:
    """A number that may be given once or per layer; all layers of this network are alike."""
    value = data.get(key)
    value = default if value is None else value
    values = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(values) != 1:
        raise ValueError(f"{key} differs between layers")
    return int(values.pop())


def _vision(data: Mapping[str, Any], processor: Mapping[str, Any]) -> VisionConfig:
    return VisionConfig(
        hidden_size=int(data["hidden_size"]),
        patch_size=int(data["patch_size"]),
        num_channels=int(data.get("num_channels", 3)),
        num_patches=int(data["num_patches"]),
        num_hidden_layers=int(data["num_hidden_layers"]),
        num_attention_heads=int(data["num_attention_heads"]),
        intermediate_size=int(data["intermediate_size"]),
        layer_norm_eps=float(data.get("layer_norm_eps", 1e-6)),
        max_num_patches=int(processor["max_num_patches"]),
    )


def _vae(data: Mapping[str, Any]) -> VAEConfig:
    return VAEConfig(
        latent_channels=int(data["latent_channels"]),
        block_out_channels=tuple(map(int, data["block_out_channels"])),
        layers_per_block=int(data.get("layers_per_block", 2)),
        ffactor_spatial=int(data.get("ffactor_spatial", 16)),
        ffactor_temporal=int(data.get("ffactor_temporal", 4)),
        scaling_factor=float(data.get("scaling_factor") or 1.0),
        shift_factor=float(data.get("shift_factor") or 0.0),
        in_channels=int(data.get("in_channels", 3)),
        out_channels=int(data.get("out_channels", 3)),
    )
