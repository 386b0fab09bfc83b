"""`StableDiffusionInstructPix2PixPipeline`: a UNet that reads noisy latents beside the latents of the photo.

Three guidance rows (Brooks et al., arXiv 2211.09800): instruction and image, image alone, neither.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.base import ConditionSource, Limits, Plan, ReferenceEdit, TextEncoding
from hywu_export.families.components import Component, class_name, open_component, read_config
from hywu_export.families.pixels import from_pixels, to_pixels
from hywu_export.schedules import apply_row, make_scheduler
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, fake_module
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError
from hywu_runtime.manifest import Call, Guidance, ImagePolicy, Phase, ProvidedTensor, State, Zeros

log = logging.getLogger(__name__)

TOKENIZER = "main"
LATENT_SIZE = ("latent_height", "latent_width")

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


class ImageEncoder(nn.Module):
    """Pixels ``uint8 [B, H, W, 3]`` to the mode of the VAE's posterior ``[B, C, h, w]``.

    As the pipeline does it, the source's latents are not scaled.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.vae.encode(from_pixels(image)).latent_dist.mode(),)


class ImageDecoder(nn.Module):
    """Latents ``[B, C, h, w]`` to pixels ``uint8 [B, H, W, 3]``."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (to_pixels(self.vae.decode(latents / self.vae.config.scaling_factor).sample),)


class Prepare(nn.Module):
    """Standard normal noise to the first latents."""

    def forward(self, noise: Tensor, scale: Tensor) -> tuple[Tensor]:
        return (noise * scale,)


class Step(nn.Module):
    """One evaluation of the UNet with its deltas, guidance, and the sampler's update.

    Inputs in the order of `InstructPix2Pix._step_inputs`, then the deltas in the order of ``spec.tensors()``.
    """

    def __init__(self, unet: UNet2DConditionModel, spec: DeltaSpec, guided: bool):
        super().__init__()
        self.unet = unet
        self.names = tuple(spec.tensors())
        self.injection = inject(unet, spec)
        self.guided = guided

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        cut = len(inputs) - len(self.names)
        deltas = dict(zip(self.names, inputs[cut:]))
        latents, history, noise, timestep, coefficients, gate, source, prompt, *guidance = inputs[:cut]
        with self.injection as injection:
            injection.set(deltas, gate, rows=3 if self.guided else 1)
            output = self._predict(latents * coefficients[0], timestep, source, prompt, guidance)
        return apply_row(coefficients, latents, output, noise, history)

    def _predict(
        self, x: Tensor, timestep: Tensor, source: Tensor, prompt: Tensor, guidance: list[Tensor]
    ) -> Tensor:
        if not self.guided:
            output: Tensor = self.unet(torch.cat([x, source], 1), timestep, prompt).sample
            return output
        negative, text_scale, image_scale = guidance
        sources = torch.cat([source, source, torch.zeros_like(source)])
        prompts = torch.cat([prompt, negative, negative])
        rows = self.unet(torch.cat([torch.cat([x, x, x]), sources], 1), timestep, prompts).sample
        # Not chunk(3): it would freeze the batch.
        with_text, with_image, without = rows.unflatten(0, (3, -1)).unbind(0)
        text_scale, image_scale = text_scale[:, None, None, None], image_scale[:, None, None, None]
        guided: Tensor = (
            without + text_scale * (with_text - with_image) + image_scale * (with_image - without)
        )
        return guided


class InstructPix2Pix:
    """The family of ``StableDiffusionInstructPix2PixPipeline``. A safety checker stays outside the bundle."""

    pipeline_class = "StableDiffusionInstructPix2PixPipeline"
    denoiser = "unet"
    # What the LoRA training scripts of diffusers choose for Stable Diffusion's UNet.
    default_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, folder: Path):
        self.folder = folder
        self._components = {
            "text_encoder": open_component("text_encoder", folder / "text_encoder", _make_text_encoder),
            "vae": open_component("vae", folder / "vae", _make_vae),
            "unet": open_component("unet", folder / "unet", _make_unet),
        }
        settings = folder / "scheduler" / "scheduler_config.json"
        self.scheduler = class_name(settings), read_config(settings)
        self._tokenizer_config = read_config(folder / "tokenizer" / "tokenizer_config.json")
        self._check_fit()
        checker = read_config(folder / "model_index.json").get("safety_checker")
        if isinstance(checker, list) and any(checker):
            log.warning("The safety checker of %s is not exported: look after what the bundle makes", folder)

    def _check_fit(self) -> None:
        """Whether the components belong together."""
        latents, hidden = int(self._vae.config.latent_channels), int(self._text_config.hidden_size)
        config = self._unet.config
        for setting, expected, why in (
            ("in_channels", 2 * latents, f"twice the VAE's {latents} latent channels"),
            ("out_channels", latents, f"the VAE's {latents} latent channels"),
            ("cross_attention_dim", hidden, f"the text encoder's {hidden} channels"),
        ):
            found = config[setting]  # cross_attention_dim may be a list, one entry per level
            if any(size != expected for size in (found if isinstance(found, (list, tuple)) else [found])):
                raise CheckpointError(
                    f"The UNet's config.json in {self.folder} sets {setting} to {found}",
                    f"Expected {expected}, {why}",
                    "Check that the components belong together",
                )

    @property
    def components(self) -> Mapping[str, Component]:
        return self._components

    @property
    def _unet(self) -> UNet2DConditionModel:
        return self._components["unet"].module

    @property
    def _vae(self) -> AutoencoderKL:
        return self._components["vae"].module

    @property
    def _text_config(self) -> CLIPTextConfig:
        return self._components["text_encoder"].module.config

    @property
    def _factor(self) -> int:
        """Pixels per latent."""
        return int(2 ** (len(self._vae.config.block_out_channels) - 1))

    @property
    def condition_source(self) -> ConditionSource:
        return ConditionSource(
            TensorSpec("prompt.embeds", "float32", ("batch", self._length, self._text_config.hidden_size)),
            TensorSpec("image.latents", "float32", self._latents),
        )

    @property
    def _length(self) -> int:
        """Tokens of a prompt: the pipeline pads to the tokenizer's limit, usually that of the model."""
        limit = self._tokenizer_config.get("model_max_length")
        positions = int(self._text_config.max_position_embeddings)
        return min(limit, positions) if isinstance(limit, int) and limit > 0 else positions

    @property
    def _latents(self) -> tuple[int | str, ...]:
        return ("batch", int(self._vae.config.latent_channels), *LATENT_SIZE)

    def _axes(self, limits: Limits) -> dict[str, Axis]:
        # Every level of the UNet but the last halves the latents.
        multiple = self._factor * 2 ** (len(self._unet.config.block_out_channels) - 1)
        longest = max(multiple, 4 * self._native_side) if limits.max_size is None else limits.max_size
        if longest < multiple:
            raise InputError(
                f"The largest size is {longest} pixels",
                f"Sides are multiples of {multiple}",
                "Choose a larger one",
            )
        side = Axis(min=multiple, max=longest // multiple * multiple, multiple=multiple)
        return {
            "batch": Axis(1, limits.max_batch),
            "delta_batch": Axis(1, limits.max_batch, one_or="batch"),
            "height": side,
            "width": side,
            "latent_height": Axis(of="height", divide=self._factor),
            "latent_width": Axis(of="width", divide=self._factor),
        }

    @property
    def _native_side(self) -> int:
        """The side, in pixels, that the UNet was made for."""
        sample = self._unet.config.sample_size
        return int(sample if isinstance(sample, int) else min(sample)) * self._factor

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        axes = self._axes(limits)
        text = ("batch", self._length)
        embeds = (*text, int(self._text_config.hidden_size))
        history = ("batch", coefficients - 4, *self._latents[1:])

        def tensor(name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> TensorSpec:
            return TensorSpec(name, dtype, shape)

        prompt = "prompt.embeds" if base_prompt is None else "base_prompt.embeds"
        common = [
            tensor("latents", self._latents),
            tensor("history", history),
            tensor("noise.step", self._latents),
            tensor("timestep", ()),
            tensor("coefficients", (coefficients,)),
            tensor("gate", ("batch",)),
            tensor("image.latents", self._latents),
            tensor(prompt, embeds),
        ]
        guided = [
            tensor("negative_prompt.embeds", embeds),
            tensor("guidance.text", ("batch",)),
            tensor("guidance.image", ("batch",)),
        ]
        deltas = [tensor(name, ("delta_batch", *shape)) for name, shape in spec.tensors().items()]
        after = [tensor("latents.next", self._latents), tensor("history.next", history)]
        pixels = ("batch", "height", "width", 3)
        unet = self._unet
        text_inputs = [tensor("input_ids", text, "int64")]
        masked = bool(getattr(self._text_config, "use_attention_mask", False))
        if masked:
            text_inputs.append(tensor("attention_mask", text, "int64"))

        graphs = [
            GraphSpec(
                "text_encoder",
                TextEncoder(self._components["text_encoder"].module),
                text_inputs,
                [tensor("embeds", embeds)],
            ),
            GraphSpec(
                "image_encoder",
                ImageEncoder(self._vae),
                [tensor("image", pixels, "uint8")],
                [tensor("image.latents", self._latents)],
            ),
            GraphSpec(
                "prepare",
                Prepare(),
                [tensor("noise.initial", self._latents), tensor("initial_scale", ())],
                [tensor("latents.initial", self._latents)],
            ),
            GraphSpec("step", Step(unet, spec, True), [*common, *guided, *deltas], after),
            GraphSpec("step_unguided", Step(unet, spec, False), [*common, *deltas], after),
            GraphSpec(
                "image_decoder",
                ImageDecoder(self._vae),
                [tensor("latents", self._latents)],
                [tensor("edited", pixels, "uint8")],
            ),
        ]

        tensors = {
            "image": ProvidedTensor("uint8", pixels, "image"),
            "noise.initial": ProvidedTensor("float32", self._latents, "noise", draw="initial"),
            "noise.step": ProvidedTensor("float32", self._latents, "noise", draw="step"),
            "initial_scale": ProvidedTensor("float32", (), "schedule", column="initial_scale"),
            "timestep": ProvidedTensor("float32", (), "schedule", column="timesteps"),
            "coefficients": ProvidedTensor("float32", (coefficients,), "schedule", column="coefficients"),
            "guidance.text": ProvidedTensor("float32", ("batch",), "guidance", guidance="text"),
            "guidance.image": ProvidedTensor("float32", ("batch",), "guidance", guidance="image"),
            "gate": ProvidedTensor("float32", ("batch",), "gate"),
        }
        program: list[Call] = []

        def encode(
            name: str,
            phase: Phase,
            guided: bool | None = None,
            said: str | None = None,
            constant: str | None = None,
        ) -> None:
            ids = f"{name}.ids"
            tensors[ids] = ProvidedTensor(
                "int64", text, "text", text=said, constant=constant, tokenizer=TOKENIZER
            )
            inputs = {"input_ids": ids}
            if masked:
                inputs["attention_mask"] = f"{name}.mask"
                tensors[f"{name}.mask"] = ProvidedTensor("int64", text, "mask", of=ids)
            program.append(Call("text_encoder", phase, inputs, {"embeds": f"{name}.embeds"}, guided))

        if base_prompt is not None:
            encode("base_prompt", "load", constant=base_prompt)
        encode("prompt", "request", said="prompt")
        encode("negative_prompt", "request", guided=True, said="negative_prompt")
        program += [
            Call("image_encoder", "request"),
            Call("prepare", "request"),
            Call("step", "step", guided=True),
            Call("step_unguided", "step", guided=False),
            Call("image_decoder", "final"),
        ]
        side = axes["height"]
        return Plan(
            graphs=graphs,
            axes=axes,
            tensors=tensors,
            program=program,
            state=[
                State("latents", "latents.next", "latents.initial"),
                State("history", "history.next", Zeros(history)),
            ],
            guidance=[
                # The pipeline's own defaults, and its own condition for guidance.
                Guidance("text", 7.5, above=1.0),
                Guidance("image", 1.5, at_least=1.0),
            ],
            image=ImagePolicy(
                "image",
                side.multiple,
                side.min,
                side.max,
                limits.area or min(side.max, self._native_side) ** 2,
            ),
            result="edited",
            tokenizers={TOKENIZER: TextEncoding(self.folder / "tokenizer")},
        )

    def reference_edit(self, edit: ReferenceEdit) -> npt.NDArray[np.uint8]:
        from diffusers import StableDiffusionInstructPix2PixPipeline
        from PIL import Image

        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            self.folder, torch_dtype=torch.float32, safety_checker=None, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = make_scheduler(edit.sampler, self.scheduler[1])
        pictures = pipeline(
            prompt=edit.prompt,
            image=Image.fromarray(edit.photo),
            num_inference_steps=edit.steps,
            guidance_scale=edit.guidance["text"],
            image_guidance_scale=edit.guidance["image"],
            latents=torch.from_numpy(edit.latents),
            generator=torch.Generator().manual_seed(edit.seed),
        ).images
        return np.asarray(pictures[0])


def _make_text_encoder(config: dict[str, Any]) -> nn.Module:
    if config.get("model_type") not in (None, "clip_text_model"):
        raise UnsupportedError(
            f"The text encoder is a {config['model_type']}",
            "This pipeline's text encoder is a CLIPTextModel (clip_text_model)",
            "Export a pipeline with a CLIP text encoder",
        )
    module: nn.Module = fake_module(lambda: CLIPTextModel(CLIPTextConfig.from_dict(config)))
    return module


def _make_vae(config: dict[str, Any]) -> nn.Module:
    module: nn.Module = fake_module(lambda: AutoencoderKL.from_config(config))
    return module


def _make_unet(config: dict[str, Any]) -> nn.Module:
    for setting in _FOREIGN_UNET_SETTINGS:
        if config.get(setting) is not None:
            raise UnsupportedError(
                f"The UNet's config.json sets {setting} to {config[setting]!r}",
                "An InstructPix2Pix UNet leaves it null",
                "Export a pipeline without it",
            )
    module: nn.Module = fake_module(lambda: UNet2DConditionModel.from_config(config))
    return module
