"""`FluxKontextPipeline`: a transformer that reads the photo's latents behind the noisy ones in its sequence
(FLUX.1 Kontext, arXiv 2506.15742).

The distilled model takes its guidance as an input. Guidance by a negative prompt (``true_cfg``) comes beside
it, and is off unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from torch import Tensor, nn
from transformers import CLIPTextConfig, T5Config

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.autoencoder import ImageDecoder, encode, pixels_per_latent
from hywu_export.families.base import LONG_TEXT, ConditionSource, Limits, Plan, ReferenceEdit, TextEncoding
from hywu_export.families.components import Component, class_name, open_component, read_config
from hywu_export.families.pixels import from_pixels
from hywu_export.families.text import HiddenStates, PooledText, make_clip, make_t5
from hywu_export.families.tiling import Tiles
from hywu_export.schedules import ScheduleTable, Shift, euler, make_scheduler, shift_table
from hywu_export.schedules.shift import check_shiftable
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, fake_module
from hywu_runtime.errors import CheckpointError, InputError
from hywu_runtime.manifest import Call, Guidance, ImagePolicy, Phase, ProvidedTensor, State

LATENT_SIZE = ("latent_height", "latent_width")
PATCH = 2  # latents per token and side
NATIVE_SIDE = 128  # latents per side of the pipeline's default size
MAX_TEXT_LENGTH = 512
MAX_POSITIONS = 1024  # tokens per side
TEXT = "short"
"""CLIP's tokenizer; that of T5 is `LONG_TEXT`."""


class Rotary(nn.Module):
    """Rotary position embeddings of the ids ``int64 [N, axes]``: cosine and sine, ``float32 [N, D]`` each.

    In place of the model's own, which computes in float64. The same numbers are looked up in tables
    ``[positions, axis]``, so that positions are exact in whatever precision a graph computes.
    """

    def __init__(self, theta: float, axes: Sequence[int], positions: int = MAX_POSITIONS):
        super().__init__()
        for index, size in enumerate(axes):
            frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
            angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
            angles = angles.repeat_interleave(2, dim=1)
            self.register_buffer(f"cos_{index}", angles.cos().float(), persistent=False)
            self.register_buffer(f"sin_{index}", angles.sin().float(), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (
            [self.get_buffer(f"{name}_{axis}").index_select(0, ids[:, axis]) for axis in range(ids.shape[1])]
            for name in ("cos", "sin")
        )
        return torch.cat(cos, dim=1), torch.cat(sin, dim=1)


class ImageEncoder(nn.Module):
    """Pixels ``uint8 [B, H, W, 3]`` to the mode of the VAE's posterior, as the transformer reads it:
    ``[B, C, h, w]``."""

    def __init__(self, vae: AutoencoderKL, tiles: Tiles | None):
        super().__init__()
        self.vae = vae
        self.tiles = tiles

    def forward(self, image: Tensor) -> tuple[Tensor]:
        config = self.vae.config
        latents = encode(self.vae, from_pixels(image), self.tiles)
        return ((latents - config.shift_factor) * config.scaling_factor,)


class Step(nn.Module):
    """One evaluation of the transformer with its deltas, guidance, and the sampler's update.

    Inputs: latents, row of the schedule, gate, the photo's latents, hidden states and pooled state of the
    prompt; the distilled scale if the model takes one; if ``guided`` both states of the negative prompt and
    the scale of ``true_cfg``; then the deltas in the order of ``spec.tensors()``.
    """

    def __init__(self, transformer: FluxTransformer2DModel, shift: Shift, spec: DeltaSpec, guided: bool):
        super().__init__()
        self.transformer = transformer
        self.shift = shift
        self.names = tuple(spec.tensors())
        self.injection = inject(transformer, spec)
        self.rows = 2 if guided else 1

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        cut = len(inputs) - len(self.names)
        deltas = dict(zip(self.names, inputs[cut:]))
        latents, row, gate, source, embeds, pooled, *rest = inputs[:cut]
        scale = rest.pop(0) if self.transformer.config.guidance_embeds else None
        if self.rows == 2:
            negative_embeds, negative_pooled, true_cfg = rest
            embeds, pooled = torch.cat([embeds, negative_embeds]), torch.cat([pooled, negative_pooled])
        tokens = pack(latents)
        level, after = self.shift.levels(row, tokens.shape[1])
        with self.injection as injection:
            injection.set(deltas, gate, rows=self.rows)
            output = self.transformer(
                hidden_states=self._repeated(torch.cat([tokens, pack(source)], dim=1)),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                # The model multiplies both by 1000.
                timestep=(level * (self.shift.train_timesteps / 1000)).expand(embeds.shape[0]),
                guidance=None if scale is None else self._repeated(scale),
                txt_ids=torch.zeros(embeds.shape[1], 3, dtype=torch.int64),
                img_ids=torch.cat([positions(latents, 0), positions(source, 1)]),
                return_dict=False,
            )[0]
        velocity = output[:, : tokens.shape[1]]
        if self.rows == 2:
            # Not chunk(2): it would freeze the batch.
            told, negative = velocity.unflatten(0, (2, -1)).unbind(0)
            velocity = negative + true_cfg[:, None, None] * (told - negative)
        return (euler(latents, unpack(velocity, latents), level, after),)

    def _repeated(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * self.rows) if self.rows > 1 else tensor


def pack(latents: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]`` as tokens of 2 × 2: ``[B, h/2 * w/2, 4 C]``."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, latents: Tensor) -> Tensor:
    """The inverse of `pack`, to the shape of ``latents``."""
    batch, channels, height, width = latents.shape
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def positions(latents: Tensor, picture: int) -> Tensor:
    """Ids of the tokens of ``latents [B, C, h, w]``: picture, row and column, ``int64 [h/2 * w/2, 3]``."""
    height, width = latents.shape[2] // PATCH, latents.shape[3] // PATCH
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None, :].expand(height, width)
    return torch.stack([torch.full_like(rows, picture), rows, columns], dim=2).flatten(0, 1)


class FluxKontext:
    """The family of ``FluxKontextPipeline``. Image prompts (IP-Adapter) stay outside the bundle."""

    pipeline_class = "FluxKontextPipeline"
    denoiser = "transformer"
    # What diffusers' LoRA training script for Kontext chooses.
    default_targets = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
    )

    def __init__(self, folder: Path):
        self.folder = folder
        self._components = {
            "text_encoder": open_component("text_encoder", folder / "text_encoder", make_clip),
            "text_encoder_2": open_component("text_encoder_2", folder / "text_encoder_2", make_t5),
            "vae": open_component("vae", folder / "vae", _make_vae),
            "transformer": open_component("transformer", folder / "transformer", _make_transformer),
        }
        settings = folder / "scheduler" / "scheduler_config.json"
        self.scheduler = class_name(settings), read_config(settings)
        self._text_length = MAX_TEXT_LENGTH  # of the latest plan
        self._clip_length = read_config(folder / "tokenizer" / "tokenizer_config.json").get(
            "model_max_length"
        )
        self._check_fit()

    def _check_fit(self) -> None:
        """Whether the components belong together."""
        latents = int(self._vae.config.latent_channels)
        config = self._transformer.config
        for setting, found, expected, why in (
            (
                "in_channels",
                config.in_channels,
                4 * latents,
                f"four times the VAE's {latents} latent channels",
            ),
            (
                "out_channels",
                config.out_channels or config.in_channels,
                4 * latents,
                f"four times the VAE's {latents} latent channels",
            ),
            ("patch_size", config.patch_size, 1, "for tokens that are packed outside the transformer"),
            (
                "joint_attention_dim",
                config.joint_attention_dim,
                self._t5.d_model,
                "the width of the T5 encoder",
            ),
            (
                "pooled_projection_dim",
                config.pooled_projection_dim,
                self._clip.hidden_size,
                "the width of the CLIP text encoder",
            ),
        ):
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
    def _transformer(self) -> FluxTransformer2DModel:
        return self._components["transformer"].module

    @property
    def _vae(self) -> AutoencoderKL:
        return self._components["vae"].module

    @property
    def _clip(self) -> CLIPTextConfig:
        return self._components["text_encoder"].module.config

    @property
    def _t5(self) -> T5Config:
        return self._components["text_encoder_2"].module.config

    @property
    def _factor(self) -> int:
        """Pixels per latent."""
        return pixels_per_latent(self._vae)

    @property
    def _latents(self) -> tuple[int | str, ...]:
        return ("batch", int(self._vae.config.latent_channels), *LATENT_SIZE)

    @property
    def _short_length(self) -> int:
        """Tokens that CLIP reads: the pipeline pads to the tokenizer's limit, usually that of the model."""
        limit, longest = self._clip_length, int(self._clip.max_position_embeddings)
        return min(limit, longest) if isinstance(limit, int) and limit > 0 else longest

    @property
    def _embeds(self) -> tuple[int | str, ...]:
        return ("batch", self._text_length, int(self._t5.d_model))

    @property
    def condition_source(self) -> ConditionSource:
        return ConditionSource(
            TensorSpec("prompt.embeds", "float32", self._embeds),
            TensorSpec("image.latents", "float32", self._latents),
        )

    def schedule(self, sampler: str, max_steps: int) -> ScheduleTable:
        return shift_table(make_scheduler(sampler, self.scheduler[1], check_shiftable), max_steps)

    def _axes(self, limits: Limits) -> dict[str, Axis]:
        multiple = self._factor * PATCH
        native = NATIVE_SIDE * self._factor
        longest = 2 * native if limits.max_size is None else limits.max_size
        most = MAX_POSITIONS * multiple
        if not 2 * multiple <= longest <= most:
            raise InputError(
                f"The largest size is {longest} pixels",
                f"Expected {2 * multiple} to {most}; sides are multiples of {multiple}",
                "Choose another one",
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

    def _image_policy(self, side: Axis, area: int | None) -> ImagePolicy:
        """A photo is brought to the size nearest in aspect of those that Kontext was trained on, as the
        pipeline does it; with an ``area`` of one's own, or if they do not all fit, it keeps its aspect."""
        sizes = tuple(
            (width // side.multiple * side.multiple, height // side.multiple * side.multiple)
            for width, height in PREFERRED_KONTEXT_RESOLUTIONS
        )
        fit = area is None and all(side.min <= min(size) and max(size) <= side.max for size in sizes)
        native = min(side.max, NATIVE_SIDE * self._factor)
        return ImagePolicy(
            "image", side.multiple, side.min, side.max, area or native**2, sizes if fit else ()
        )

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        self._text_length = limits.text_length or MAX_TEXT_LENGTH
        if self._text_length > MAX_TEXT_LENGTH:
            raise InputError(
                f"The text length is {self._text_length} tokens",
                f"The pipeline takes at most {MAX_TEXT_LENGTH}",
                "Choose a smaller one",
            )
        axes = self._axes(limits)
        distilled = bool(self._transformer.config.guidance_embeds)
        scales = [Guidance("text", 3.5)] if distilled else []  # the pipeline's own defaults and condition
        scales.append(Guidance("true_cfg", 1.0, above=1.0))
        pixels = ("batch", "height", "width", 3)
        plan = Plan(
            graphs=self._graphs(spec, axes["height"].max, limits.tile, base_prompt is not None, coefficients),
            axes=axes,
            tensors={
                "image": ProvidedTensor("uint8", pixels, "image"),
                "noise.initial": ProvidedTensor("float32", self._latents, "noise", draw="initial"),
                "coefficients": ProvidedTensor("float32", (coefficients,), "schedule", column="coefficients"),
                "gate": ProvidedTensor("float32", ("batch",), "gate"),
            },
            state=[State("latents", "latents.next", "noise.initial")],
            guidance=scales,
            image=self._image_policy(axes["height"], limits.area),
            result="edited",
            tokenizers={
                TEXT: TextEncoding(self.folder / "tokenizer"),
                LONG_TEXT: TextEncoding(self.folder / "tokenizer_2"),
            },
            steps=28,
        )
        for scale in scales:
            plan.tensors[f"guidance.{scale.name}"] = ProvidedTensor(
                "float32", ("batch",), "guidance", guidance=scale.name
            )
        if base_prompt is not None:
            self._encode(plan, "base_prompt", "load", constant=base_prompt)
        self._encode(plan, "prompt", "request", said="prompt")
        self._encode(plan, "negative_prompt", "request", guided=True, said="negative_prompt")
        plan.program += [
            Call("image_encoder", "request"),
            Call("step", "step", guided=True),
            Call("step_unguided", "step", guided=False),
            Call("image_decoder", "final"),
        ]
        return plan

    def _graphs(
        self, spec: DeltaSpec, longest: int, tile: int | None, based: bool, coefficients: int
    ) -> list[GraphSpec]:
        pixels = ("batch", "height", "width", 3)
        tiles = Tiles.covering(longest, tile, self._factor)
        tile = None if tiles is None else tile
        pooled = ("batch", int(self._clip.hidden_size))

        def tensor(name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> TensorSpec:
            return TensorSpec(name, dtype, shape)

        def text(prefix: str) -> list[TensorSpec]:
            return [tensor(f"{prefix}.embeds", self._embeds), tensor(f"{prefix}.pooled", pooled)]

        common = [
            tensor("latents", self._latents),
            tensor("coefficients", (coefficients,)),
            tensor("gate", ("batch",)),
            tensor("image.latents", self._latents),
            *text("base_prompt" if based else "prompt"),
        ]
        if self._transformer.config.guidance_embeds:
            common.append(tensor("guidance.text", ("batch",)))
        guided = [*text("negative_prompt"), tensor("guidance.true_cfg", ("batch",))]
        deltas = [tensor(name, ("delta_batch", *shape)) for name, shape in spec.tensors().items()]
        after = [tensor("latents.next", self._latents)]
        shift = Shift.from_config(self.scheduler[1])
        encoders = self._components
        return [
            GraphSpec(
                "text_encoder",
                PooledText("text_encoder", encoders["text_encoder"].module),
                [tensor("input_ids", ("batch", self._short_length), "int64")],
                [tensor("pooled", pooled)],
            ),
            GraphSpec(
                "text_encoder_2",
                HiddenStates("text_encoder_2", encoders["text_encoder_2"].module),
                [tensor("input_ids", self._embeds[:2], "int64")],
                [tensor("embeds", self._embeds)],
            ),
            GraphSpec(
                "image_encoder",
                ImageEncoder(self._vae, tiles),
                [tensor("image", pixels, "uint8")],
                [tensor("image.latents", self._latents)],
                tile=tile,
            ),
            GraphSpec("step", Step(self._transformer, shift, spec, True), [*common, *guided, *deltas], after),
            GraphSpec(
                "step_unguided", Step(self._transformer, shift, spec, False), [*common, *deltas], after
            ),
            GraphSpec(
                "image_decoder",
                ImageDecoder(self._vae, self._unscale, tiles),
                [tensor("latents", self._latents)],
                [tensor("edited", pixels, "uint8")],
                tile=tile,
            ),
        ]

    def _unscale(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, from what the sampler has."""
        config = self._vae.config
        scaled: Tensor = latents / config.scaling_factor + config.shift_factor
        return scaled

    def _encode(
        self,
        plan: Plan,
        name: str,
        phase: Phase,
        guided: bool | None = None,
        said: str | None = None,
        constant: str | None = None,
    ) -> None:
        """Adds the calls that make ``<name>.pooled`` and ``<name>.embeds`` of a text."""
        for graph, output, tokenizer, length in (
            ("text_encoder", "pooled", TEXT, self._short_length),
            ("text_encoder_2", "embeds", LONG_TEXT, self._text_length),
        ):
            ids = f"{name}.{tokenizer}.ids"
            plan.tensors[ids] = ProvidedTensor(
                "int64", ("batch", length), "text", text=said, constant=constant, tokenizer=tokenizer
            )
            plan.program.append(Call(graph, phase, {"input_ids": ids}, {output: f"{name}.{output}"}, guided))

    def reference_edit(self, edit: ReferenceEdit) -> npt.NDArray[np.uint8]:
        from diffusers import FluxKontextPipeline
        from PIL import Image

        pipeline = FluxKontextPipeline.from_pretrained(
            self.folder, torch_dtype=torch.float32, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = make_scheduler(edit.sampler, self.scheduler[1], check_shiftable)
        height, width, _ = edit.photo.shape
        pictures = pipeline(
            image=Image.fromarray(edit.photo),
            prompt=edit.prompt,
            negative_prompt="",
            true_cfg_scale=edit.guidance["true_cfg"],
            guidance_scale=edit.guidance.get("text", 0.0),
            num_inference_steps=edit.steps,
            latents=pack(torch.from_numpy(edit.latents)),
            max_sequence_length=edit.text_length or MAX_TEXT_LENGTH,
            # The picture is at its working size, which is the edited picture's too.
            height=height,
            width=width,
            max_area=height * width,
            _auto_resize=False,
        ).images
        return np.asarray(pictures[0])


def _make_vae(config: dict[str, Any]) -> nn.Module:
    for setting in ("scaling_factor", "shift_factor"):
        if not isinstance(config.get(setting), (int, float)):
            raise CheckpointError(
                f"The VAE's config.json sets {setting} to {config.get(setting)!r}",
                "Expected a number: the pipeline computes with it",
                "Fetch the checkpoint whole",
            )
    module: nn.Module = fake_module(lambda: AutoencoderKL.from_config(config))
    return module


def _make_transformer(config: dict[str, Any]) -> nn.Module:
    def make() -> FluxTransformer2DModel:
        module = FluxTransformer2DModel.from_config(config)
        module.pos_embed = Rotary(module.pos_embed.theta, module.pos_embed.axes_dim)
        return module

    module: nn.Module = fake_module(make)
    return module
