"""Bundles of FLUX.1 Kontext pipelines against diffusers and PEFT: the same pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS
from parity import SAME, Case, Once, Parity, Request, largest, photos

from hywu_export import ExportOptions

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
