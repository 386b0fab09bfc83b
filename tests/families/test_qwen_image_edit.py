"""Bundles of Qwen-Image editing pipelines against diffusers and PEFT: the same pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from parity import Case, Parity, Request
from qwen_models import make_base

from hywu_export import ExportOptions
from hywu_export.families.qwen_reference import edit_with, open_pipeline


def call(pipe: Any, request: Request) -> Sequence[np.ndarray]:
    samples = [photo if isinstance(photo, list) else [photo] for photo in request.photos]
    return edit_with(
        pipe,
        samples,
        request.prompts,
        request.negative or [""] * len(request.prompts),
        request.steps,
        request.guidance["text"],
        request.latents,
    )


class QwenParity(Parity):
    def pipeline(self) -> Any:
        return open_pipeline(self.base, self.case.pipeline)


CASE = Case(
    "qwen_image_edit",
    "QwenImageEditPipeline",
    make_base,
    call,
    ExportOptions(max_rank=4, max_steps=8, max_batch=2, size=64, max_size=256),
    denoiser="transformer",
)


@pytest.fixture(scope="module")
def parity(once: Any) -> Iterator[Parity]:
    with QwenParity(CASE, once) as parity:
        yield parity


def test_without_deltas(parity: Parity) -> None:
    parity.check(parity.request(["a cat"], size=(64, 64), negative=["ugly"]))
