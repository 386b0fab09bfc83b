"""`StableDiffusionInstructPix2PixPipeline`: Stable Diffusion with a photo, one CLIP text encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from hywu_export.families.autoencoder import unscaled
from hywu_export.families.base import Plan
from hywu_export.families.components import read_config
from hywu_export.families.pix2pix import Pix2Pix, Shape, make_unet, make_vae
from hywu_export.tracing import GraphSpec, TensorSpec, fake_module
from hywu_runtime.errors import UnsupportedError
from hywu_runtime.manifest import ProvidedTensor

log = logging.getLogger(__name__)

# UNet settings that change its signature; InstructPix2Pix uses none of them.
_FOREIGN_UNET_SETTINGS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class TextEncoder(nn.Module):
    """Token ids ``[B, L]`` to hidden states ``[B, L, C]``."""

    def __init__(self, text_encoder: CLIPTextModel):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        return (self.text_encoder(input_ids, attention_mask=attention_mask)[0],)


class InstructPix2Pix(Pix2Pix):
    """The family of ``StableDiffusionInstructPix2PixPipeline``. A safety checker stays outside the bundle."""

    pipeline_class = "StableDiffusionInstructPix2PixPipeline"
    text_scale = 7.5
    tokenizers = {"input_ids": ("main", "tokenizer")}  # noqa: RUF012

    def __init__(self, folder: Path):
        super().__init__(folder)
        hidden = int(self._text_config.hidden_size)
        self._check_unet("cross_attention_dim", hidden, f"the text encoder's {hidden} channels")
        checker = read_config(folder / "model_index.json").get("safety_checker")
        if isinstance(checker, list) and any(checker):
            log.warning("The safety checker of %s is not exported: look after what the bundle makes", folder)

    def _parts(self) -> Mapping[str, Callable[[dict[str, Any]], nn.Module]]:
        return {"text_encoder": _make_text_encoder, "vae": make_vae, "unet": _make_unet}

    @property
    def _text_config(self) -> CLIPTextConfig:
        return self._components["text_encoder"].module.config

    @property
    def _masked(self) -> bool:
        """Whether the pipeline gives the text encoder its attention mask."""
        return bool(getattr(self._text_config, "use_attention_mask", False))

    @property
    def _conditions(self) -> Mapping[str, Shape]:
        length = self._length("text_encoder", "tokenizer")
        return {"embeds": ("batch", length, int(self._text_config.hidden_size))}

    def _text_encoder(self, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> GraphSpec:
        if self._masked:
            inputs = [*inputs, TensorSpec("attention_mask", "int64", inputs[0].shape)]
        module = TextEncoder(self._components["text_encoder"].module)
        return GraphSpec("text_encoder", module, inputs, outputs)

    def _tokens(self, plan: Plan, name: str, said: str | None, constant: str | None) -> dict[str, str]:
        inputs = super()._tokens(plan, name, said, constant)
        if self._masked:
            ids, mask = inputs["input_ids"], f"{name}.mask"
            plan.tensors[mask] = ProvidedTensor("int64", plan.tensors[ids].shape, "mask", of=ids)
            inputs["attention_mask"] = mask
        return inputs

    def _denoise(self, unet: Any, x: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        output: Tensor = unet(x, timestep, *conditions).sample
        return output

    def _unscale(self, latents: Tensor) -> Tensor:
        return unscaled(self._vae.config, latents)

    def _pipeline(self) -> Any:
        from diffusers import StableDiffusionInstructPix2PixPipeline

        return StableDiffusionInstructPix2PixPipeline.from_pretrained(
            self.folder, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
        )


def _make_text_encoder(config: dict[str, Any]) -> nn.Module:
    if config.get("model_type") not in (None, "clip_text_model"):
        raise UnsupportedError(
            f"The text encoder is a {config['model_type']}",
            "This pipeline's text encoder is a CLIPTextModel (clip_text_model)",
            "Export a pipeline with a CLIP text encoder",
        )
    module: nn.Module = fake_module(lambda: CLIPTextModel(CLIPTextConfig.from_dict(config)))
    return module


def _make_unet(config: dict[str, Any]) -> nn.Module:
    for setting in _FOREIGN_UNET_SETTINGS:
        if config.get(setting) is not None:
            raise UnsupportedError(
                f"The UNet's config.json sets {setting} to {config[setting]!r}",
                "An InstructPix2Pix UNet leaves it null",
                "Export a pipeline without it",
            )
    return make_unet(config)
