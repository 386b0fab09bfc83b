"""Bundles of SANA-Sprint image-to-image pipelines against diffusers and PEFT: the same pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_tokenizers import gemma
from parity import CHANGED, Case, Once, Parity, Request, largest

from hywu_export import ExportOptions, export
from hywu_export.families import open_base
from hywu_export.families.sana_sprint import same_draws
from hywu_runtime.errors import CheckpointError, HywuError, InputError, UnsupportedError


def make_base(folder: Path) -> None:
    """A random ``SanaSprintImg2ImgPipeline``: two blocks; a language model of two layers, one of which looks
    back a few tokens; an autoencoder of factor 4 with attention."""
    from diffusers import AutoencoderDC, SanaSprintImg2ImgPipeline, SanaTransformer2DModel, SCMScheduler
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = gemma()
    torch.manual_seed(0)
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=64,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    channels = (8, 16, 32)
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        decoder_act_fns="silu",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    transformer = SanaTransformer2DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        mlp_ratio=2.0,
        sample_size=8,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
        timestep_scale=1000.0,
    )
    # Fresh weights are small: text and guidance would hardly be seen in the picture.
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    SanaSprintImg2ImgPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    ).save_pretrained(folder)


def call(pipe: Any, request: Request) -> list[np.ndarray]:
    width, height = request.size
    with same_draws(torch.from_numpy(request.latents)):
        pictures: list[np.ndarray] = pipe(
            image=request.pictures,
            prompt=list(request.prompts),
            guidance_scale=request.guidance["text"],
            num_inference_steps=request.steps,
            intermediate_timesteps=1.3 if request.steps == 2 else None,
            strength=request.options.get("strength", 0.6),
            height=height,
            width=width,
            generator=request.generator,
            use_resolution_binning=False,
        ).images
    return pictures


OPTIONS = ExportOptions(max_rank=4, max_steps=8, max_batch=2, max_size=96)
CASE = Case("sana", "SanaSprintImg2ImgPipeline", make_base, call, OPTIONS, denoiser="transformer")


@pytest.fixture(scope="module")
def parity(once: Once) -> Iterator[Parity]:
    with Parity(CASE, once) as parity:
        yield parity


def test_without_deltas(parity: Parity) -> None:
    got = parity.check(parity.request(["a red cat"], strength=0.5))
    assert len(parity.editor.timings.steps) == 1  # from 1.3 on
    other = parity.check(parity.request(["snow"], strength=0.5))
    distilled = parity.check(parity.request(["a red cat"], strength=0.5, guidance={"text": 9.0}))
    assert min(largest(got, other), largest(got, distilled)) > CHANGED


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.6), (1, 1.0), (5, 0.5), (4, 0.25), (8, 1.0)])
def test_strength(parity: Parity, steps: int, strength: float) -> None:
    parity.check(parity.request(["a red cat"], steps=steps, strength=strength))


def test_prompts_are_read_in_lower_case(parity: Parity) -> None:
    request = parity.request(["  A Red CAT\n"], strength=0.5)
    lower = parity.request(["a red cat"], strength=0.5)
    for one, other in zip(parity.check(request), parity.edit(lower)):
        np.testing.assert_array_equal(one, other)
    long = " ".join(["red cat"] * 200)  # is cut
    parity.check(parity.request([long], strength=0.5))


def test_with_deltas(parity: Parity) -> None:
    names = {target.module for target in parity.manifest.deltas.targets}
    assert len(names) == 12  # two blocks, self-attention and cross-attention
    parity.check(parity.request(["a red cat"], steps=3), parity.deltas(), 0.8)


def test_sizes_and_batches(parity: Parity) -> None:
    for size in ((32, 64), (96, 32)):
        parity.check(parity.request(["snow"], size=size, steps=3))
    parity.check_per_sample(parity.request(["a red cat", "snow in the night"], size=(64, 32), steps=3))


def test_lora_file(parity: Parity, tmp_path: Path) -> None:
    parity.check_lora_file(parity.request(["a red cat"]), tmp_path / "lora")


def test_linked(parity: Parity) -> None:
    parity.check_linked(parity.request(["a red cat"]))


def test_verify(parity: Parity) -> None:
    parity.check_verify()


def test_graphs(parity: Parity) -> None:
    parity.check_lint()


@pytest.mark.slow
def test_tensorrt_rtx(parity: Parity) -> None:
    pytest.importorskip("tensorrt_rtx")
    parity.check_tensorrt_rtx()


def test_defaults_are_the_pipelines(parity: Parity) -> None:
    section = parity.manifest.schedules
    assert section is not None
    assert section.strength is not None
    assert (section.default, section.default_steps, section.strength.default) == ("scm", 2, 0.6)
    (scale,) = parity.manifest.guidance
    assert (scale.name, scale.default, scale.decides) == ("text", 4.5, False)


def change(file: Path, **settings: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | settings))


@pytest.mark.parametrize(
    ("file", "settings", "error", "word"),
    [
        ("transformer", {"guidance_embeds": False}, UnsupportedError, "guidance_embeds"),
        ("transformer", {"interpolation_scale": 1}, UnsupportedError, "interpolation_scale"),
        ("transformer", {"caption_channels": 24}, CheckpointError, "caption"),
        ("text_encoder", {"model_type": "gemma"}, UnsupportedError, "gemma2"),
        ("vae", {"scaling_factor": None}, CheckpointError, "scaling_factor"),
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
        (ExportOptions(samplers=("flow_euler",)), UnsupportedError, "angles"),
        (ExportOptions(max_size=32), InputError, "Expected 64 or more"),
    ):
        with pytest.raises(error, match=word):
            export(tmp_path / "bundle", parity.base, options=options)
    base = tmp_path / "base"
    shutil.copytree(parity.base, base)
    (base / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer"):
        export(tmp_path / "bundle", base)
