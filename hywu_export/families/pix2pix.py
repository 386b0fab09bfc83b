"""What the families of InstructPix2Pix share: the photo's latents enter the UNet beside the noisy ones.

Three guidance rows (Brooks et al., arXiv 2211.09800): instruction and image, image alone, neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.autoencoder import ImageDecoder, ImageEncoder, pixels_per_latent
from hywu_export.families.base import ConditionSource, Limits, Plan, ReferenceEdit, TextEncoding
from hywu_export.families.components import Component, class_name, open_component, read_config
from hywu_export.families.tiling import Tiles
from hywu_export.schedules import apply_row, make_scheduler
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, fake_module
from hywu_runtime.errors import CheckpointError, InputError
from hywu_runtime.manifest import Call, Guidance, ImagePolicy, Phase, ProvidedTensor, State, Zeros

LATENT_SIZE = ("latent_height", "latent_width")
Shape = tuple[int | str, ...]


class Prepare(nn.Module):
    """Standard normal noise to the first latents."""

    def forward(self, noise: Tensor, scale: Tensor) -> tuple[Tensor]:
        return (noise * scale,)


class Step(nn.Module):
    """One evaluation of the UNet with its deltas, guidance, and the sampler's update.

    ``denoise(unet, x, timestep, *conditions)`` is the UNet's output for ``x [B, 2C, h, w]`` and for the
    conditions of one prompt, of which there are ``conditions``. Inputs are latents, history, noise, timestep,
    coefficients, gate, the photo's latents, the prompt's conditions; if ``guided`` the negative prompt's and
    the scales of text and image; then the deltas in the order of ``spec.tensors()``.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        denoise: Callable[..., Tensor],
        conditions: int,
        spec: DeltaSpec,
        guided: bool,
    ):
        super().__init__()
        self.unet = unet
        self.denoise = denoise
        self.conditions = conditions
        self.names = tuple(spec.tensors())
        self.injection = inject(unet, spec)
        self.guided = guided

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        cut = len(inputs) - len(self.names)
        deltas = dict(zip(self.names, inputs[cut:]))
        latents, history, noise, timestep, coefficients, gate, source, *rest = inputs[:cut]
        with self.injection as injection:
            injection.set(deltas, gate, rows=3 if self.guided else 1)
            output = self._predict(latents * coefficients[0], timestep, source, rest)
        return apply_row(coefficients, latents, output, noise, history)

    def _predict(self, x: Tensor, timestep: Tensor, source: Tensor, rest: list[Tensor]) -> Tensor:
        prompt, guidance = rest[: self.conditions], rest[self.conditions :]
        if not self.guided:
            return self.denoise(self.unet, torch.cat([x, source], 1), timestep, *prompt)
        *negative, text_scale, image_scale = guidance
        sources = torch.cat([source, source, torch.zeros_like(source)])
        conditions = [torch.cat([told, nothing, nothing]) for told, nothing in zip(prompt, negative)]
        x = torch.cat([torch.cat([x, x, x]), sources], 1)
        rows: Any = self.denoise(self.unet, x, timestep, *conditions)
        # Not chunk(3): it would freeze the batch.
        with_text, with_image, without = rows.unflatten(0, (3, -1)).unbind(0)
        text_scale, image_scale = text_scale[:, None, None, None], image_scale[:, None, None, None]
        guided: Tensor = (
            without + text_scale * (with_text - with_image) + image_scale * (with_image - without)
        )
        return guided


class Pix2Pix(ABC):
    """One such family: a subclass knows the text encoders, and what the UNet is told besides the photo."""

    pipeline_class: ClassVar[str]
    denoiser = "unet"
    # What the LoRA training scripts of diffusers choose for the UNets of Stable Diffusion and SDXL.
    default_targets = ("to_q", "to_k", "to_v", "to_out.0")
    text_scale: ClassVar[float]  # the pipeline's default
    tokenizers: ClassVar[Mapping[str, tuple[str, str]]]
    """Input of the text encoder's graph → the tokenizer's name in the bundle, and its folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._components = {
            name: open_component(name, folder / name, make) for name, make in self._parts().items()
        }
        settings = folder / "scheduler" / "scheduler_config.json"
        self.scheduler = class_name(settings), read_config(settings)
        self._check_unet(
            "in_channels", 2 * self._channels, f"twice the VAE's {self._channels} latent channels"
        )
        self._check_unet("out_channels", self._channels, f"the VAE's {self._channels} latent channels")
        self._tokenizer_configs = {
            tokenizer: read_config(folder / tokenizer / "tokenizer_config.json")
            for _, tokenizer in self.tokenizers.values()
        }

    @abstractmethod
    def _parts(self) -> Mapping[str, Callable[[dict[str, Any]], nn.Module]]:
        """Component → what makes its module from its configuration; ``unet`` and ``vae`` among them."""

    @property
    @abstractmethod
    def _conditions(self) -> Mapping[str, Shape]:
        """What a prompt becomes, by name; ``embeds`` first. The text encoder's graph has these outputs."""

    @abstractmethod
    def _text_encoder(self, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> GraphSpec:
        """The graph ``text_encoder``."""

    @abstractmethod
    def _denoise(
        self, unet: UNet2DConditionModel, x: Tensor, timestep: Tensor, *conditions: Tensor
    ) -> Tensor:
        """The UNet's output ``[B, C, h, w]`` for ``x [B, 2C, h, w]`` and a prompt's conditions."""

    @abstractmethod
    def _unscale(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, from what the sampler has."""

    @abstractmethod
    def _pipeline(self) -> Any:
        """diffusers' own, in float32."""

    def _size(self, height: int, width: int) -> dict[str, int]:
        """How the pipeline is told the picture's size, if it does not see it."""
        return {}

    @property
    def _source_scale(self) -> float:
        """What the source's latents are multiplied with: nothing, as these pipelines do it."""
        return 1.0

    def _check_unet(self, setting: str, expected: int, why: str) -> None:
        found = self._unet.config[setting]  # cross_attention_dim may be a list, one entry per level
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
    def _channels(self) -> int:
        return int(self._vae.config.latent_channels)

    @property
    def _factor(self) -> int:
        """Pixels per latent."""
        return pixels_per_latent(self._vae)

    @property
    def _native_side(self) -> int:
        """The side, in pixels, that the UNet was made for."""
        sample = self._unet.config.sample_size
        return int(sample if isinstance(sample, int) else min(sample)) * self._factor

    @property
    def _latents(self) -> Shape:
        return ("batch", self._channels, *LATENT_SIZE)

    @property
    def condition_source(self) -> ConditionSource:
        return ConditionSource(
            TensorSpec("prompt.embeds", "float32", self._conditions["embeds"]),
            TensorSpec("image.latents", "float32", self._latents),
        )

    def _length(self, text_encoder: str, tokenizer: str) -> int:
        """Tokens of a prompt: the pipeline pads to the tokenizer's limit, usually that of the model."""
        limit = self._tokenizer_configs[tokenizer].get("model_max_length")
        config: Any = self._components[text_encoder].module.config
        positions = int(config.max_position_embeddings)
        return min(limit, positions) if isinstance(limit, int) and limit > 0 else positions

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

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        axes = self._axes(limits)
        side = axes["height"]
        history = ("batch", coefficients - 4, *self._latents[1:])
        pixels = ("batch", "height", "width", 3)
        plan = Plan(
            graphs=self._graphs(spec, history, base_prompt is not None, side.max, limits.tile),
            axes=axes,
            tensors={
                "image": ProvidedTensor("uint8", pixels, "image"),
                "noise.initial": ProvidedTensor("float32", self._latents, "noise", draw="initial"),
                "noise.step": ProvidedTensor("float32", self._latents, "noise", draw="step"),
                "initial_scale": ProvidedTensor("float32", (), "schedule", column="initial_scale"),
                "timestep": ProvidedTensor("float32", (), "schedule", column="timesteps"),
                "coefficients": ProvidedTensor("float32", (coefficients,), "schedule", column="coefficients"),
                "guidance.text": ProvidedTensor("float32", ("batch",), "guidance", guidance="text"),
                "guidance.image": ProvidedTensor("float32", ("batch",), "guidance", guidance="image"),
                "gate": ProvidedTensor("float32", ("batch",), "gate"),
            },
            state=[
                State("latents", "latents.next", "latents.initial"),
                State("history", "history.next", Zeros(history)),
            ],
            guidance=[
                # The pipeline's own defaults, and its own condition for guidance.
                Guidance("text", self.text_scale, above=1.0),
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
            tokenizers={
                name: TextEncoding(self.folder / folder) for name, folder in self.tokenizers.values()
            },
        )
        if base_prompt is not None:
            self._encode(plan, "base_prompt", "load", constant=base_prompt)
        self._encode(plan, "prompt", "request", said="prompt")
        self._encode_negative(plan)
        plan.program += [
            Call("image_encoder", "request"),
            Call("prepare", "request"),
            Call("step", "step", guided=True),
            Call("step_unguided", "step", guided=False),
            Call("image_decoder", "final"),
        ]
        return plan

    def _graphs(
        self, spec: DeltaSpec, history: Shape, based: bool, longest: int, tile: int | None
    ) -> list[GraphSpec]:
        def tensor(name: str, shape: Shape, dtype: str = "float32") -> TensorSpec:
            return TensorSpec(name, dtype, shape)

        def conditions(prefix: str) -> list[TensorSpec]:
            return [tensor(f"{prefix}{name}", shape) for name, shape in self._conditions.items()]

        common = [
            tensor("latents", self._latents),
            tensor("history", history),
            tensor("noise.step", self._latents),
            tensor("timestep", ()),
            tensor("coefficients", (history[1] + 4,) if isinstance(history[1], int) else ()),
            tensor("gate", ("batch",)),
            tensor("image.latents", self._latents),
            *conditions("base_prompt." if based else "prompt."),
        ]
        guidance = [
            *conditions("negative_prompt."),
            tensor("guidance.text", ("batch",)),
            tensor("guidance.image", ("batch",)),
        ]
        deltas = [tensor(name, ("delta_batch", *shape)) for name, shape in spec.tensors().items()]
        after = [tensor("latents.next", self._latents), tensor("history.next", history)]
        guided, unguided = (
            Step(self._unet, self._denoise, len(self._conditions), spec, guided) for guided in (True, False)
        )
        pixels = ("batch", "height", "width", 3)
        tiles = Tiles.covering(longest, tile, self._factor)
        tile = None if tiles is None else tile
        ids = [tensor(name, self._conditions["embeds"][:2], "int64") for name in self.tokenizers]
        return [
            self._text_encoder(ids, conditions("")),
            GraphSpec(
                "image_encoder",
                ImageEncoder(self._vae, self._source_scale, tiles),
                [tensor("image", pixels, "uint8")],
                [tensor("image.latents", self._latents)],
                tile=tile,
            ),
            GraphSpec(
                "prepare",
                Prepare(),
                [tensor("noise.initial", self._latents), tensor("initial_scale", ())],
                [tensor("latents.initial", self._latents)],
            ),
            GraphSpec("step", guided, [*common, *guidance, *deltas], after),
            GraphSpec("step_unguided", unguided, [*common, *deltas], after),
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
        *,
        said: str | None = None,
        constant: str | None = None,
    ) -> None:
        """Adds the call that turns a text, one of the request or a constant, into its conditions."""
        inputs = self._tokens(plan, name, said, constant)
        outputs = {condition: f"{name}.{condition}" for condition in self._conditions}
        plan.program.append(Call("text_encoder", phase, inputs, outputs, guided))

    def _tokens(self, plan: Plan, name: str, said: str | None, constant: str | None) -> dict[str, str]:
        """Adds what the text encoder's graph reads of a text; its inputs → these tensors."""
        shape = self._conditions["embeds"][:2]
        inputs = {}
        for argument, (tokenizer, _) in self.tokenizers.items():
            inputs[argument] = name + argument.removeprefix("input").replace("_ids", ".ids", 1)
            plan.tensors[inputs[argument]] = ProvidedTensor(
                "int64", shape, "text", text=said, constant=constant, tokenizer=tokenizer
            )
        return inputs

    def _encode_negative(self, plan: Plan) -> None:
        self._encode(plan, "negative_prompt", "request", guided=True, said="negative_prompt")

    def reference_edit(self, edit: ReferenceEdit) -> npt.NDArray[np.uint8]:
        from PIL import Image

        pipeline = self._pipeline()
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
            **self._size(*edit.photo.shape[:2]),
        ).images
        return np.asarray(pictures[0])


def make_vae(config: dict[str, Any]) -> nn.Module:
    """An AutoencoderKL without data."""
    module: nn.Module = fake_module(lambda: AutoencoderKL.from_config(config))
    return module


def make_unet(config: dict[str, Any]) -> nn.Module:
    """A UNet without data."""
    module: nn.Module = fake_module(lambda: UNet2DConditionModel.from_config(config))
    return module
