"""Bundles of FLUX.1 Kontext pipelines against diffusers and PEFT: the same pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import SAME, Case, Once, Parity, Request, largest, photos
from PIL import Image
from tiny_pairs import WORDS

from hywu_export import ExportOptions, export
from hywu_export.deltas import DeltaSpec
from hywu_export.families import open_base
from hywu_export.families.base import Limits
from hywu_export.families.flux_kontext import Rotary, Step, pack
from hywu_export.schedules import Shift
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError
from hywu_runtime.images import working_size
from hywu_runtime.text import PromptEncoder

TEXT_LENGTH = 24


def make_base(folder: Path, seed: int = 0, **transformer: Any) -> None:
    """A random ``FluxKontextPipeline``: one double-stream block, one single-stream; factor-2 VAE."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxTransformer2DModel,
    )
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    from demo.recipe.tokenizer import train_tokenizer

    train_tokenizer(WORDS, folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for text in WORDS for word in text.split()]
    pieces += [(chr(code), -6.0) for code in range(33, 127)]
    unigram = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=2))
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=unigram.get_vocab_size(),
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=3,
            feed_forward_proj="gated-gelu",
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    settings: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    model = FluxTransformer2DModel(**(settings | transformer))
    # Fresh weights are small: text and modulation would hardly be seen in the picture.
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = 2.0 if "embed" in name else 1.0
            torch.nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=T5TokenizerFast(tokenizer_object=unigram, extra_ids=0),
        transformer=model,
    ).save_pretrained(folder)


def call(pipe: Any, request: Request) -> list[np.ndarray]:
    width, height = request.size
    latents = torch.from_numpy(request.latents)
    count, channels, rows, columns = latents.shape
    pictures = pipe(
        image=request.pictures,
        prompt=list(request.prompts),
        negative_prompt=list(request.negative) if request.negative else None,
        true_cfg_scale=request.guidance["true_cfg"],
        guidance_scale=request.guidance.get("text", 0.0),
        num_inference_steps=request.steps,
        latents=pipe._pack_latents(latents, count, channels, rows, columns),
        height=height,
        width=width,
        max_area=width * height,
        max_sequence_length=TEXT_LENGTH,
        _auto_resize=False,
    ).images
    return [np.asarray(picture) for picture in pictures]


OPTIONS = ExportOptions(max_rank=4, max_steps=8, max_batch=2, max_size=128, text_length=TEXT_LENGTH)
CASE = Case("kontext", "FluxKontextPipeline", make_base, call, OPTIONS, denoiser="transformer")


@pytest.fixture(scope="module")
def parity(once: Once) -> Iterator[Parity]:
    with Parity(CASE, once) as parity:
        yield parity


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": {"text": 1.0}},
        {"guidance": {"true_cfg": 3.0}, "negative": ["ugly"]},
        {"guidance": {"true_cfg": 2.0}, "negative": [""], "steps": 5},
        {"size": (64, 20)},
        {"size": (4, 44), "guidance": {"true_cfg": 4.0}, "negative": ["a cat"]},
        {"size": (124, 128), "steps": 1},
    ],
    ids=repr,
)
def test_without_deltas(parity: Parity, options: dict[str, Any]) -> None:
    parity.check(parity.request(["make it sepia"], **options))


def test_every_input_is_seen(parity: Parity) -> None:
    """Or the comparisons would say little."""
    request = parity.request(["make it sepia"])
    (plain,) = parity.edit(request)
    for other in (
        parity.request(["blur the photo, a cat"]),
        parity.request(["make it sepia"], guidance={"text": 9.0}),
        parity.request(["make it sepia"], guidance={"true_cfg": 4.0}, negative=["a cat"]),
        parity.request(["make it sepia"], photos(1, seed=5)),
    ):
        assert largest([plain], parity.edit(other)) > SAME, other.guidance


@pytest.mark.parametrize("guidance", [{}, {"true_cfg": 3.0}])
def test_deltas_are_the_adapter_in_peft(parity: Parity, guidance: dict[str, float]) -> None:
    negative = ["ugly", "a cat"] if guidance else None
    request = parity.request(["make it sepia", "a cat"], size=(24, 32), guidance=guidance, negative=negative)
    parity.check(request, parity.deltas(), strength=0.75)
    parity.check_per_sample(request)


def test_a_lora_file(parity: Parity, tmp_path: Path) -> None:
    parity.check_lora_file(parity.request(["make it sepia"]), tmp_path)


def test_default_targets(parity: Parity) -> None:
    """Those of the training script, in both kinds of blocks; the fused outputs of single blocks are none."""
    assert parity.manifest.deltas is not None
    modules = {target.module for target in parity.manifest.deltas.targets}
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    attention = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    layers = {f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")}
    assert modules == (
        {f"{double}.attn.{name}" for name in attention}
        | {f"{double}.{name}" for name in layers}
        | {f"{single}.attn.{name}" for name in ("to_q", "to_k", "to_v")}
        | {f"{single}.proj_mlp"}
    )


def test_manifest(parity: Parity) -> None:
    manifest = parity.manifest
    assert manifest.schedules is not None
    assert manifest.schedules.default == "flow_euler"
    assert manifest.schedules.default_steps == 8  # 28, but for the table's end
    assert [(g.name, g.default, g.above) for g in manifest.guidance] == [
        ("text", 3.5, None),
        ("true_cfg", 1.0, 1.0),
    ]
    assert {name: entry.max_length for name, entry in manifest.tokenizers.items()} == {
        "short": 32,
        "long": TEXT_LENGTH,
    }
    assert "noise.step" not in manifest.tensors


def test_sizes_are_those_of_the_pipeline(parity: Parity) -> None:
    """Without --size, a photo is brought to the preferred resolution that the pipeline would choose."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    family = open_base(parity.base)
    policy = family.plan(DeltaSpec(()), Limits(max_size=2048), None, 3).image
    assert policy is not None
    for width, height in ((1600, 1200), (640, 480), (500, 501), (3000, 1000), (77, 300)):
        _, *expected = min((abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        assert working_size(width, height, policy) == tuple(expected)
    own = family.plan(DeltaSpec(()), Limits(max_size=2048, area=512**2), None, 3).image
    assert own is not None
    assert own.sizes == ()


def test_tokens(parity: Parity) -> None:
    """Both tokenizers give the pipeline's ids, cut and padded."""
    bundle = parity.editor.bundle
    for name, tokenizer in (("short", parity.plain.tokenizer), ("long", parity.plain.tokenizer_2)):
        entry = bundle.manifest.tokenizers[name]
        encoder = PromptEncoder(bundle.file(entry.file), entry)
        for prompt in ("make it sepia", "", "a CAT, ﬁne!", "make " * 60):
            ids, _ = encoder.encode([prompt])
            expected = tokenizer(prompt, padding="max_length", max_length=entry.max_length, truncation=True)
            assert ids.tolist() == [expected.input_ids]


def test_verify(parity: Parity) -> None:
    parity.check_verify()


def test_linked_weights(parity: Parity) -> None:
    parity.check_linked(parity.request(["make it sepia"], guidance={"true_cfg": 3.0}))


def test_lint(parity: Parity) -> None:
    parity.check_lint()


@pytest.mark.rtx
@pytest.mark.slow
def test_tensorrt_rtx(parity: Parity) -> None:
    parity.check_tensorrt_rtx()


@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
def test_a_model_that_is_not_distilled(tmp_path: Path, true_cfg: float) -> None:
    """``guidance_embeds`` off: the step's module in torch, against the pipeline."""
    from diffusers import FluxKontextPipeline

    make_base(tmp_path, 3, guidance_embeds=False, axes_dims_rope=(2, 6, 8))
    plan = open_base(tmp_path).plan(DeltaSpec(()), Limits(text_length=TEXT_LENGTH), None, 3)
    assert [scale.name for scale in plan.guidance] == ["true_cfg"]
    pipe = FluxKontextPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 14, generator=torch.Generator().manual_seed(0))
    (photo,) = photos(1, 16, 28)
    options = {"height": 16, "width": 28, "max_area": 16 * 28, "_auto_resize": False, "output_type": "latent"}
    with torch.no_grad():
        told, said = pipe.encode_prompt("a cat", None, max_sequence_length=TEXT_LENGTH)[:2]
        negative = pipe.encode_prompt("ugly", None, max_sequence_length=TEXT_LENGTH)[:2]
        pixels = pipe.image_processor.preprocess(photo[None] / np.float32(255))
        source = pipe._encode_vae_image(pixels, None)
        expected = pipe(
            Image.fromarray(photo), "a cat", negative_prompt="ugly", true_cfg_scale=true_cfg,
            latents=pack(noise), num_inference_steps=1, max_sequence_length=TEXT_LENGTH, **options,
        ).images  # fmt: skip
        own = pipe.transformer.pos_embed
        pipe.transformer.pos_embed = Rotary(own.theta, own.axes_dim)
        step = Step(pipe.transformer, Shift.from_config(pipe.scheduler.config), DeltaSpec(()), true_cfg > 1)
        row, gate = torch.tensor([1.0, 0.0, 1.0]), torch.ones(1)
        guidance = (*negative, torch.tensor([true_cfg])) if true_cfg > 1 else ()
        (made,) = step(noise, row, gate, source, told, said, *guidance)
    torch.testing.assert_close(pack(made), expected, rtol=0, atol=1e-4)
    assert (expected - pack(noise)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("transformer/config.json", {"pooled_projection_dim": 8}, "lacks|has shape"),
        ("transformer/config.json", {"patch_size": 2}, "has shape"),
        ("vae/config.json", {"shift_factor": None}, "shift_factor to None"),
        ("text_encoder_2/config.json", {"model_type": "umt5"}, "T5EncoderModel"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas=False"),
    ],
)
def test_what_does_not_fit_is_refused(
    parity: Parity, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(parity.base, tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        export(tmp_path / "bundle", tmp_path / "base", options=OPTIONS)
    assert not (tmp_path / "bundle").exists()


def test_options_out_of_range(parity: Parity, tmp_path: Path) -> None:
    for options, message in (
        (replace(OPTIONS, text_length=513), "at most 512"),
        (replace(OPTIONS, max_size=4), "largest size is 4"),
        (replace(OPTIONS, samplers=("flow_heun",)), "flow_euler"),
    ):
        with pytest.raises((InputError, UnsupportedError), match=message):
            export(tmp_path / "bundle", parity.base, options=options)
