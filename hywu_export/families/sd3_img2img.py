"""`StableDiffusion3Img2ImgPipeline`: a transformer over text and picture (MMDiT; Esser et al., arXiv
2403.03206) that starts midway, from the photo's latents with noise.

The photo's latents are the mode of the VAE's posterior, where the pipeline draws a sample of it: an edit then
has one source of random numbers, and a photo's latents are one thing for the editor and for a generator's
condition encoder, as in the other families. The posterior's deviation is the noise that an autoencoder was
trained to be blind to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.autoencoder import ImageDecoder, encode, pixels_per_latent
from hywu_export.families.base import LONG_TEXT, ConditionSource, Limits, Plan, ReferenceEdit, TextEncoding
from hywu_export.families.clip import penultimate_and_pooled
from hywu_export.families.components import Component, class_name, open_component, read_config
from hywu_export.families.midway import START, Prepare, drawn
from hywu_export.families.pixels import from_pixels
from hywu_export.families.text import HiddenStates, make_t5
from hywu_export.families.tiling import Tiles
from hywu_export.schedules import ScheduleTable, apply_row, make_scheduler, trace_scheduler, with_start
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, fake_module
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError
from hywu_runtime.manifest import Call, Guidance, ImagePolicy, Phase, ProvidedTensor, State, Zeros

LATENT_SIZE = ("latent_height", "latent_width")
TEXT_LENGTH, MAX_TEXT_LENGTH = 256, 512  # T5's, as the pipeline has them
CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
TOKENIZERS = {"text_encoder": "clip", "text_encoder_2": "clip_2", T5: LONG_TEXT}
"""Text encoder → the tokenizer's name in the bundle."""
Shape = tuple[int | str, ...]


class Clip(nn.Module):
    """Token ids ``[B, L]`` to the hidden states before the last layer ``[B, L, C]``, and to the projected
    state of the final token ``[B, P]``. ``name`` is the component's."""

    def __init__(self, name: str, encoder: CLIPTextModelWithProjection):
        super().__init__()
        self.name = name
        self.add_module(name, encoder)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return penultimate_and_pooled(self.get_submodule(self.name), input_ids)


class Join(nn.Module):
    """What the transformer reads of a text: ``embeds [B, L1 + L2, width]`` and ``pooled [B, P]``.

    CLIP's states ``[B, L1, C]`` stand side by side and are filled up with zeros; those of T5
    ``[B, L2, width]`` follow them. Without T5 zeros do: ``zeros`` is their L2.
    """

    def __init__(self, width: int, zeros: int | None):
        super().__init__()
        self.width = width
        self.zeros = zeros

    def forward(
        self, states: Tensor, pooled: Tensor, states_2: Tensor, pooled_2: Tensor, long: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if long is None:
            long = states.new_zeros((states.shape[0], self.zeros or 0, self.width))
        short = torch.cat([states, states_2], dim=2)
        filled = nn.functional.pad(short, (0, self.width - short.shape[2]))
        pooled = torch.cat([pooled, pooled_2], dim=1)
        # As it is; but nothing else would tell torch.export that both outputs have one batch.
        return torch.cat([filled, long], dim=1), pooled.expand(states.shape[0], -1)


class ImageEncoder(nn.Module):
    """Pixels ``uint8 [B, H, W, 3]`` to the mode of the VAE's posterior, as the transformer reads it:
    ``[B, C, h, w]``."""

    def __init__(self, vae: AutoencoderKL, tiles: Tiles | None):
        super().__init__()
        self.vae = vae
        self.tiles = tiles

    def forward(self, image: Tensor) -> tuple[Tensor]:
        config: Any = self.vae.config
        latents = encode(self.vae, from_pixels(image), self.tiles)
        return ((latents - config.shift_factor) * config.scaling_factor,)


class Step(nn.Module):
    """One evaluation of the transformer with its deltas, guidance, and the sampler's update.

    Inputs: latents, history, noise, timestep, coefficients, gate, ``embeds`` and ``pooled`` of the prompt; if
    ``guided`` those of the negative prompt and the scale; then the deltas in the order of ``spec.tensors()``.
    """

    def __init__(self, transformer: SD3Transformer2DModel, spec: DeltaSpec, guided: bool):
        super().__init__()
        self.transformer = transformer
        self.names = tuple(spec.tensors())
        self.injection = inject(transformer, spec)
        self.rows = 2 if guided else 1

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        cut = len(inputs) - len(self.names)
        deltas = dict(zip(self.names, inputs[cut:]))
        latents, history, noise, timestep, coefficients, gate, embeds, pooled, *rest = inputs[:cut]
        x = latents * coefficients[0]
        if self.rows == 2:
            negative_embeds, negative_pooled, scale = rest
            embeds, pooled = torch.cat([embeds, negative_embeds]), torch.cat([pooled, negative_pooled])
            x = torch.cat([x, x])
        with self.injection as injection:
            injection.set(deltas, gate, rows=self.rows)
            output = self.transformer(
                hidden_states=x,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=timestep.expand(x.shape[0]),
                return_dict=False,
            )[0]
        if self.rows == 2:
            # Not chunk(2): it would freeze the batch.
            told, negative = output.unflatten(0, (2, -1)).unbind(0)
            output = negative + scale[:, None, None, None] * (told - negative)
        return apply_row(coefficients, latents, output, noise, history)


class StableDiffusion3Img2Img:
    """The family of ``StableDiffusion3Img2ImgPipeline``, of SD 3 and 3.5, with T5 or without.

    Image prompts (IP-Adapter) stay outside the bundle.
    """

    pipeline_class = "StableDiffusion3Img2ImgPipeline"
    denoiser = "transformer"
    # What diffusers' LoRA training script for SD 3 chooses.
    default_targets = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    def __init__(self, folder: Path):
        self.folder = folder
        makers: dict[str, Callable[[dict[str, Any]], nn.Module]] = dict.fromkeys(CLIPS, _make_clip)
        if _has(folder, T5):
            makers[T5] = make_t5
        makers |= {"vae": _make_vae, "transformer": _make_transformer}
        self._components = {name: open_component(name, folder / name, make) for name, make in makers.items()}
        settings = folder / "scheduler" / "scheduler_config.json"
        self.scheduler = class_name(settings), read_config(settings)
        self._text_length = TEXT_LENGTH
        self._check_fit()

    def _check_fit(self) -> None:
        """Whether the components belong together."""
        config, latents = self._transformer.config, int(self._vae.config.latent_channels)
        width = int(config.joint_attention_dim)
        projected = sum(int(self._clip(name).projection_dim) for name in CLIPS)
        wanted = [
            ("in_channels", latents, f"the VAE's {latents} latent channels"),
            ("out_channels", latents, f"the VAE's {latents} latent channels"),
            ("pooled_projection_dim", projected, "the projections of both CLIP text encoders"),
        ]
        if T5 in self._components:
            t5: Any = self._components[T5].module.config
            wanted.append(("joint_attention_dim", int(t5.d_model), "T5's width"))
        for setting, expected, why in wanted:
            if config[setting] != expected:
                raise CheckpointError(
                    f"The transformer's config.json in {self.folder} sets {setting} to {config[setting]}",
                    f"Expected {expected}, {why}",
                    "Check that the components belong together",
                )
        hidden = sum(int(self._clip(name).hidden_size) for name in CLIPS)
        if hidden > width:
            raise CheckpointError(
                f"The transformer in {self.folder} reads text of {width} channels",
                f"Expected at least {hidden}, those of both CLIP text encoders",
                "Check that the components belong together",
            )

    @property
    def components(self) -> Mapping[str, Component]:
        return self._components

    @property
    def _transformer(self) -> SD3Transformer2DModel:
        return self._components["transformer"].module

    @property
    def _vae(self) -> AutoencoderKL:
        return self._components["vae"].module

    def _clip(self, name: str) -> CLIPTextConfig:
        return self._components[name].module.config

    @property
    def _factor(self) -> int:
        """Pixels per latent."""
        return pixels_per_latent(self._vae)

    @property
    def _latents(self) -> Shape:
        return ("batch", int(self._vae.config.latent_channels), *LATENT_SIZE)

    @property
    def _clip_length(self) -> int:
        """Tokens that CLIP reads: the pipeline pads for both to the limit of the first tokenizer."""
        limit = read_config(self.folder / "tokenizer" / "tokenizer_config.json").get("model_max_length")
        longest = min(int(self._clip(name).max_position_embeddings) for name in CLIPS)
        return min(limit, longest) if isinstance(limit, int) and limit > 0 else longest

    def _lengths(self) -> dict[str, int]:
        """Text encoder → tokens, of those that are there."""
        lengths = dict.fromkeys(CLIPS, self._clip_length)
        return lengths | ({T5: self._text_length} if T5 in self._components else {})

    @property
    def _embeds(self) -> Shape:
        length = self._clip_length + self._text_length
        return ("batch", length, int(self._transformer.config.joint_attention_dim))

    @property
    def condition_source(self) -> ConditionSource:
        return ConditionSource(
            TensorSpec("prompt.embeds", "float32", self._embeds),
            TensorSpec("image.latents", "float32", self._latents),
        )

    def schedule(self, sampler: str | type, max_steps: int) -> ScheduleTable:
        scheduler = make_scheduler(sampler, self.scheduler[1])
        kind = type(scheduler).__name__
        if not kind.startswith("FlowMatch") and not scheduler.config.get("use_flow_sigmas"):
            raise UnsupportedError(
                f"{kind} does not follow the straight paths from noise that this transformer was trained on",
                "FlowMatchEulerDiscreteScheduler (flow_euler), FlowMatchHeunDiscreteScheduler (flow_heun), "
                "or a scheduler with use_flow_sigmas",
                "Choose one of these",
            )
        return with_start(trace_scheduler(scheduler, max_steps), scheduler)

    def _axes(self, limits: Limits) -> dict[str, Axis]:
        config = self._transformer.config
        multiple = self._factor * int(config.patch_size)
        most = int(config.pos_embed_max_size) * multiple  # the model has no positions beyond
        native = int(config.sample_size) * self._factor
        longest = min(most, 2 * native) if limits.max_size is None else limits.max_size
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

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        self._text_length = limits.text_length or TEXT_LENGTH
        if self._text_length > MAX_TEXT_LENGTH:
            raise InputError(
                f"The text length is {self._text_length} tokens",
                f"The pipeline takes at most {MAX_TEXT_LENGTH}",
                "Choose a smaller one",
            )
        axes = self._axes(limits)
        side = axes["height"]
        pixels = ("batch", "height", "width", 3)
        history = ("batch", coefficients - 4, *self._latents[1:])
        native = int(self._transformer.config.sample_size) * self._factor
        plan = Plan(
            graphs=self._graphs(spec, history, base_prompt is not None, side.max, limits.tile),
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
            guidance=[Guidance("text", 7.0, above=1.0)],  # the pipeline's own default and condition
            image=ImagePolicy(
                "image", side.multiple, side.min, side.max, limits.area or min(side.max, native) ** 2
            ),
            result="edited",
            tokenizers={
                TOKENIZERS[name]: TextEncoding(self.folder / name.replace("text_encoder", "tokenizer"))
                for name in self._lengths()
            },
            strength=0.6,
            steps=50,
        )
        if base_prompt is not None:
            self._encode(plan, "base_prompt", "load", constant=base_prompt)
        self._encode(plan, "prompt", "request", said="prompt")
        self._encode(plan, "negative_prompt", "request", guided=True, said="negative_prompt")
        plan.program += [
            Call("image_encoder", "request"),
            Call("prepare", "request"),
            Call("step", "step", guided=True),
            Call("step_unguided", "step", guided=False),
            Call("image_decoder", "final"),
        ]
        return plan

    def _unscale(self, latents: Tensor) -> Tensor:
        config: Any = self._vae.config
        unscaled: Tensor = latents / config.scaling_factor + config.shift_factor
        return unscaled

    def _graphs(
        self, spec: DeltaSpec, history: Shape, based: bool, longest: int, tile: int | None
    ) -> list[GraphSpec]:
        def tensor(name: str, shape: Shape, dtype: str = "float32") -> TensorSpec:
            return TensorSpec(name, dtype, shape)

        tiles = Tiles.covering(longest, tile, self._factor)
        tile = None if tiles is None else tile
        pixels = ("batch", "height", "width", 3)
        pooled = ("batch", int(self._transformer.config.pooled_projection_dim))

        def text(prefix: str) -> list[TensorSpec]:
            return [tensor(f"{prefix}embeds", self._embeds), tensor(f"{prefix}pooled", pooled)]

        width = int(self._transformer.config.joint_attention_dim)
        length = self._text_length
        encoders, parts = [], []  # the graphs, and what `join` reads
        for name, suffix in zip(CLIPS, ("_1", "_2")):
            config = self._clip(name)
            made = [
                tensor("states", ("batch", self._clip_length, int(config.hidden_size))),
                tensor("pooled", ("batch", int(config.projection_dim))),
            ]
            ids = tensor("input_ids", ("batch", self._clip_length), "int64")
            encoders.append(GraphSpec(name, Clip(name, self._components[name].module), [ids], made))
            parts += [tensor(f"{output.name}{suffix}", output.shape) for output in made]
        if T5 in self._components:
            states = tensor("states", ("batch", length, width))
            ids = tensor("input_ids", ("batch", length), "int64")
            encoders.append(GraphSpec(T5, HiddenStates(T5, self._components[T5].module), [ids], [states]))
            parts.append(tensor("states_3", states.shape))
        common = [
            tensor("latents", self._latents),
            tensor("history", history),
            tensor("noise.step", self._latents),
            tensor("timestep", ()),
            tensor("coefficients", (int(history[1]) + 4,)),
            tensor("gate", ("batch",)),
            *text("base_prompt." if based else "prompt."),
        ]
        guided = [*text("negative_prompt."), tensor("guidance.text", ("batch",))]
        deltas = [tensor(name, ("delta_batch", *shape)) for name, shape in spec.tensors().items()]
        after = [tensor("latents.next", self._latents), tensor("history.next", history)]
        transformer = self._transformer
        return [
            *encoders,
            GraphSpec("text", Join(width, None if T5 in self._components else length), parts, text("")),
            GraphSpec(
                "image_encoder",
                ImageEncoder(self._vae, tiles),
                [tensor("image", pixels, "uint8")],
                [tensor("image.latents", self._latents)],
                tile=tile,
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
            GraphSpec("step", Step(transformer, spec, True), [*common, *guided, *deltas], after),
            GraphSpec("step_unguided", Step(transformer, spec, False), [*common, *deltas], after),
            GraphSpec(
                "image_decoder",
                ImageDecoder(self._vae, self._unscale, tiles),
                [tensor("latents", self._latents)],
                [tensor("edited", pixels, "uint8")],
                tile=tile,
            ),
        ]

    def _encode(
        self,
        plan: Plan,
        name: str,
        phase: Phase,
        guided: bool | None = None,
        said: str | None = None,
        constant: str | None = None,
    ) -> None:
        """Adds the calls that make ``<name>.embeds`` and ``<name>.pooled`` of a text."""
        parts: dict[str, str] = {}  # input of `text` → tensor
        for encoder, length in self._lengths().items():
            tokenizer = TOKENIZERS[encoder]
            ids = f"{name}.{tokenizer}.ids"
            plan.tensors[ids] = ProvidedTensor(
                "int64", ("batch", length), "text", text=said, constant=constant, tokenizer=tokenizer
            )
            suffix = encoder.removeprefix("text_encoder") or "_1"
            made = {"states": f"states{suffix}"} | ({} if encoder == T5 else {"pooled": f"pooled{suffix}"})
            outputs = {output: f"{name}.{tokenizer}.{output}" for output in made}
            parts |= {made[output]: tensor for output, tensor in outputs.items()}
            plan.program.append(Call(encoder, phase, {"input_ids": ids}, outputs, guided))
        joined = {output: f"{name}.{output}" for output in ("embeds", "pooled")}
        plan.program.append(Call("text", phase, parts, joined, guided))

    def reference_edit(self, edit: ReferenceEdit) -> npt.NDArray[np.uint8]:
        from diffusers import StableDiffusion3Img2ImgPipeline
        from PIL import Image

        absent = {} if T5 in self._components else {T5: None, "tokenizer_3": None}
        pipeline = StableDiffusion3Img2ImgPipeline.from_pretrained(
            self.folder, torch_dtype=torch.float32, local_files_only=True, **absent
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
                guidance_scale=edit.guidance["text"],
                max_sequence_length=edit.text_length or TEXT_LENGTH,
                generator=torch.Generator().manual_seed(edit.seed),
            ).images
        return np.asarray(pictures[0])


@contextmanager
def same_draws(noise: Tensor) -> Iterator[None]:
    """Within, the pipeline takes the mode of a posterior, and ``noise`` where it noises the photo's
    latents."""
    from unittest.mock import patch

    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.stable_diffusion_3 import pipeline_stable_diffusion_3_img2img as home

    def mode(posterior: Any, generator: Any = None) -> Tensor:
        del generator
        latents: Tensor = posterior.mode()
        return latents

    with patch.object(DiagonalGaussianDistribution, "sample", mode), drawn(home, noise):
        yield


def _has(folder: Path, component: str) -> bool:
    """Whether ``model_index.json`` names a class for a component that a pipeline may lack."""
    entry = read_config(folder / "model_index.json").get(component)
    return isinstance(entry, list) and all(part is not None for part in entry)


def _make_clip(config: dict[str, Any]) -> nn.Module:
    if config.get("model_type") not in (None, "clip_text_model"):
        raise UnsupportedError(
            f"A text encoder is a {config['model_type']}",
            "The first two of this pipeline are a CLIPTextModelWithProjection (clip_text_model)",
            "Export a pipeline with CLIP text encoders",
        )
    module: nn.Module = fake_module(lambda: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)))
    return module


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
    module: nn.Module = fake_module(lambda: SD3Transformer2DModel.from_config(config))
    return module
