"""Qwen-Image's editors: latents of pictures in the denoiser's sequence, and Qwen2.5-VL, which sees them too.

The technical report is arXiv 2508.02324. `QwenImageEditPipeline` takes one picture;
`QwenImageEditPlusPipeline` (2509 and later) several, each at its own size, and shows the text encoder small
ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

from hywu_export.deltas import DeltaSpec
from hywu_export.families.base import LONG_TEXT, ConditionSource, Limits, Plan, ReferenceEdit, TextEncoding
from hywu_export.families.components import Component, class_name, open_component, read_config
from hywu_export.families.qwen_image import (
    ImageDecoder,
    ImageEncoder,
    Step,
    make_transformer,
    make_vae,
    pixels_per_latent,
)
from hywu_export.families.qwen_vl import PictureSettings, PromptEncoder, VisionEncoder, make_text_encoder
from hywu_export.families.tiling import Tiles
from hywu_export.schedules import ScheduleTable, Shift, make_scheduler, shift_table
from hywu_export.schedules.shift import COLUMNS, check_shiftable
from hywu_export.tracing import Axis, GraphSpec, TensorSpec
from hywu_runtime.errors import CheckpointError, InputError
from hywu_runtime.manifest import Call, Guidance, ImagePolicy, ProvidedTensor, Resize, State

PROMPT_TOKENS = 512
"""Length of a prompt with the end of its chat, by default: the pipelines' ``max_sequence_length``. A longer
one is refused; the pipelines take it."""
DROPPED = 64
"""Tokens of the chat's start whose states the pipelines leave out: nearly all of the system's message."""
AREA = 1024 * 1024  # of a picture, in pixels
SEEN_AREA = 384 * 384  # of a picture as the text encoder of the Plus pipeline sees it
SIZE_STEP = 32  # pixels
LONGEST = 4096  # side of a picture, in pixels; at the default area, pictures of up to 16:1 reach no limit

SYSTEM = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate.<|im_end|>\n<|im_start|>user\n"
)
BEFORE_PICTURE, AFTER_PICTURE = "<|vision_start|>", "<|vision_end|>"
PROMPT = "{}<|im_end|>\n<|im_start|>assistant\n"


class QwenImageEdit:
    """The family of ``QwenImageEditPipeline``."""

    pipeline_class = "QwenImageEditPipeline"
    denoiser = "transformer"
    # What the LoRA training script of diffusers chooses for Qwen-Image: the attention of the latents.
    default_targets = ("to_k", "to_q", "to_v", "to_out.0")
    max_pictures = 1

    def __init__(self, folder: Path):
        self.folder = folder
        self._components = {
            "text_encoder": open_component(
                "text_encoder", folder / "text_encoder", make_text_encoder, unused=("lm_head.",)
            ),
            "vae": open_component("vae", folder / "vae", make_vae),
            "transformer": open_component("transformer", folder / "transformer", make_transformer),
        }
        settings = folder / "scheduler" / "scheduler_config.json"
        self.scheduler = class_name(settings), read_config(settings)
        self._seen = PictureSettings.read(folder / "processor")
        self._prompt_tokens, self._pictures = PROMPT_TOKENS, 1  # until a plan says otherwise
        self._check_fit()

    def _check_fit(self) -> None:
        """Whether the components belong together."""
        latents, width = int(self._vae.config.z_dim), self._width
        config, vision = (
            self._transformer.config,
            self._text_encoder.config.vision_config,
        )
        for where, setting, found, expected, why in (
            ("transformer", "in_channels", config.in_channels, 4 * latents, "2x2 of the VAE's latents"),
            ("transformer", "out_channels", config.out_channels, latents, "the VAE's latent channels"),
            ("transformer", "patch_size", config.patch_size, 2, "which the pipeline packs"),
            ("transformer", "joint_attention_dim", config.joint_attention_dim, width, "the text encoder's"),
            ("text encoder", "out_hidden_size", vision.out_hidden_size, width, "its own width"),
            ("processor", "patch_size", self._seen.patch, vision.patch_size, "the text encoder's"),
            ("processor", "merge_size", self._seen.merge, vision.spatial_merge_size, "the text encoder's"),
        ):
            if found != expected:
                raise CheckpointError(
                    f"The {where}'s configuration in {self.folder} sets {setting} to {found}",
                    f"Expected {expected}, {why}",
                    "Check that the components belong together",
                )

    @property
    def components(self) -> Mapping[str, Component]:
        return self._components

    @property
    def _transformer(self) -> QwenImageTransformer2DModel:
        return self._components["transformer"].module

    @property
    def _vae(self) -> AutoencoderKLQwenImage:
        return self._components["vae"].module

    @property
    def _text_encoder(self) -> Any:
        return self._components["text_encoder"].module

    @property
    def _width(self) -> int:
        """Channels of the prompt's states."""
        return int(self._text_encoder.config.text_config.hidden_size)

    @property
    def condition_source(self) -> ConditionSource:
        texts = self._texts(self._pictures)
        length = sum(map(len, texts)) - DROPPED + self._prompt_tokens
        return ConditionSource(
            TensorSpec("prompt.text", "float32", ("batch", length, self._width)),
            TensorSpec("image.latents", "float32", self._latents("")),
        )

    def schedule(self, sampler: str, max_steps: int) -> ScheduleTable:
        return shift_table(make_scheduler(sampler, self.scheduler[1], check_shiftable), max_steps)

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        count = limits.images
        if not 1 <= count <= self.max_pictures:
            raise InputError(
                f"{count} pictures were asked for",
                f"The {self.pipeline_class} takes {_range(self.max_pictures)}",
                "Correct --images",
            )
        self._prompt_tokens, self._pictures = limits.text_length or PROMPT_TOKENS, count
        return _Planner(self, spec, limits, base_prompt).plan()

    # What the pipelines differ in.

    def _before_pictures(self, count: int) -> list[str]:
        """The chat before each picture, without what is after the one before it."""
        return [SYSTEM + BEFORE_PICTURE]

    def _seen_sizes(self) -> tuple[Resize, ...]:
        """How a picture at its working size (or the photo, if the first step has an area) comes to the size
        at which the text encoder sees it."""
        s = self._seen
        return (Resize("bicubic", s.side, min_area=s.min_area, max_area=s.max_area),)

    def _longest_seen(self, longest: int) -> int:
        """The longest side of a picture as the text encoder sees it, where a side may be ``longest``."""
        return longest

    def _texts(self, count: int) -> list[list[int]]:
        """Token ids before each of ``count`` pictures, and after the last."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
        before = self._before_pictures(count)
        after = ["", *[AFTER_PICTURE] * count]
        texts = [tokenizer(a + b).input_ids for a, b in zip(after, [*before, ""])]
        if len(texts[0]) < DROPPED:
            raise CheckpointError(
                f"The tokenizer in {self.folder / 'tokenizer'} has {len(texts[0])} tokens for a chat's start",
                f"The pipeline leaves out the first {DROPPED}",
                "Check that it is the pipeline's own tokenizer",
            )
        return texts

    def _latents(self, suffix: str) -> tuple[int | str, ...]:
        return "batch", int(self._vae.config.z_dim), f"latent_height{suffix}", f"latent_width{suffix}"

    def reference_edit(self, edit: ReferenceEdit) -> npt.NDArray[np.uint8]:
        from hywu_export.families.qwen_reference import edit_with, open_pipeline

        pipeline = open_pipeline(self.folder, self.pipeline_class)
        pipeline.scheduler = make_scheduler(edit.sampler, self.scheduler[1], check_shiftable)
        pictures = edit_with(
            pipeline,
            [[edit.photo, *edit.more_photos]],
            [edit.prompt],
            [edit.negative_prompt],
            edit.steps,
            edit.guidance["text"],
            edit.latents,
        )
        return pictures[0]


class QwenImageEditPlus(QwenImageEdit):
    """The family of ``QwenImageEditPlusPipeline``: the last picture's size is that of the result."""

    pipeline_class = "QwenImageEditPlusPipeline"
    max_pictures = 16

    def _before_pictures(self, count: int) -> list[str]:
        pictures = [f"Picture {number}: {BEFORE_PICTURE}" for number in range(1, count + 1)]
        return [SYSTEM + pictures[0], *pictures[1:]]

    def _seen_sizes(self) -> tuple[Resize, ...]:
        return (Resize("lanczos", SIZE_STEP, area=SEEN_AREA), *super()._seen_sizes())

    def _longest_seen(self, longest: int) -> int:
        return 4 * math.isqrt(SEEN_AREA)  # of a picture of 16:1


class _Planner:
    """Graphs and program of one bundle."""

    def __init__(self, family: QwenImageEdit, spec: DeltaSpec, limits: Limits, base_prompt: str | None):
        self.family, self.spec, self.limits, self.base_prompt = family, spec, limits, base_prompt
        self.count = limits.images
        self.texts = family._texts(self.count)
        self.factor = pixels_per_latent(family._vae)
        # The last picture has plain names: its size is that of the result.
        self.suffixes = [f"_{number}" for number in range(1, self.count)] + [""]

    @property
    def _lengths(self) -> list[int]:
        """Tokens of the texts before each picture that are left."""
        return [len(self.texts[0]) - DROPPED, *map(len, self.texts[1:-1])]

    def _axes(self) -> dict[str, Axis]:
        multiple = math.lcm(SIZE_STEP, 2 * self.factor)
        longest = LONGEST if self.limits.max_size is None else self.limits.max_size
        if longest < multiple:
            raise InputError(
                f"The largest size is {longest} pixels",
                f"Sides are multiples of {multiple}",
                "Choose a larger one",
            )
        side = Axis(min=multiple, max=longest // multiple * multiple, multiple=multiple)
        step = self.family._seen.side
        # A side of the smallest area, or the longest, and one step for rounding.
        longest = max(self.family._longest_seen(side.max), math.isqrt(self.family._seen.min_area))
        most = longest // step * step + step
        seen = Axis(min=step, max=most, multiple=step)
        axes = {
            "batch": Axis(1, self.limits.max_batch),
            "delta_batch": Axis(1, self.limits.max_batch, one_or="batch"),
        }
        for suffix in reversed(self.suffixes):
            axes |= {f"height{suffix}": side, f"width{suffix}": side}
            axes |= {f"seen_height{suffix}": seen, f"seen_width{suffix}": seen}
            for name in ("height", "width"):
                axes[f"latent_{name}{suffix}"] = Axis(of=f"{name}{suffix}", divide=self.factor)
            axes[f"rows{suffix}"] = Axis(of=f"seen_height{suffix}", divide=step)
            axes[f"columns{suffix}"] = Axis(of=f"seen_width{suffix}", divide=step)
        return axes

    def plan(self) -> Plan:
        family, axes = self.family, self._axes()
        side = axes["height"]
        area = self.limits.area or min(side.max**2, AREA)
        return Plan(
            graphs=self._graphs(axes),
            axes=axes,
            tensors=self._tensors(),
            program=self._program(),
            state=[State("latents", "latents.next", "noise.initial")],
            guidance=[Guidance("text", 4.0, above=1.0)],  # the pipelines' ``true_cfg_scale``
            image=ImagePolicy("image", side.multiple, side.min, side.max, area, enlarge=True),
            result="edited",
            tokenizers={
                LONG_TEXT: TextEncoding(family.folder / "tokenizer", template=PROMPT, truncate=False)
            },
        )

    def _each(
        self, name: str, dtype: str, shape: Sequence[int | str], free: Sequence[str]
    ) -> list[TensorSpec]:
        """A tensor for every picture; ``{}`` in the name, and each axis in ``free``, take its suffix."""
        return [
            TensorSpec(
                name.format(suffix),
                dtype,
                tuple(f"{size}{suffix}" if size in free else size for size in shape),
            )
            for suffix in self.suffixes
        ]

    def _pixels(self, prefix: str, name: str) -> list[TensorSpec]:
        sides = (f"{prefix}height", f"{prefix}width")
        return self._each(name, "uint8", ("batch", *sides, 3), sides)

    def _latents(self, name: str) -> list[TensorSpec]:
        shape = self.family._latents("")
        return self._each(name, "float32", shape, [axis for axis in shape[2:] if isinstance(axis, str)])

    def _states(self, name: str) -> list[TensorSpec]:
        shape = ("batch", "rows", "columns", self.family._width)
        return self._each(name, "float32", shape, ("rows", "columns"))

    def _text(self, name: str) -> TensorSpec:
        length = sum(self._lengths) + len(self.texts[-1]) + self.family._prompt_tokens
        return TensorSpec(name, "float32", ("batch", length, self.family._width))

    def _several_windows(self, axes: Mapping[str, Axis]) -> dict[str, int]:
        """Sizes for tracing the vision tower: torch takes the number of windows for a constant if it is 1."""
        sizes = {}
        for number, suffix in enumerate(self.suffixes):
            for name, tokens in (("seen_height", 9 + 2 * number), ("seen_width", 6 + 2 * number)):
                axis = axes[name + suffix]
                sizes[name + suffix] = min(tokens * axis.multiple, axis.max)
        return sizes

    def _graphs(self, axes: Mapping[str, Axis]) -> list[GraphSpec]:
        family = self.family
        latents = TensorSpec("latents", "float32", family._latents(""))
        text_encoder = family._text_encoder
        ids = TensorSpec("input_ids", "int64", ("batch", self.family._prompt_tokens))
        prompt = "prompt" if self.base_prompt is None else "base_prompt"

        def states(name: str) -> list[TensorSpec]:
            mask = TensorSpec(f"{name}.mask", "int64", ("batch", self.family._prompt_tokens))
            return [mask, self._text(f"{name}.text"), *self._states(f"{name}.picture{{}}")]

        common = [
            latents,
            TensorSpec("coefficients", "float32", (COLUMNS,)),
            TensorSpec("gate", "float32", ("batch",)),
            *self._latents("image{}.latents"),
            *states(prompt),
        ]
        guided = [*states("negative_prompt"), TensorSpec("guidance.text", "float32", ("batch",))]
        deltas = [
            TensorSpec(name, "float32", ("delta_batch", *shape))
            for name, shape in self.spec.tensors().items()
        ]
        after = [TensorSpec("latents.next", "float32", latents.shape)]
        tiles = Tiles.covering(axes["height"].max, self.limits.tile, self.factor)
        tile = None if tiles is None else self.limits.tile
        shift = Shift.from_config(family.scheduler[1])

        def step(guided: bool) -> Step:
            return Step(family._transformer, self.spec, shift, self._lengths, guided)

        return [
            GraphSpec(
                "vision_encoder",
                VisionEncoder(text_encoder, family._seen),
                self._pixels("seen_", "seen{}"),
                self._states("seen{}.tokens"),
                example_sizes=self._several_windows(axes),
            ),
            GraphSpec(
                "text_encoder",
                PromptEncoder(text_encoder, self.texts, DROPPED),
                [ids, *self._states("seen{}.tokens")],
                [self._text("text"), *self._states("picture{}")],
            ),
            GraphSpec(
                "image_encoder",
                ImageEncoder(family._vae, tiles),
                self._pixels("", "image{}"),
                self._latents("image{}.latents"),
                tile=tile,
            ),
            GraphSpec("step", step(True), [*common, *guided, *deltas], after),
            GraphSpec("step_unguided", step(False), [*common, *deltas], after),
            GraphSpec(
                "image_decoder",
                ImageDecoder(family._vae, tiles),
                [latents],
                [TensorSpec("edited", "uint8", ("batch", "height", "width", 3))],
                tile=tile,
            ),
        ]

    def _tensors(self) -> dict[str, ProvidedTensor]:
        latents = self.family._latents("")
        steps = self.family._seen_sizes()
        tensors = {
            "noise.initial": ProvidedTensor("float32", latents, "noise", draw="initial"),
            "coefficients": ProvidedTensor("float32", (COLUMNS,), "schedule", column="coefficients"),
            "guidance.text": ProvidedTensor("float32", ("batch",), "guidance", guidance="text"),
            "gate": ProvidedTensor("float32", ("batch",), "gate"),
        }
        pictures = zip(self._pixels("", "image{}"), self._pixels("seen_", "seen{}"))
        for number, (image, seen) in enumerate(pictures):
            index = number or None
            tensors[image.name] = ProvidedTensor("uint8", image.shape, "image", index=index)
            origin = image.name if steps[0].area is None else None
            tensors[seen.name] = ProvidedTensor(
                "uint8", seen.shape, "image", index=index, origin=origin, resize=steps
            )
        for name in self._prompts():
            ids = f"{name}.ids"
            shape = ("batch", self.family._prompt_tokens)
            constant = self.base_prompt if name == "base_prompt" else None
            said = name if constant is None else None
            tensors[ids] = ProvidedTensor(
                "int64", shape, "text", text=said, constant=constant, tokenizer=LONG_TEXT
            )
            tensors[f"{name}.mask"] = ProvidedTensor("int64", shape, "mask", of=ids)
        return tensors

    def _prompts(self) -> list[str]:
        """Which texts are encoded. All of them with the pictures, so in the request phase."""
        return [*(["base_prompt"] if self.base_prompt is not None else []), "prompt", "negative_prompt"]

    def _program(self) -> list[Call]:
        program = [Call("vision_encoder", "request")]
        for name in self._prompts():
            outputs = {"text": f"{name}.text"}
            for suffix in self.suffixes:
                outputs[f"picture{suffix}"] = f"{name}.picture{suffix}"
            guided = True if name == "negative_prompt" else None
            program.append(Call("text_encoder", "request", {"input_ids": f"{name}.ids"}, outputs, guided))
        return [
            *program,
            Call("image_encoder", "request"),
            Call("step", "step", guided=True),
            Call("step_unguided", "step", guided=False),
            Call("image_decoder", "final"),
        ]


def _range(most: int) -> str:
    return "one" if most == 1 else f"one to {most}"
