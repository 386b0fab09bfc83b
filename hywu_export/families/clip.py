"""CLIP text encoders with a projection, as pipelines with several text encoders use them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def penultimate(model: Any, ids: Tensor) -> Tensor:
    """Hidden states ``[B, L, C]`` of a text encoder before its last layer, for token ids ``[B, L]``."""
    states: Tensor = model(ids, output_hidden_states=True).hidden_states[-2]
    return states


def penultimate_and_pooled(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As `penultimate`, and ``text_embeds [B, P]`` of a ``CLIPTextModelWithProjection``.

    Its own way to the pooled output is a GatherND, which TensorRT has in few forms: here the row of the end
    token is picked by a product with ones and zeros, which is the same.
    """
    output = model.text_model(ids, output_hidden_states=True)
    states = output.last_hidden_state
    end = model.config.eos_token_id
    # transformers: configurations from before the correction of eos_token_id say 2, and mean the largest id.
    ends = ids.to(torch.int32) if end == 2 else (ids == end).to(torch.int32)
    here = torch.arange(ids.shape[1]) == ends.argmax(dim=1, keepdim=True)
    pooled = (states * here[:, :, None].to(states.dtype)).sum(1)
    return output.hidden_states[-2], model.text_projection(pooled)
