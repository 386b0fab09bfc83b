"""Prompt encoding, against Hugging Face's own tokenizers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from toy_bundle import _bytes_to_unicode
from transformers import CLIPTokenizer

from hywu_runtime.errors import BundleError, InputError
from hywu_runtime.manifest import Tokenizer
from hywu_runtime.text import PromptEncoder

PROMPTS = [
    "",
    "make it look like an old photograph",
    "Make it SEPIA!!",
    "把照片变成老照片",
    "turn the sky 🌅 purple, 请",
    "café naïve  double  space",
    "line\nbreak\ttab",
    "👩‍👩‍👧‍👦 family",
    "don't we'll I'm",
    "1234567 89.5%",
    "ＦＵＬＬ width",
    "a" * 500,
    "日本語 " * 60,
    "nul\0inside",
    "e\u0301 é",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPTokenizer, Path]:
    """A CLIP tokenizer over bytes with a few merges."""
    letters = list(_bytes_to_unicode().values())
    merges = ["m a", "k e</w>", "ma ke</w>", "i t</w>", "l o", "lo o", "loo k</w>", "ç ħ"]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    directory = tmp_path_factory.mktemp("clip")
    (directory / "vocab.json").write_text(
        json.dumps({word: i for i, word in enumerate(dict.fromkeys(words))})
    )
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(directory), model_max_length=77)
    tokenizer.save_pretrained(directory / "saved")
    return tokenizer, directory / "saved" / "tokenizer.json"


@pytest.mark.parametrize("length", [77, 12])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_hugging_face(clip: tuple[CLIPTokenizer, Path], length: int, side: str) -> None:
    tokenizer, path = clip
    entry = Tokenizer("t.json", length, tokenizer.pad_token_id, side)  # type: ignore[arg-type]
    ids, mask = PromptEncoder(path, entry).encode(PROMPTS)
    tokenizer.padding_side = side
    expected = tokenizer(
        PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(mask, expected.attention_mask)
    assert ids.dtype == mask.dtype == np.int64
    one, _ = PromptEncoder(path, entry).encode(PROMPTS[3:4])
    np.testing.assert_array_equal(one[0], ids[3])


def test_cutting_is_warned_of(clip: tuple[CLIPTokenizer, Path], caplog: pytest.LogCaptureFixture) -> None:
    encoder = PromptEncoder(clip[1], Tokenizer("t.json", 12, 1))
    with caplog.at_level(logging.WARNING):
        encoder.encode(["short"])
        assert not caplog.records
        encoder.encode(["a long prompt " * 50])
    assert "12 tokens" in caplog.text


def test_a_template(clip: tuple[CLIPTokenizer, Path]) -> None:
    tokenizer, path = clip
    entry = Tokenizer("t.json", 32, tokenizer.pad_token_id, template="ask: {}!")
    ids, mask = PromptEncoder(path, entry).encode(["it", "{}"])
    tokenizer.padding_side = "right"
    expected = tokenizer(["ask: it!", "ask: {}!"], padding="max_length", max_length=32, return_tensors="np")
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(mask, expected.attention_mask)


def test_lower_case(clip: tuple[CLIPTokenizer, Path]) -> None:
    """The text is, the template is not; white space goes from the text's ends alone."""
    tokenizer, path = clip
    texts = [" Make IT\u3000ßepia\u2003\n", "İstanbul", "\t", "ΣΑΣ"]
    exact = Tokenizer("t.json", 32, tokenizer.pad_token_id, template="Ask: {} !")
    lower = Tokenizer("t.json", 32, tokenizer.pad_token_id, template="Ask: {} !", lowercase=True)
    plain = ["make it\u3000ßepia", "i\u0307stanbul", "", "σασ"]  # a capital sigma is the same everywhere
    np.testing.assert_array_equal(
        PromptEncoder(path, lower).encode(texts)[0], PromptEncoder(path, exact).encode(plain)[0]
    )


def test_refusing_instead_of_cutting(clip: tuple[CLIPTokenizer, Path]) -> None:
    encoder = PromptEncoder(clip[1], Tokenizer("t.json", 12, 1, truncate=False))
    assert encoder.encode(["short"])[0].shape == (1, 12)
    with pytest.raises(InputError, match="12"):
        encoder.encode(["a long prompt " * 50])


@pytest.mark.parametrize("text", [None, 5, b"bytes", "\ud83d", "a\udcffb", "x" * 1_000_001, ["a"]])
def test_what_is_no_text(clip: tuple[CLIPTokenizer, Path], text: object) -> None:
    with pytest.raises(InputError):
        PromptEncoder(clip[1], Tokenizer("t.json", 12, 1)).encode([text])  # type: ignore[list-item]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 5}'])
def test_damaged_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError):
        PromptEncoder(tmp_path / "tokenizer.json", Tokenizer("t.json", 12, 1))
