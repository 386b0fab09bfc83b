"""HunyuanImage-3.0-Instruct: an autoregressive mixture of experts that also denoises pictures.

Its checkpoint is a transformers folder: ``config.json`` with ``model_type`` ``hunyuan_image_3_moe``, weights
under ``model*.safetensors``, ``tokenizer.json``, ``generation_config.json``.

The text that is encoded is finished: the prompt, and directly behind it, if the model was asked for them,
the thoughts it wrote (``<think>…</think><recaption>…</recaption>``). Writing them is a text model's loop and
lies outside the bundle. Assumed where the public files are silent: ``cond_token_attn_type`` is what
config.json says, ``full`` where it says nothing; the photo is one, and has the size of the picture that is
made.

A checkpoint without VAE gives a bundle whose photo is latents and ViT patches, given by the caller, and which
ends with the state ``latents``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from hywu_export.deltas import DeltaSpec
from hywu_export.families.base import ComputedCondition, Limits, Plan, ReferenceEdit, TextEncoding
from hywu_export.families.components import Component, open_component, read_config
from hywu_export.families.hunyuan import graphs
from hywu_export.families.hunyuan.config import HunyuanConfig
from hywu_export.families.hunyuan.model import HunyuanImage3
from hywu_export.families.hunyuan.schedule import DEFAULT_SHIFT, ShiftedFlowScheduler
from hywu_export.families.hunyuan.sequence import Suffix, Tokens, buckets, read_tokens
from hywu_export.families.hunyuan.vision import Patches
from hywu_export.schedules import make_scheduler, sampler_name
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, fake_module
from hywu_runtime.errors import InputError, UnsupportedError
from hywu_runtime.manifest import Call, Dtype, Guidance, ImagePolicy, ProvidedTensor, State, Zeros

TOKENIZER = "main"
LAYERS = "model.layers."
MAX_TEXT = 2304  # tokens of prompt and thoughts; the published loop writes at most 2048
DEFAULT_GUIDANCE = 2.5
LATENT_SIZE = ("latent_height", "latent_width")
SOURCE_SIZE = ("source_height", "source_width")


class HunyuanImage3Instruct:
    """The family of ``HunyuanImage3ForCausalMM``."""

    pipeline_class = "HunyuanImage3ForCausalMM"
    denoiser = "transformer"
    # What the published generator makes deltas for.
    default_targets = (
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "shared_mlp.gate_and_up_proj",
        "shared_mlp.down_proj",
        "experts.w1",
        "experts.w2",
        "experts.w3",
    )

    def __init__(self, folder: Path):
        self.folder = folder
        self._component = open_component("transformer", folder, _make)
        self.scheduler = ShiftedFlowScheduler, {"shift": self._setting("flow_shift", DEFAULT_SHIFT)}

    @property
    def components(self) -> Mapping[str, Component]:
        return {"transformer": self._component}

    @property
    def transformer(self) -> HunyuanImage3:
        """The network, without data."""
        module = self._component.module
        assert isinstance(module, HunyuanImage3)
        return module

    @property
    def config(self) -> HunyuanConfig:
        """Its sizes."""
        return self.transformer.config

    @cached_property
    def tokens(self) -> Tokens:
        """The ids of the instruct template."""
        return read_tokens(self.folder, self.config.base_size)

    def _setting(self, name: str, default: float) -> float:
        path = self.folder / "generation_config.json"
        value = read_config(path).get(name) if path.exists() else None
        return default if value is None else float(value)

    @property
    def sampler(self) -> str:
        """The name of the checkpoint's own sampler."""
        return sampler_name(make_scheduler(*self.scheduler))

    @property
    def multiple(self) -> int:
        """What the sides of pictures are multiples of, in pixels: as in the buckets, some of which are no
        multiples of a sixteenth of the base size."""
        return self.config.downsample

    @property
    def _text_length(self) -> int:
        return min(MAX_TEXT, self.config.max_positions // 4)

    @property
    def _suffix(self) -> tuple[int | str, ...]:
        return ("batch", self._text_length + self.tokens.added)

    @property
    def _latents(self) -> tuple[int | str, ...]:
        return ("batch", self.config.latent_channels, *LATENT_SIZE)

    @property
    def _source(self) -> tuple[int | str, ...]:
        size = SOURCE_SIZE if self.config.vae is None else LATENT_SIZE
        return ("batch", self.config.latent_channels, *size)

    @property
    def _vit(self) -> list[TensorSpec]:
        config = self.config
        count = config.vision.max_num_patches
        return [
            TensorSpec("image.vit", "float32", ("batch", count, config.hidden_size)),
            TensorSpec("vit.grid", "int64", (2,)),
        ]

    @property
    def condition_source(self) -> ComputedCondition:
        """The base's own last hidden states, deltas off."""
        prompt = graphs.Prompt(self.transformer, self.tokens)
        hidden, length = self.config.hidden_size, self._suffix[1]
        assert isinstance(length, int)
        made = [
            TensorSpec("condition.before", "float32", ("batch", prompt.before, hidden)),
            TensorSpec("condition.photo", "float32", ("batch", *self._source[2:], hidden)),
            TensorSpec("condition.after", "float32", ("batch", prompt.after(length), hidden)),
        ]
        reads = [
            TensorSpec("sequence.ids", "int64", self._suffix),
            TensorSpec("image.latents", "float32", self._source),
            *self._vit,
        ]
        module = graphs.Condition(self.transformer, self.tokens)
        graph = GraphSpec("condition", module, reads, made, integers=self._integers)
        mask = TensorSpec("sequence.mask", "int64", self._suffix)
        part = Plan(graphs=[graph], program=[Call("condition", "request")])
        return ComputedCondition(part, [*made, mask], graphs.JoinCondition())

    def _axes(self, limits: Limits) -> dict[str, Axis]:
        config = self.config
        axes = {
            "batch": Axis(1, limits.max_batch),
            "delta_batch": Axis(1, limits.max_batch, one_or="batch"),
        }
        multiple = self.multiple
        longest = (limits.max_size or 2 * config.base_size) // multiple * multiple
        shortest = min(max(config.base_size // 2 // multiple, 1) * multiple, longest)
        if longest < 2 * multiple:
            raise InputError(
                f"The largest size is {limits.max_size} pixels",
                f"Sides are multiples of {multiple}, and there are at least two",
                "Choose a larger one",
            )
        shortest = min(shortest, longest - multiple)
        if config.vae is None:
            side = Axis(1, longest // config.downsample)
            return axes | dict.fromkeys((*SOURCE_SIZE, *LATENT_SIZE), side)
        side = Axis(shortest, longest, multiple)
        divide = config.downsample
        return axes | {
            "height": side,
            "width": side,
            "latent_height": Axis(of="height", divide=divide),
            "latent_width": Axis(of="width", divide=divide),
        }

    @property
    def _integers(self) -> dict[str, tuple[int, int]]:
        """From where to where integers between graphs reach."""
        ids = (0, self.config.vocab_size)
        said = [
            f"{name}.{part}" for name in ("sequence", "base_sequence") for part in ("ids", "unconditional")
        ]
        grid = (1, math.isqrt(self.config.vision.max_num_patches) + 1)
        return dict.fromkeys([*said, "size.id"], ids) | {"vit.grid": grid}

    def _cache(self, rows: int) -> list[TensorSpec]:
        """Keys and values of every layer, text and photo apart."""
        config = self.config
        before, length = graphs.Prompt(self.transformer, self.tokens), self._suffix[1]
        assert isinstance(length, int)
        text = before.before + before.after(length + 1)
        heads = (rows, "batch", config.num_kv_heads)
        name = "cache" if rows == 2 else "cache_unguided"
        shapes: dict[str, tuple[int | str, ...]] = {
            "text": (*heads, text, config.head_dim),
            "photo": (*heads, *self._source[2:], config.head_dim),
        }
        return [
            TensorSpec(f"{name}.{layer}.{kind}.{part}", "float32", shape)
            for layer in range(config.num_layers)
            for kind in ("key", "value")
            for part, shape in shapes.items()
        ]

    def plan(self, spec: DeltaSpec, limits: Limits, base_prompt: str | None, coefficients: int) -> Plan:
        for target in spec.targets:
            if not target.module.startswith(LAYERS):
                raise UnsupportedError(
                    f"{target.module!r} is a delta target",
                    f"Deltas act on the decoder's layers, {LAYERS}*",
                    "Leave it out of the targets",
                )
        config, network, tokens = self.config, self.transformer, self.tokens
        history = ("batch", coefficients - 4, *self._latents[1:])
        text = ("batch", self._text_length)
        axes = self._axes(limits)

        def tensor(name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> TensorSpec:
            return TensorSpec(name, dtype, shape)

        said = "sequence" if base_prompt is None else "base_sequence"
        ids, unconditional, mask = (
            tensor(f"{said}.{name}", self._suffix, "int64") for name in ("ids", "unconditional", "mask")
        )
        size = tensor("size.id", (1,), "int64")
        gate = tensor("gate", ("batch",))
        source = tensor("image.latents", self._source)
        vit, grid = self._vit
        patches = tensor("vit.patches", (*vit.shape[:2], config.vision.patch_features))
        cached = graphs.cached_targets(spec, config.num_layers)
        deltas, cached_deltas = (
            [tensor(name, ("delta_batch", *shape)) for name, shape in targets.tensors().items()]
            for targets in (spec, cached)
        )
        prefill = [source, vit, grid, mask, size, gate, ids]
        step = [
            tensor("latents", self._latents),
            tensor("history", history),
            tensor("noise.step", self._latents),
            tensor("timestep", ()),
            tensor("coefficients", (coefficients,)),
            gate,
            mask,
        ]
        after = [tensor("latents.next", self._latents), tensor("history.next", history)]
        made = [
            tensor(f"sequence.{name}", self._suffix, "int64") for name in ("ids", "unconditional", "mask")
        ]
        plan = Plan(
            graphs=[
                GraphSpec(
                    "sequence",
                    Suffix(tokens),
                    [tensor("input_ids", text, "int64"), tensor("attention_mask", text, "int64")],
                    made,
                ),
                GraphSpec("vision", graphs.Vision(network), [patches, grid], [vit], integers=self._integers),
                GraphSpec(
                    "prepare",
                    graphs.Prepare(tokens, config.base_size),
                    [tensor("noise.initial", self._latents), tensor("initial_scale", ())],
                    [tensor("latents.initial", self._latents), size],
                ),
            ],
            axes=axes,
            tensors={
                "noise.initial": ProvidedTensor("float32", self._latents, "noise", draw="initial"),
                "noise.step": ProvidedTensor("float32", self._latents, "noise", draw="step"),
                "initial_scale": ProvidedTensor("float32", (), "schedule", column="initial_scale"),
                "timestep": ProvidedTensor("float32", (), "schedule", column="timesteps"),
                "coefficients": ProvidedTensor("float32", (coefficients,), "schedule", column="coefficients"),
                "guidance.text": ProvidedTensor("float32", ("batch",), "guidance", guidance="text"),
                "gate": ProvidedTensor("float32", ("batch",), "gate"),
            },
            program=[],
            state=[
                State("latents", "latents.next", "latents.initial"),
                State("history", "history.next", Zeros(history)),
            ],
            guidance=[Guidance("text", self._setting("diff_guidance_scale", DEFAULT_GUIDANCE), above=1.0)],
            tokenizers={
                TOKENIZER: TextEncoding(
                    self.folder, name="tokenizer", pad_id=tokens.pad, truncate=False, special_tokens=False
                )
            },
        )
        if config.vae is None:
            self._given_photo(plan, source, patches, grid)
        else:
            self._encoded_photo(plan, source, patches, grid, limits)
        self._encode(plan, "prompt", "sequence", {"text": "prompt"})
        if base_prompt is not None:
            self._encode(plan, "base_prompt", "base_sequence", {"constant": base_prompt})
        plan.program += [Call("vision", "request"), Call("prepare", "request")]
        for guided in (True, False):
            ending = "" if guided else "_unguided"
            cache = self._cache(2 if guided else 1)
            row = [unconditional] if guided else []
            scale = [tensor("guidance.text", ("batch",))] if guided else []
            plan.graphs += [
                GraphSpec(
                    f"prefill{ending}",
                    graphs.Prefill(network, tokens, spec, guided),
                    [*prefill, *row, *cached_deltas],
                    cache,
                    integers=self._integers,
                ),
                GraphSpec(
                    f"step{ending}",
                    graphs.Step(network, tokens, spec, guided),
                    [*step, *scale, *cache, *deltas],
                    after,
                ),
            ]
            plan.program += [
                Call(f"prefill{ending}", "request", guided=guided),
                Call(f"step{ending}", "step", guided=guided),
            ]
        if config.vae is not None:
            plan.graphs.append(
                GraphSpec(
                    "image_decoder",
                    graphs.ImageDecoder(network),
                    [tensor("latents", self._latents)],
                    [tensor("edited", ("batch", "height", "width", 3), "uint8")],
                )
            )
            plan.program.append(Call("image_decoder", "final"))
            plan.result = "edited"
        return plan

    def _encode(self, plan: Plan, name: str, sequence: str, said: dict[str, Any]) -> None:
        """The calls that bring a text to the ids of the sequence's suffix."""
        shape = ("batch", self._text_length)
        plan.tensors[f"{name}.ids"] = ProvidedTensor("int64", shape, "text", tokenizer=TOKENIZER, **said)
        plan.tensors[f"{name}.mask"] = ProvidedTensor("int64", shape, "mask", of=f"{name}.ids")
        outputs = {f"sequence.{part}": f"{sequence}.{part}" for part in ("ids", "unconditional", "mask")}
        plan.program.append(
            Call(
                "sequence",
                "load" if "constant" in said else "request",
                {"input_ids": f"{name}.ids", "attention_mask": f"{name}.mask"},
                outputs if sequence != "sequence" else {},
            )
        )

    def _encoded_photo(
        self, plan: Plan, source: TensorSpec, patches: TensorSpec, grid: TensorSpec, limits: Limits
    ) -> None:
        """The photo as pixels: what the VAE and the vision transformer read of it."""
        side = plan.axes["height"]
        pixels = TensorSpec("image", "uint8", ("batch", "height", "width", 3))
        reader = Patches(self.config.vision, side.multiple, side.max)
        plan.graphs += [
            GraphSpec("image_encoder", graphs.ImageEncoder(self.transformer), [pixels], [source]),
            GraphSpec("image_patches", reader, [pixels], [patches, grid]),
        ]
        plan.tensors["image"] = ProvidedTensor("uint8", pixels.shape, "image")
        plan.program += [Call("image_encoder", "request"), Call("image_patches", "request")]
        area = limits.area or min(side.max, self.config.base_size) ** 2
        known = [(width, height) for height, width in buckets(self.config.base_size)]
        fit = limits.area is None and all(
            side.min <= length <= side.max and length % side.multiple == 0
            for size in known
            for length in size
        )
        plan.image = ImagePolicy(
            "image", side.multiple, side.min, side.max, area, tuple(dict.fromkeys(known)) if fit else ()
        )

    def _given_photo(self, plan: Plan, *inputs: TensorSpec) -> None:
        for tensor in inputs:
            dtype: Dtype = "int64" if tensor.dtype == "int64" else "float32"
            plan.tensors[tensor.name] = ProvidedTensor(dtype, tensor.shape, "input")

    def reference_edit(self, edit: ReferenceEdit) -> npt.NDArray[np.uint8]:
        from hywu_export.families.hunyuan.reference import edit as run

        return run(self, edit)


def _make(config: dict[str, Any]) -> nn.Module:
    if config.get("model_type") not in (None, "hunyuan_image_3_moe"):
        raise UnsupportedError(
            f"config.json is for a {config['model_type']}",
            "HunyuanImage-3.0-Instruct is a hunyuan_image_3_moe",
            "Export that checkpoint",
        )
    sizes = HunyuanConfig.from_dict(config)
    module: nn.Module = fake_module(lambda: HunyuanImage3(sizes))
    return module
