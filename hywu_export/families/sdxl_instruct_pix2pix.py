"""`StableDiffusionXLInstructPix2PixPipeline`: SDXL with a photo, two CLIP text encoders.

What SDXL adds: hidden states of both text encoders side by side, the second one's pooled output, and the
picture's size as numbers (Podell et al., arXiv 2307.01952).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hywu_export.deltas import DeltaSpec
from hywu_export.families.autoencoder import denormalized
from hywu_export.families.base import Limits, Plan
from hywu_export.families.clip import penultimate, penultimate_and_pooled
from hywu_export.families.components import read_config
from hywu_export.families.pix2pix import Pix2Pix, Shape, make_unet, make_vae
from hywu_export.tracing import GraphSpec, TensorSpec, fake_module
from hywu_runtime.errors import CheckpointError, UnsupportedError
from hywu_runtime.manifest import Call, ProvidedTensor

log = logging.getLogger(__name__)

# UNet settings that change its signature; SDXL's sets the first to "text_time", and uses none of the others.
_SETTINGS = {
    "addition_embed_type": "text_time",
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "num_class_embeds": None,
    "time_cond_proj_dim": None,
}
_SIZES = 6  # numbers that tell the UNet of sizes: original size, crop, target size, two each


class TextEncoders(nn.Module):
    """Token ids ``[B, L]`` of both tokenizers to hidden states ``[B, L, C1 + C2]`` and the pooled ``[B, P]``.

    Hidden states are those before the last layer, the first encoder's first.
    """

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection):
        super().__init__()
        self.text_encoder = first
        self.text_encoder_2 = second

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        states, pooled = penultimate_and_pooled(self.text_encoder_2, input_ids_2)
        return torch.cat([penultimate(self.text_encoder, input_ids), states], -1), pooled


class DropEmpty(nn.Module):
    """Zeros in place of the embeddings ``[B, L, C]`` and the pooled ``[B, P]`` of prompts that say nothing.

    That is ``force_zeros_for_empty_prompt``, which the pipeline applies where no negative prompt is given.
    ``empty`` are the token ids ``[B, L]`` of a prompt without a word.
    """

    def forward(self, embeds: Tensor, pooled: Tensor, ids: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        said = (ids != empty).to(embeds.dtype).amax(dim=1)
        return embeds * said[:, None, None], pooled * said[:, None]


class SdxlInstructPix2Pix(Pix2Pix):
    """The family of ``StableDiffusionXLInstructPix2PixPipeline``.

    As the pipeline does unless it is told otherwise, the bundle gives both text encoders one prompt, and the
    UNet the picture's own size as that of the original, without a crop. It adds no invisible watermark.
    """

    pipeline_class = "StableDiffusionXLInstructPix2PixPipeline"
    text_scale = 5.0
    tokenizers = {  # noqa: RUF012
        "input_ids": ("main", "tokenizer"),
        "input_ids_2": ("second", "tokenizer_2"),
    }

    def __init__(self, folder: Path):
        self._config = read_config(folder / "model_index.json")
        super().__init__(folder)
        width = sum(int(config.hidden_size) for config in self._text_configs)
        self._check_unet("cross_attention_dim", width, f"the {width} channels of both text encoders")
        numbers = _SIZES * int(self._unet.config.addition_time_embed_dim)
        projection = int(self._text_configs[1].projection_dim)
        self._check_unet(
            "projection_class_embeddings_input_dim",
            numbers + projection,
            f"{numbers} for the picture's sizes, and the second text encoder's projection of {projection}",
        )
        first, second = (
            self._length(encoder, folder)
            for encoder, (_, folder) in zip(("text_encoder", "text_encoder_2"), self.tokenizers.values())
        )
        if first != second:
            raise CheckpointError(
                f"The tokenizers in {folder} give {first} and {second} tokens",
                "Their hidden states stand side by side, so both give as many",
                "Check that the components belong together",
            )

    def _parts(self) -> Mapping[str, Callable[[dict[str, Any]], nn.Module]]:
        return {
            "text_encoder": _make_first,
            "text_encoder_2": _make_second,
            "vae": make_vae,
            "unet": _make_unet,
        }

    @property
    def _text_configs(self) -> tuple[CLIPTextConfig, CLIPTextConfig]:
        first, second = (self._components[name].module.config for name in ("text_encoder", "text_encoder_2"))
        return first, second

    @property
    def _conditions(self) -> Mapping[str, Shape]:
        first, second = self._text_configs
        length = self._length("text_encoder", "tokenizer")
        return {
            "embeds": ("batch", length, int(first.hidden_size) + int(second.hidden_size)),
            "pooled": ("batch", int(second.projection_dim)),
        }

    def _text_encoder(self, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> GraphSpec:
        parts = (self._components[name].module for name in ("text_encoder", "text_encoder_2"))
        return GraphSpec("text_encoder", TextEncoders(*parts), inputs, outputs)

    @property
    def _zeros_for_empty(self) -> bool:
        return bool(self._config.get("force_zeros_for_empty_prompt", True))

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        plan = super().plan(spec, limits, base_prompt, coefficients)
        if self._zeros_for_empty:
            ids = TensorSpec("ids", "int64", self._conditions["embeds"][:2])
            encoded = [TensorSpec(name, "float32", shape) for name, shape in self._conditions.items()]
            kept = [TensorSpec(f"{spec.name}.kept", spec.dtype, spec.shape) for spec in encoded]
            empty = TensorSpec("empty.ids", ids.dtype, ids.shape)
            plan.graphs.append(GraphSpec("drop_empty", DropEmpty(), [*encoded, ids, empty], kept))
        return plan

    def _encode_negative(self, plan: Plan) -> None:
        super()._encode_negative(plan)
        if not self._zeros_for_empty:
            return
        name = "negative_prompt"
        call = plan.program.pop()
        encoded = {condition: f"{name}.{condition}.encoded" for condition in self._conditions}
        plan.program.append(Call(call.graph, call.phase, call.inputs, encoded, call.guided))
        tokenizer, _ = self.tokenizers["input_ids"]
        plan.tensors["empty.ids"] = ProvidedTensor(
            "int64", self._conditions["embeds"][:2], "text", constant="", tokenizer=tokenizer
        )
        inputs = {**encoded, "ids": f"{name}.ids"}
        outputs = {f"{condition}.kept": f"{name}.{condition}" for condition in self._conditions}
        plan.program.append(Call("drop_empty", "request", inputs, outputs, guided=True))

    def _denoise(self, unet: Any, x: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        embeds, pooled = conditions
        height, width = (x.new_ones(x.shape[0], 1) * (self._factor * size) for size in x.shape[2:])
        zero = torch.zeros_like(height)
        sizes = torch.cat([height, width, zero, zero, height, width], 1)
        told = {"text_embeds": pooled, "time_ids": sizes}
        output: Tensor = unet(x, timestep, embeds, added_cond_kwargs=told).sample
        return output

    def _size(self, height: int, width: int) -> dict[str, int]:
        return {"height": height, "width": width}

    @property
    def _source_scale(self) -> float:
        # Pipelines made with is_cosxl_edit=True scale the source's latents; save_pretrained forgets it.
        return float(self._vae.config.scaling_factor) if self._config.get("is_cosxl_edit") else 1.0

    def _unscale(self, latents: Tensor) -> Tensor:
        return denormalized(self._vae.config, latents)

    def _pipeline(self) -> Any:
        from diffusers import StableDiffusionXLInstructPix2PixPipeline

        return StableDiffusionXLInstructPix2PixPipeline.from_pretrained(
            self.folder, torch_dtype=torch.float32, add_watermarker=False, local_files_only=True
        )


def _make_first(config: dict[str, Any]) -> nn.Module:
    _check_type(config, "first", "clip_text_model", "CLIPTextModel")
    module: nn.Module = fake_module(lambda: CLIPTextModel(CLIPTextConfig.from_dict(config)))
    return module


def _make_second(config: dict[str, Any]) -> nn.Module:
    _check_type(config, "second", "clip_text_model", "CLIPTextModelWithProjection")
    module: nn.Module = fake_module(lambda: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)))
    return module


def _check_type(config: Mapping[str, Any], which: str, expected: str, cls: str) -> None:
    if config.get("model_type") not in (None, expected):
        raise UnsupportedError(
            f"The {which} text encoder is a {config['model_type']}",
            f"This pipeline's {which} text encoder is a {cls} ({expected})",
            "Export a pipeline with CLIP text encoders",
        )


def _make_unet(config: dict[str, Any]) -> nn.Module:
    for setting, expected in _SETTINGS.items():
        if config.get(setting) != expected:
            raise UnsupportedError(
                f"The UNet's config.json sets {setting} to {config.get(setting)!r}",
                f"An SDXL UNet sets it to {expected!r}",
                "Export a pipeline with an SDXL UNet",
            )
    return make_unet(config)
