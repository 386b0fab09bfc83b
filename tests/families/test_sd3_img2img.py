"""Bundles of Stable Diffusion 3 image-to-image pipelines against diffusers and PEFT: the same pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_tokenizers import t5
from parity import CHANGED, SAME, Case, Once, Parity, Request, largest, photos
from tiny_pairs import WORDS

from hywu_export import ExportOptions, export
from hywu_export.deltas import DeltaSpec
from hywu_export.families import open_base
from hywu_export.families.base import Limits, Plan, ReferenceEdit
from hywu_export.families.sd3_img2img import CLIPS, T5, Clip, same_draws
from hywu_runtime import Editor
from hywu_runtime.errors import CheckpointError, HywuError, InputError, UnsupportedError

TEXT_LENGTH = 12


def make_base(folder: Path, long: bool = True) -> None:
    """A random ``StableDiffusion3Img2ImgPipeline`` as SD 3.5 is: two blocks, one with a second attention,
    normalised queries and keys; factor-2 VAE; T5 if ``long``."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Img2ImgPipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
    )

    from demo.recipe.tokenizer import train_tokenizer

    train_tokenizer(WORDS, folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.model_max_length = 16
    tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    torch.manual_seed(0)
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                projection_dim=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                hidden_act=act,
            )
        )
        for width, act in ((16, "quick_gelu"), (24, "gelu"))
    ]
    words = t5()
    text_encoder_3 = T5EncoderModel(
        T5Config(
            vocab_size=len(words), d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=3,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    # Fresh weights are small: text and modulation would hardly be seen in the picture.
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 2:
            gain = 2.0 if "embed" in name else 1.0
            torch.nn.init.normal_(parameter, std=gain * parameter.shape[1] ** -0.5)
    StableDiffusion3Img2ImgPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3 if long else None,
        tokenizer_3=words if long else None,
        transformer=transformer,
    ).save_pretrained(folder)


def call(pipe: Any, request: Request) -> list[np.ndarray]:
    width, height = request.size
    with same_draws(torch.from_numpy(request.latents)):
        pictures: list[np.ndarray] = pipe(
            image=request.pictures,
            prompt=list(request.prompts),
            negative_prompt=list(request.negative) if request.negative else None,
            guidance_scale=request.guidance["text"],
            num_inference_steps=request.steps,
            strength=request.options.get("strength", 0.6),
            max_sequence_length=TEXT_LENGTH,
            height=height,
            width=width,
        ).images
    return pictures


OPTIONS = ExportOptions(
    max_rank=4, max_steps=8, max_batch=2, max_size=96, text_length=TEXT_LENGTH,
    samplers=("FlowMatchEulerDiscreteScheduler", "flow_heun"),
)  # fmt: skip
CASE = Case(
    "sd3", "StableDiffusion3Img2ImgPipeline", make_base, call, OPTIONS, {"tiled": {"vae_tile": 32}},
    denoiser="transformer",
)  # fmt: skip


@pytest.fixture(scope="module")
def parity(once: Once) -> Iterator[Parity]:
    with Parity(CASE, once) as parity:
        yield parity


def test_without_deltas(parity: Parity) -> None:
    got = parity.check(parity.request(["a red cat"], negative=["ugly"], steps=4))
    other = parity.check(parity.request(["snow"], negative=["ugly"], steps=4))
    unguided = parity.check(parity.request(["a red cat"], steps=4, guidance={"text": 1.0}))
    assert min(largest(got, other), largest(got, unguided)) > CHANGED


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.3])
def test_strength(parity: Parity, strength: float) -> None:
    request = parity.request(["a red cat"], steps=5, strength=strength)
    parity.check(request)
    assert len(parity.editor.timings.steps) == {1.0: 5, 0.5: 3, 0.3: 2}[strength]


def test_two_evaluations_of_a_step(parity: Parity) -> None:
    parity.check(parity.request(["a red cat"], steps=4, strength=0.5, sampler="flow_heun"))
    assert len(parity.editor.timings.steps) == 3


def test_with_deltas(parity: Parity) -> None:
    """The default targets are those of diffusers' training script; the last block has no way out for text."""
    names = {target.module for target in parity.manifest.deltas.targets}
    assert "transformer_blocks.0.attn.to_add_out" in names
    assert not any("attn2" in name for name in names)
    assert len(names) == 15
    parity.check(parity.request(["a red cat"], negative=["ugly"], steps=3), parity.deltas(), 0.8)


def test_sizes_and_batches(parity: Parity) -> None:
    """Positions are cropped from the middle of the model's."""
    for size in ((32, 48), (96, 16), (20, 96)):
        parity.check(parity.request(["snow"], size=size, steps=2))
    request = parity.request(["a red cat", "snow"], negative=["ugly", ""], size=(48, 32), steps=3)
    parity.check_per_sample(request)


def test_lora_file(parity: Parity, tmp_path: Path) -> None:
    parity.check_lora_file(parity.request(["a red cat"], steps=2), tmp_path / "lora")


def test_linked(parity: Parity) -> None:
    parity.check_linked(parity.request(["a red cat"], steps=2))


def test_verify(parity: Parity) -> None:
    parity.check_verify()


def test_a_tiled_vae(parity: Parity) -> None:
    """Its graphs are torch's, tile by tile; a picture of one tile is as before, a larger one nearly."""
    with Editor.load(parity.bundles / "tiled", "ort-cpu") as editor:
        for size, same in (((8, 8), True), ((96, 64), False)):
            request = parity.request(["a red cat"], size=size, steps=2)
            difference = largest(parity.edit(request, editor=editor), parity.edit(request))
            assert (difference <= SAME) == same
    assert {graph.tile for graph in tiled_plan(parity).graphs} == {None, 32}


def tiled_plan(parity: Parity) -> Plan:
    return open_base(parity.base).plan(DeltaSpec(()), Limits(max_size=96, tile=32), None, 6)


def test_graphs(parity: Parity) -> None:
    parity.check_lint()


@pytest.mark.slow
def test_tensorrt_rtx(parity: Parity) -> None:
    pytest.importorskip("tensorrt_rtx")
    parity.check_tensorrt_rtx()


def test_without_t5(once: Once) -> None:
    """Zeros stand for its states, as in the pipeline."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    base = once("sd3_short_base", lambda folder: make_base(folder, long=False))
    family = open_base(base)
    plan = family.plan(DeltaSpec(()), Limits(text_length=TEXT_LENGTH), None, 6)
    assert set(plan.tokenizers) == {"clip", "clip_2"}
    assert T5 not in family.components
    (graph,) = (graph for graph in plan.graphs if graph.name == "text")
    pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(base, text_encoder_3=None, tokenizer_3=None)
    states = []
    for name in CLIPS:
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        ids = tokenizer("a red cat", padding="max_length", max_length=16, return_tensors="pt").input_ids
        states += Clip(name, getattr(pipe, name))(ids)
    embeds, pooled = graph.module(*states)
    prompt = pipe.encode_prompt(
        "a red cat", None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
    )
    torch.testing.assert_close(embeds, prompt[0])
    torch.testing.assert_close(pooled, prompt[2])
    photo, latents = photos(1)[0], np.zeros((1, 4, 16, 16), np.float32)
    edit = ReferenceEdit(photo, "snow", "flow_euler", 2, latents, 0, {"text": 7.0}, 0.6, TEXT_LENGTH)
    assert family.reference_edit(edit).shape == photo.shape


def change(file: Path, **settings: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | settings))


@pytest.mark.parametrize(
    ("file", "settings", "error", "word"),
    [
        ("transformer", {"joint_attention_dim": 40}, CheckpointError, "context_embedder"),
        ("vae", {"shift_factor": None}, CheckpointError, "shift_factor"),
        ("text_encoder_2", {"model_type": "bert"}, UnsupportedError, "clip_text_model"),
        ("text_encoder_2", {"projection_dim": 8}, CheckpointError, "text_projection"),
    ],
)
def test_bases_that_do_not_fit(
    parity: Parity, tmp_path: Path, file: str, settings: dict[str, Any], error: type[HywuError], word: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(parity.base, base)
    change(base / file / "config.json", **settings)
    with pytest.raises(error, match=word):
        open_base(base)


def test_options_that_do_not_fit(parity: Parity, tmp_path: Path) -> None:
    for options, error, word in (
        (ExportOptions(samplers=("euler",)), UnsupportedError, "straight paths"),
        (ExportOptions(max_size=100), InputError, "Expected 8 to 96"),
        (ExportOptions(text_length=513), InputError, "at most 512"),
    ):
        with pytest.raises(error, match=word):
            export(tmp_path / "bundle", parity.base, options=options)
    change_base = tmp_path / "base"
    shutil.copytree(parity.base, change_base)
    settings = change_base / "scheduler" / "scheduler_config.json"
    change(settings, use_dynamic_shifting=True)
    with pytest.raises(UnsupportedError, match="use_dynamic_shifting"):
        export(tmp_path / "bundle", change_base)
    change(settings, use_dynamic_shifting=False, use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(InputError, match="dpmpp_2m cannot start midway"):
        export(tmp_path / "bundle", change_base, options=ExportOptions(samplers=("dpmpp_2m",)))
    assert not (tmp_path / "bundle").exists()
