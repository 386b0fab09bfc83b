"""Text encoders that several families have: T5's encoder, and what CLIP makes of a whole text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from hywu_export.tracing import fake_module
from hywu_runtime.errors import UnsupportedError


class HiddenStates(nn.Module):
    """Token ids ``[B, L]`` to a T5 encoder's last hidden states ``[B, L, C]``; padding is read like words.

    ``name`` is the component's, under which its parameters are found.
    """

    def __init__(self, name: str, encoder: T5EncoderModel):
        super().__init__()
        self.name = name
        self.add_module(name, encoder)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.get_submodule(self.name)(input_ids)[0],)


class PooledText(nn.Module):
    """Token ids ``[B, L]`` to CLIP's state at the end of the text ``[B, C]``, not projected."""

    def __init__(self, name: str, encoder: CLIPTextModel):
        super().__init__()
        self.name = name
        self.add_module(name, encoder)

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        encoder: CLIPTextModel = self.get_submodule(self.name)
        hidden = encoder(input_ids).last_hidden_state
        # The end's id is the largest one; old configurations say 2, which it is not.
        end = encoder.config.eos_token_id
        ends = input_ids if end == 2 else input_ids == end
        first = ends.to(torch.int32).argmax(dim=1, keepdim=True)
        # A product with a row of one 1 takes its place; indexing would be GatherND, which graphs do without.
        chosen = torch.arange(input_ids.shape[1]) == first
        return ((chosen.to(hidden.dtype)[:, None] @ hidden)[:, 0],)


def make_t5(config: dict[str, Any]) -> nn.Module:
    """A T5 encoder without data.

    Raises:
        UnsupportedError: it is another text encoder.
    """
    _check_kind(config, "t5", "T5EncoderModel")
    module: nn.Module = fake_module(lambda: T5EncoderModel(T5Config.from_dict(config)))
    for part in module.modules():
        if getattr(part, "has_relative_attention_bias", False):
            _narrow_buckets(part)
    return module


def make_clip(config: dict[str, Any]) -> nn.Module:
    """A CLIP text encoder without data.

    Raises:
        UnsupportedError: it is another text encoder.
    """
    _check_kind(config, "clip_text_model", "CLIPTextModel")
    module: nn.Module = fake_module(lambda: CLIPTextModel(CLIPTextConfig.from_dict(config)))
    return module


def _check_kind(config: dict[str, Any], kind: str, class_name: str) -> None:
    if config.get("model_type") not in (None, kind):
        raise UnsupportedError(
            f"The text encoder is a {config['model_type']}",
            f"This pipeline's is a {class_name} ({kind})",
            "Export a pipeline with such a text encoder",
        )


def _narrow_buckets(attention: Any) -> None:
    """Makes the buckets of relative positions int32.

    They are a constant ``[L, L]`` of the graph; int64 arithmetic is slow on devices, and twice the bytes.
    """
    wide = attention._relative_position_bucket

    def narrow(*args: Any, **kwargs: Any) -> Tensor:
        buckets: Tensor = wide(*args, **kwargs)
        return buckets.to(torch.int32)

    attention._relative_position_bucket = narrow
