"""`SanaSprintImg2ImgPipeline`: a transformer with linear attention, distilled to few steps (SANA-Sprint,
arXiv 2503.09641), that starts from the photo's latents with noise.

A language model reads the prompt behind an instruction of its own. The distilled model takes its guidance as
an input: there is no second row, and no negative prompt.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderDC, SanaSprintImg2ImgPipeline, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.autoencoder import ImageDecoder
from hywu_export.families.base import ConditionSource, Limits, Plan, ReferenceEdit, TextEncoding
from hywu_export.families.components import Component, class_name, open_component, read_config
from hywu_export.families.gemma import last_states, make_gemma
from hywu_export.families.midway import START, Prepare, drawn
from hywu_export.families.pixels import from_pixels
from hywu_export.schedules import ScheduleTable, apply_row, make_scheduler, trace_scheduler, with_start
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, fake_module
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError
from hywu_runtime.manifest import Call, Guidance, ImagePolicy, Phase, ProvidedTensor, State, Zeros

LATENT_SIZE = ("latent_height", "latent_width")
TOKENIZER = "main"
TEXT_LENGTH = 300  # tokens that the transformer reads, as the pipeline has them
PIPELINE_MULTIPLE = 32  # of sides in pixels, whatever the autoencoder's factor
Shape = tuple[int | str, ...]


class TextEncoder(nn.Module):
    """Token ids and their mask ``[B, L]`` to ``embeds [B, 300, C]`` and ``mask [B, 300]``, 1 for tokens.

    What is kept are the first token, and the last that are not the instruction's.
    """

    def __init__(self, text_encoder: Gemma2Model):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        states = last_states(self.text_encoder, input_ids, attention_mask)
        mask = attention_mask.to(states.dtype)
        kept = TEXT_LENGTH - 1
        return (
            torch.cat([states[:, :1], states[:, -kept:]], dim=1),
            torch.cat([mask[:, :1], mask[:, -kept:]], dim=1),
        )


class ImageEncoder(nn.Module):
    """Pixels ``uint8 [B, H, W, 3]`` to latents as the sampler has them, ``[B, C, h, w]``: times ``scale``."""

    def __init__(self, vae: AutoencoderDC, scale: float):
        super().__init__()
        self.vae = vae
        self.scale = scale

    def forward(self, image: Tensor) -> tuple[Tensor]:
        return (self.vae.encode(from_pixels(image)).latent * self.scale,)


class Step(nn.Module):
    """One evaluation of the transformer with its deltas, and the sampler's update.

    The sampler counts in angles (TrigFlow), the transformer was trained on straight paths: its input, its
    timestep and its output are converted (section 3.1 of the paper).

    Inputs: latents, history, noise, timestep, coefficients, gate, guidance scale, ``embeds`` and ``mask`` of
    the prompt; then the deltas in the order of ``spec.tensors()``.
    """

    def __init__(self, transformer: SanaTransformer2DModel, spec: DeltaSpec, sigma_data: float):
        super().__init__()
        self.transformer = transformer
        self.names = tuple(spec.tensors())
        self.injection = inject(transformer, spec)
        self.sigma_data = sigma_data

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        cut = len(inputs) - len(self.names)
        deltas = dict(zip(self.names, inputs[cut:]))
        latents, history, noise, angle, coefficients, gate, scale, embeds, mask = inputs[:cut]
        time = torch.sin(angle) / (torch.cos(angle) + torch.sin(angle))
        norm = torch.sqrt(time**2 + (1 - time) ** 2)
        x = latents * coefficients[0] / self.sigma_data * norm
        with self.injection as injection:
            injection.set(deltas, gate, rows=1)
            output = self.transformer(
                x,
                encoder_hidden_states=embeds,
                encoder_attention_mask=mask,
                guidance=scale * self.transformer.config.guidance_embeds_scale,
                timestep=time.expand(x.shape[0]),
                return_dict=False,
            )[0]
        angular = ((1 - 2 * time) * x + (1 - 2 * time + 2 * time**2) * output) / norm
        return apply_row(coefficients, latents, angular * self.sigma_data, noise, history)


class SanaSprint:
    """The family of ``SanaSprintImg2ImgPipeline``."""

    pipeline_class = "SanaSprintImg2ImgPipeline"
    denoiser = "transformer"
    # What diffusers' LoRA training script for SANA chooses.
    default_targets = ("to_k", "to_q", "to_v")

    def __init__(self, folder: Path):
        self.folder = folder
        self._components = {
            "text_encoder": open_component("text_encoder", folder / "text_encoder", make_gemma),
            "vae": open_component("vae", folder / "vae", _make_vae),
            "transformer": open_component("transformer", folder / "transformer", _make_transformer),
        }
        settings = folder / "scheduler" / "scheduler_config.json"
        self.scheduler = class_name(settings), read_config(settings)
        self._check_fit()

    def _check_fit(self) -> None:
        """Whether the components belong together."""
        latents = int(self._vae.config.latent_channels)
        for setting, expected, why in (
            ("in_channels", latents, f"the VAE's {latents} latent channels"),
            ("out_channels", latents, f"the VAE's {latents} latent channels"),
            ("caption_channels", int(self._text_config.hidden_size), "the text encoder's width"),
        ):
            found = self._transformer.config[setting]
            if found != expected:
                raise CheckpointError(
                    f"The transformer's config.json in {self.folder} sets {setting} to {found}",
                    f"Expected {expected}, {why}",
                    "Check that the components belong together",
                )

    @property
    def components(self) -> Mapping[str, Component]:
        return self._components

    @property
    def _transformer(self) -> SanaTransformer2DModel:
        return self._components["transformer"].module

    @property
    def _vae(self) -> AutoencoderDC:
        return self._components["vae"].module

    @property
    def _text_config(self) -> Gemma2Config:
        return self._components["text_encoder"].module.config

    @property
    def _factor(self) -> int:
        """Pixels per latent."""
        return int(2 ** (len(self._vae.config.encoder_block_out_channels) - 1))

    @property
    def _native_side(self) -> int:
        """The side, in pixels, that the transformer was made for."""
        return int(self._transformer.config.sample_size) * self._factor

    @property
    def _sigma_data(self) -> float:
        """The deviation of latents that the sampler expects."""
        return float(self.scheduler[1].get("sigma_data", 0.5))

    @property
    def _latents(self) -> Shape:
        return ("batch", int(self._vae.config.latent_channels), *LATENT_SIZE)

    @property
    def _embeds(self) -> Shape:
        return ("batch", TEXT_LENGTH, int(self._text_config.hidden_size))

    @property
    def condition_source(self) -> ConditionSource:
        return ConditionSource(
            TensorSpec("prompt.embeds", "float32", self._embeds),
            TensorSpec("image.latents", "float32", self._latents),
        )

    @cached_property
    def _instruction(self) -> str:
        """What the language model is told before the prompt."""
        call = inspect.signature(SanaSprintImg2ImgPipeline.__call__)
        return "\n".join(call.parameters["complex_human_instruction"].default)

    @cached_property
    def _length(self) -> int:
        """Tokens that the language model reads: of the instruction, and of the prompt."""
        folder = self.folder / "tokenizer"
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return len(tokenizer.encode(self._instruction)) + TEXT_LENGTH - 2
        except Exception as error:  # whatever transformers raises for a damaged folder
            raise CheckpointError(
                f"The tokenizer in {folder} cannot be loaded ({error})",
                "Files of one tokenizer",
                "Fetch the checkpoint whole",
            ) from error

    def schedule(self, sampler: str | type, max_steps: int) -> ScheduleTable:
        scheduler = make_scheduler(sampler, self.scheduler[1])
        if type(scheduler).__name__ != "SCMScheduler":
            raise UnsupportedError(
                f"{type(scheduler).__name__} does not count in angles, as this pipeline does",
                "SCMScheduler (scm)",
                "Leave out the scheduler, or name this one",
            )
        return with_start(trace_scheduler(scheduler, max_steps), scheduler)

    def _axes(self, limits: Limits) -> dict[str, Axis]:
        multiple = math.lcm(self._factor * int(self._transformer.config.patch_size), PIPELINE_MULTIPLE)
        least = _least_latents(self._vae) * self._factor
        least = -(-least // multiple) * multiple
        longest = max(least + multiple, 2 * self._native_side) if limits.max_size is None else limits.max_size
        if longest < least + multiple:
            raise InputError(
                f"The largest size is {longest} pixels",
                f"Expected {least + multiple} or more; sides are multiples of {multiple}, at least {least}",
                "Choose a larger one",
            )
        side = Axis(min=least, max=longest // multiple * multiple, multiple=multiple)
        return {
            "batch": Axis(1, limits.max_batch),
            "delta_batch": Axis(1, limits.max_batch, one_or="batch"),
            "height": side,
            "width": side,
            "latent_height": Axis(of="height", divide=self._factor),
            "latent_width": Axis(of="width", divide=self._factor),
        }

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        axes = self._axes(limits)
        side = axes["height"]
        pixels = ("batch", "height", "width", 3)
        history = ("batch", coefficients - 4, *self._latents[1:])
        plan = Plan(
            graphs=self._graphs(spec, pixels, history, "prompt" if base_prompt is None else "base_prompt"),
            axes=axes,
            tensors={
                "image": ProvidedTensor("uint8", pixels, "image"),
                "noise.initial": ProvidedTensor("float32", self._latents, "noise", draw="initial"),
                "noise.step": ProvidedTensor("float32", self._latents, "noise", draw="step"),
                "start": START,
                "timestep": ProvidedTensor("float32", (), "schedule", column="timesteps"),
                "coefficients": ProvidedTensor("float32", (coefficients,), "schedule", column="coefficients"),
                "guidance.text": ProvidedTensor("float32", ("batch",), "guidance", guidance="text"),
                "gate": ProvidedTensor("float32", ("batch",), "gate"),
            },
            state=[
                State("latents", "latents.next", "latents.initial"),
                State("history", "history.next", Zeros(history)),
            ],
            guidance=[Guidance("text", 4.5)],
            image=ImagePolicy(
                "image",
                side.multiple,
                side.min,
                side.max,
                limits.area or min(side.max, self._native_side) ** 2,
            ),
            result="edited",
            tokenizers={
                TOKENIZER: TextEncoding(
                    self.folder / "tokenizer", template=f"{self._instruction}{{}}", lowercase=True
                )
            },
            strength=0.6,
            steps=2,
        )
        if base_prompt is not None:
            self._encode(plan, "base_prompt", "load", constant=base_prompt)
        self._encode(plan, "prompt", "request", said="prompt")
        plan.program += [
            Call("image_encoder", "request"),
            Call("prepare", "request"),
            Call("step", "step"),
            Call("image_decoder", "final"),
        ]
        return plan

    def _graphs(self, spec: DeltaSpec, pixels: Shape, history: Shape, prompt: str) -> list[GraphSpec]:
        def tensor(name: str, shape: Shape, dtype: str = "float32") -> TensorSpec:
            return TensorSpec(name, dtype, shape)

        text = ("batch", self._length)
        scaling, sigma_data = float(self._vae.config.scaling_factor), self._sigma_data
        deltas = [tensor(name, ("delta_batch", *shape)) for name, shape in spec.tensors().items()]
        return [
            GraphSpec(
                "text_encoder",
                TextEncoder(self._components["text_encoder"].module),
                [tensor("input_ids", text, "int64"), tensor("attention_mask", text, "int64")],
                [tensor("embeds", self._embeds), tensor("mask", self._embeds[:2])],
            ),
            GraphSpec(
                "image_encoder",
                ImageEncoder(self._vae, scaling * sigma_data),
                [tensor("image", pixels, "uint8")],
                [tensor("image.latents", self._latents)],
            ),
            GraphSpec(
                "prepare",
                Prepare(),
                [
                    tensor("image.latents", self._latents),
                    tensor("noise.initial", self._latents),
                    tensor("start", (2,)),
                ],
                [tensor("latents.initial", self._latents)],
            ),
            GraphSpec(
                "step",
                Step(self._transformer, spec, sigma_data),
                [
                    tensor("latents", self._latents),
                    tensor("history", history),
                    tensor("noise.step", self._latents),
                    tensor("timestep", ()),
                    tensor("coefficients", (int(history[1]) + 4,)),
                    tensor("gate", ("batch",)),
                    tensor("guidance.text", ("batch",)),
                    tensor(f"{prompt}.embeds", self._embeds),
                    tensor(f"{prompt}.mask", self._embeds[:2]),
                    *deltas,
                ],
                [tensor("latents.next", self._latents), tensor("history.next", history)],
            ),
            GraphSpec(
                "image_decoder",
                ImageDecoder(self._vae, lambda latents: latents / sigma_data / scaling),
                [tensor("latents", self._latents)],
                [tensor("edited", pixels, "uint8")],
            ),
        ]

    def _encode(
        self, plan: Plan, name: str, phase: Phase, said: str | None = None, constant: str | None = None
    ) -> None:
        """Adds the call that makes ``<name>.embeds`` and ``<name>.mask`` of a text."""
        text = ("batch", self._length)
        ids, seen = f"{name}.ids", f"{name}.seen"
        plan.tensors[ids] = ProvidedTensor(
            "int64", text, "text", text=said, constant=constant, tokenizer=TOKENIZER
        )
        plan.tensors[seen] = ProvidedTensor("int64", text, "mask", of=ids)
        inputs = {"input_ids": ids, "attention_mask": seen}
        outputs = {output: f"{name}.{output}" for output in ("embeds", "mask")}
        plan.program.append(Call("text_encoder", phase, inputs, outputs))

    def reference_edit(self, edit: ReferenceEdit) -> npt.NDArray[np.uint8]:
        from PIL import Image

        pipeline = SanaSprintImg2ImgPipeline.from_pretrained(
            self.folder, torch_dtype=torch.float32, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = make_scheduler(edit.sampler, self.scheduler[1])
        height, width, _ = edit.photo.shape
        with same_draws(torch.from_numpy(edit.latents)):
            pictures = pipeline(
                prompt=edit.prompt,
                image=Image.fromarray(edit.photo),
                height=height,
                width=width,
                strength=edit.strength,
                num_inference_steps=edit.steps,
                intermediate_timesteps=1.3 if edit.steps == 2 else None,
                guidance_scale=edit.guidance["text"],
                generator=torch.Generator().manual_seed(edit.seed),
                use_resolution_binning=False,  # the picture is at its working size
            ).images
        return np.asarray(pictures[0])


def same_draws(noise: Tensor) -> AbstractContextManager[None]:
    """Within, the pipeline takes ``noise`` where it noises the photo's latents."""
    from diffusers.pipelines.sana import pipeline_sana_sprint_img2img as home

    return drawn(home, noise)


def _least_latents(vae: AutoencoderDC) -> int:
    """The smallest side, in latents, at which every attention of the autoencoder is the linear one.

    With fewer positions than channels of a head, it would compute the same product in the other order. A
    graph has one of them.
    """
    heads = [m.attention_head_dim for m in vae.modules() if hasattr(m, "apply_linear_attention")]
    return math.isqrt(max(heads, default=0)) + 1


def _make_vae(config: dict[str, Any]) -> nn.Module:
    if not isinstance(config.get("scaling_factor"), (int, float)):
        raise CheckpointError(
            f"The VAE's config.json sets scaling_factor to {config.get('scaling_factor')!r}",
            "Expected a number: the pipeline computes with it",
            "Fetch the checkpoint whole",
        )
    module: nn.Module = fake_module(lambda: AutoencoderDC.from_config(config))
    return module


def _make_transformer(config: dict[str, Any]) -> nn.Module:
    for setting, expected, why in (
        ("guidance_embeds", True, "the pipeline tells the transformer its guidance"),
        ("interpolation_scale", None, "this transformer has no positions beside its convolutions"),
    ):
        if config.get(setting) != expected:
            raise UnsupportedError(
                f"The transformer's config.json sets {setting} to {config.get(setting)!r}",
                f"Expected {expected}: {why}",
                "Export a SANA-Sprint pipeline",
            )
    module: nn.Module = fake_module(lambda: SanaTransformer2DModel.from_config(config))
    return module
