"""Gemma 2 as a text encoder: what a decoder-only language model makes of a prompt, padding left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model

from hywu_export.tracing import fake_module
from hywu_runtime.errors import UnsupportedError


def last_states(model: Gemma2Model, ids: Tensor, mask: Tensor) -> Tensor:
    """The last hidden states ``[B, L, C]`` of token ids and their mask ``[B, L]``, 1 for tokens.

    transformers makes the attention masks in ways that follow Python's values; here they are made of the
    same conditions by operations of the graph.
    """
    length, window = ids.shape[1], model.config.sliding_window
    here, there = torch.arange(length)[:, None], torch.arange(length)[None, :]
    masks = {
        "full_attention": there <= here,
        "sliding_attention": (there <= here) & (there > here - (window or length)),
    }
    seen = (mask != 0)[:, None, None, :]
    lowest = torch.finfo(torch.float32).min
    biases = {
        name: torch.zeros(()).where(pattern[None, None] & seen, lowest) for name, pattern in masks.items()
    }
    states: Tensor = model(input_ids=ids, attention_mask=biases, use_cache=False).last_hidden_state
    return states


def make_gemma(config: dict[str, Any]) -> nn.Module:
    """A Gemma 2 without its head and without data.

    Raises:
        UnsupportedError: it is another language model.
    """
    if config.get("model_type") not in (None, "gemma2"):
        raise UnsupportedError(
            f"The text encoder is a {config['model_type']}",
            "This pipeline's is a Gemma2Model (gemma2)",
            "Export a pipeline with such a text encoder",
        )
    module: nn.Module = fake_module(lambda: Gemma2Model(Gemma2Config.from_dict(config)))
    return module
