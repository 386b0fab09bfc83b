"""Prompts through the bundle's tokenizer and the traced text encoder, against the pipeline's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hywu_export.bundle.weights import read_tensor
from hywu_export.deltas import DeltaSpec
from hywu_export.families import open_base
from hywu_export.families.base import Limits
from hywu_export.tracing import trace
from hywu_runtime import Bundle
from hywu_runtime.text import PromptEncoder

PROMPTS = [
    "",
    " ",
    "make it look like an old photograph",
    "Make it SEPIA, please!!",
    "把照片变成老照片",
    "把 photo 变成 sepia，谢谢 🙏",
    "👩‍👩‍👧‍👦🏳️‍🌈 café naïve",
    "  odd \t white\n\nspace\u00a0here\u3000too ",
    "it's 1234 <|endoftext|> don't",
    "<|startoftext|>a cat<|endoftext|>",
    "a cat " * 200,
    "照片" * 400,
    "x" * 3000,
    "e\u0301 é ﬁ Å",
]


@pytest.fixture(scope="module")
def tokenizers(bundle: Path, pair: Any) -> tuple[PromptEncoder, Any]:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    opened = Bundle.open(bundle)
    ((_, entry),) = opened.manifest.tokenizers.items()
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(pair.base)
    return PromptEncoder(opened.file(entry.file), entry), pipe.tokenizer


def assert_same_tokens(tokenizers: tuple[PromptEncoder, Any], prompt: str) -> None:
    encoder, tokenizer = tokenizers
    ids, mask = encoder.encode([prompt])
    expected = tokenizer(
        [prompt], padding="max_length", max_length=tokenizer.model_max_length, truncation=True
    )
    assert ids.tolist() == expected.input_ids
    assert mask.tolist() == expected.attention_mask


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_tokens(tokenizers: tuple[PromptEncoder, Any], prompt: str) -> None:
    assert_same_tokens(tokenizers, prompt)


@given(prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_tokens_of_any_text(tokenizers: tuple[PromptEncoder, Any], prompt: str) -> None:
    assert_same_tokens(tokenizers, prompt)


@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states(pair: Any, tmp_path: Path, masked: bool) -> None:
    """The pipeline hands over the attention mask only where the text encoder's configuration says so."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    shutil.copytree(pair.base, tmp_path / "base")
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(pair.base)
    pipe.text_encoder.config.use_attention_mask = masked
    pipe.text_encoder.save_pretrained(tmp_path / "base" / "text_encoder")

    family = open_base(tmp_path / "base")
    plan = family.plan(DeltaSpec(()), Limits(), None, 8)
    assert {tensor.of for tensor in plan.tensors.values() if tensor.source == "mask"} == (
        {"prompt.ids", "negative_prompt.ids"} if masked else set()
    )
    graph = next(graph for graph in plan.graphs if graph.name == "text_encoder")
    traced = trace(graph, plan.axes)
    weights = family.components["text_encoder"].tensors
    for initializer, parameter in traced.initializers.items():
        location = weights[parameter.removeprefix("text_encoder.")]
        data = b"".join(read_tensor(parameter, location, "F32"))
        array = np.frombuffer(data, np.float32).reshape(location.shape)
        traced.model.graph.initializers[initializer].const_value = ir.tensor(array, name=initializer)
    session = ort.InferenceSession(
        ir.to_proto(traced.model).SerializeToString(), providers=["CPUExecutionProvider"]
    )

    prompts = ["make it sepia", "a cat", ""]
    tokens = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="np")
    inputs = {"input_ids": tokens.input_ids} | ({"attention_mask": tokens.attention_mask} if masked else {})
    (got,) = session.run(None, inputs)
    with torch.no_grad():
        embeds = pipe._encode_prompt(prompts, "cpu", 1, True, ["ugly"] * 3)
    np.testing.assert_allclose(got, embeds[:3].numpy(), rtol=0, atol=1e-5)
    if masked:  # or the test could not tell
        (unmasked,) = session.run(None, inputs | {"attention_mask": np.ones_like(tokens.attention_mask)})
        assert np.abs(unmasked - got).max() > 0.01
