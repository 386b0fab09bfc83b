"""What families share whose edits start midway, from the photo's latents with noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

from torch import Tensor, nn

from hywu_runtime.manifest import ProvidedTensor

START = ProvidedTensor("float32", (2,), "schedule", column="start")
"""A row of what `schedules.with_start` adds to a table."""


class Prepare(nn.Module):
    """The photo's latents and standard normal noise ``[B, C, h, w]`` to the first latents, by a row of
    ``start [2]``."""

    def forward(self, latents: Tensor, noise: Tensor, start: Tensor) -> tuple[Tensor]:
        return (start[0] * latents + start[1] * noise,)


@contextmanager
def drawn(pipeline: ModuleType, noise: Tensor) -> Iterator[None]:
    """Within, pipelines of a module of diffusers take ``noise`` where they noise the photo's latents.

    They take no such noise as an argument: ``latents`` are those with the noise in them. Their schedulers
    draw as usual.
    """
    with patch.object(pipeline, "randn_tensor", lambda *_, **__: noise):
        yield
