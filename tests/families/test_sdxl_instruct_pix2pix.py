"""Bundles of SDXL InstructPix2Pix pipelines against diffusers and PEFT: the same pictures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInstructPix2PixPipeline
from parity import CHANGED, SAME, Case, Once, Parity, Request, largest

from hywu_export import ExportOptions
from hywu_export.deltas import DeltaSpec
from hywu_export.engines.tensorrt import parser_errors
from hywu_export.families import open_base
from hywu_export.families.base import Limits
from hywu_export.tracing.loading import with_weights
from hywu_runtime import Editor
from hywu_runtime.errors import CheckpointError, UnsupportedError


def make_base(folder: Path, seed: int = 0) -> None:
    """A random pipeline: text encoders of unequal width, tokenizers that pad differently, a factor-2 VAE."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        UNet2DConditionModel,
    )
    from tiny_pairs import WORDS
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from demo.recipe.tokenizer import train_tokenizer

    train_tokenizer(WORDS, folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    second = CLIPTokenizer.from_pretrained(folder / "words", pad_token="!")
    shutil.rmtree(folder / "words")

    def text(width: int, **settings: Any) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )

    tokenizer.model_max_length = second.model_max_length = 16
    torch.manual_seed(seed)
    StableDiffusionXLInstructPix2PixPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            scaling_factor=0.13025,
            force_upcast=True,
        ),
        text_encoder=CLIPTextModel(text(16)),
        text_encoder_2=CLIPTextModelWithProjection(text(24, projection_dim=20, hidden_act="gelu")),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=UNet2DConditionModel(
            sample_size=16,
            in_channels=8,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=40,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=1,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
            norm_num_groups=8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading"
        ),
        add_watermarker=False,
    ).save_pretrained(folder)


def call(pipe: Any, request: Request) -> Sequence[np.ndarray]:
    width, height = request.size
    return pipe(
        prompt=list(request.prompts),
        image=request.pictures,
        height=height,
        width=width,
        negative_prompt=None if request.negative is None else list(request.negative),
        num_inference_steps=request.steps,
        guidance_scale=request.guidance["text"],
        image_guidance_scale=request.guidance["image"],
        latents=torch.from_numpy(request.latents),
        generator=request.generator,
    ).images


CASE = Case(
    "sdxl_pix2pix",
    "StableDiffusionXLInstructPix2PixPipeline",
    make_base,
    call,
    ExportOptions(
        targets=["to_q", "to_k", "to_v", "to_out.0", "text_encoder.q_proj", "text_encoder_2.fc1"],
        samplers=("euler", "euler_a"),
        max_rank=4,
        max_steps=4,
        max_batch=2,
        max_size=96,
    ),
    more={"tiled": {"vae_tile": 64}},  # of a picture of 96 pixels 2 by 2, sharing 16 pixels
    load={"add_watermarker": False},
    scale=1.0,
)


@pytest.fixture(scope="module")
def parity(once: Once) -> Iterator[Parity]:
    with Parity(CASE, once) as parity:
        yield parity


@pytest.mark.slow
def test_two_prompts_with_and_without_guidance(parity: Parity) -> None:
    prompts = ["make it sepia", "a cat with a hat, and more words than sixteen tokens can hold at once"]
    guided = parity.check(parity.request(prompts, negative=["ugly", "a"], size=(48, 32)))
    assert largest(guided[:1], guided[1:]) > CHANGED
    parity.check(parity.request(prompts, guidance={"text": 1.0}, sampler="euler_a"))
    parity.check(parity.request(prompts[:1], guidance={"text": 9.0, "image": 1.0}, steps=4, size=(16, 64)))


def test_no_negative_prompt_is_zeros_and_not_an_empty_one(parity: Parity) -> None:
    none = parity.request(["a cat"], guidance={"text": 12.0})
    parity.check(none)
    empty = parity.expected(parity.request(["a cat"], guidance={"text": 12.0}, negative=[""]))
    assert largest(parity.edit(none), empty) > 1


def test_the_size_is_told_to_the_unet(parity: Parity) -> None:
    """The photo is the same; only the numbers that the pipeline is told differ."""
    request = parity.request(["a cat"], size=(64, 32))
    pipe = parity.pipeline()
    ids = pipe._get_add_time_ids
    pipe._get_add_time_ids = lambda original, crop, target, **more: ids((8, 8), crop, target, **more)
    assert largest(parity.edit(request), parity.expected(request, pipe)) > 1
    parity.check(request)


def test_adapters(parity: Parity, tmp_path: Path) -> None:
    assert {name.partition(".")[0] for name in parity.deltas()} >= {"text_encoder", "text_encoder_2"}
    parity.check(parity.request(["make it sepia"], negative=["ugly"]), parity.deltas(), 0.7)
    parity.check_per_sample(parity.request(["make it sepia", "a cat"]))
    parity.check_lora_file(parity.request(["a cat"], guidance={"text": 1.0}), tmp_path)


def test_the_layer_that_sdxl_does_not_use(parity: Parity) -> None:
    """The first text encoder's last: LoRA files have it, so the bundle takes its deltas, unread."""
    taken = {tensor.name for tensor in parity.manifest.graphs["text_encoder"].inputs}
    for encoder, used in (("text_encoder", {"0"}), ("text_encoder_2", {"0", "1"})):
        layers = rf"{encoder}\.text_model\.encoder\.layers\.(\d)\..*lora_B"
        assert set(re.findall(layers, "\n".join(parity.deltas()))) == {"0", "1"}
        assert set(re.findall(layers, "\n".join(taken))) == used


def test_linked_weights(parity: Parity) -> None:
    parity.check_linked(parity.request(["a cat"]))


@pytest.mark.slow
def test_verify(parity: Parity) -> None:
    parity.check_verify()


def test_lint(parity: Parity) -> None:
    parity.check_lint()


@pytest.mark.slow
@pytest.mark.rtx
def test_tensorrt_rtx(parity: Parity) -> None:
    pytest.importorskip("tensorrt_rtx")
    parity.check_tensorrt_rtx()
    for graph in ("image_encoder", "image_decoder"):
        assert parser_errors(parity.bundles / "tiled" / f"{graph}.onnx") == []


@pytest.mark.slow
def test_a_tiled_vae(parity: Parity) -> None:
    """Its graphs are torch's, tile by tile; the rest of the bundle is as before, and a small picture too."""
    parity.check_verify("tiled")
    parity.check_lint("tiled")
    with Editor.load(parity.bundles / "tiled", "ort-cpu") as editor:
        for size, same in (((16, 16), True), ((96, 64), False)):
            request = parity.request(["a cat"], size=size)
            difference = largest(parity.edit(request, editor=editor), parity.edit(request))
            assert (difference <= SAME) == same


@pytest.fixture
def changed(parity: Parity, tmp_path: Path) -> Callable[[str, dict[str, Any]], Path]:
    """``changed(file, settings)``: a copy of the pipeline's folder with other settings in one file."""

    def change(file: str, settings: dict[str, Any]) -> Path:
        shutil.copytree(parity.base, tmp_path / "base", dirs_exist_ok=True)
        path = tmp_path / "base" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return tmp_path / "base"

    return change


def test_cosxl_and_normalized_latents(changed: Callable[..., Path], parity: Parity) -> None:
    """Settings that few checkpoints have: the pipeline's own picture from its own last latents."""
    statistics = {"latents_mean": [0.5, -1.0, 0.25, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}
    changed("vae/config.json", statistics)
    base = changed("model_index.json", {"is_cosxl_edit": True})
    pipe = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(base, **CASE.load)
    assert pipe.is_cosxl_edit
    family = open_base(base)
    plan = family.plan(DeltaSpec(()), Limits(), None, 8)
    modules = {graph.name: graph.module for graph in plan.graphs}
    weights = {name: component.tensors for name, component in family.components.items()}
    request = parity.request(["a cat"], steps=1)
    (photo,) = request.photos
    pixels = pipe.image_processor.preprocess(photo[None] / np.float32(255))
    with torch.no_grad():
        latents = pipe(
            ["a cat"], image=pixels, height=32, width=32, num_inference_steps=1, output_type="latent",
            latents=torch.from_numpy(request.latents), guidance_scale=1.0,
        ).images  # fmt: skip
        expected = call(pipe, replace(request, guidance={"text": 1.0, "image": 1.5}))
        source = pipe.prepare_image_latents(pixels, 1, 1, torch.float32, "cpu", False)
        with with_weights(modules["image_encoder"], weights):
            (encoded,) = modules["image_encoder"](torch.from_numpy(photo[None]))
        with with_weights(modules["image_decoder"], weights):
            (decoded,) = modules["image_decoder"](latents)
    torch.testing.assert_close(encoded, source, rtol=0, atol=1e-5)
    assert largest(decoded.numpy(), [np.asarray(picture) for picture in expected]) <= SAME


def test_an_empty_negative_prompt_is_encoded_if_the_pipeline_says_so(changed: Callable[..., Path]) -> None:
    def makers(**settings: Any) -> list[str]:
        base = changed("model_index.json", settings)
        plan = open_base(base).plan(DeltaSpec(()), Limits(), None, 8)
        made = "negative_prompt.embeds"
        return [call.graph for call in plan.program if made in call.outputs.values()]

    assert makers() == ["drop_empty"]
    assert makers(force_zeros_for_empty_prompt=False) == ["text_encoder"]


@pytest.mark.parametrize(
    ("file", "settings", "error", "message"),
    [
        ("unet/config.json", {"addition_embed_type": None}, UnsupportedError, "'text_time'"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, UnsupportedError, "time_cond_proj_dim to 8"),
        ("text_encoder_2/config.json", {"model_type": "t5"}, UnsupportedError, "second text encoder is a t5"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 8}, CheckpointError, "16 and 8 tokens"),
    ],
)
def test_what_does_not_fit(
    changed: Callable[..., Path], file: str, settings: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_base(changed(file, settings))
