"""Bundles of Qwen-Image editing pipelines against diffusers and PEFT: the same pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import CHANGED, SAME, Case, Parity, Request, largest, photos
from qwen_models import make_base

from hywu_export import ExportOptions
from hywu_export.families import open_base
from hywu_export.families.base import Limits
from hywu_export.families.qwen_reference import AREA, edit_with, open_pipeline
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError


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
    """With the pipeline as `qwen_reference` opens it."""

    def pipeline(self) -> Any:
        return open_pipeline(self.base, self.case.pipeline)


CASE = Case(
    "qwen_image_edit",
    "QwenImageEditPipeline",
    make_base,
    call,
    ExportOptions(max_rank=4, max_steps=8, max_batch=2, size=64, max_size=256, text_length=64),
    denoiser="transformer",
)


@pytest.fixture(scope="module")
def parity(once: Any) -> Iterator[Parity]:
    with QwenParity(CASE, once) as parity:
        yield parity


def test_a_guided_batch(parity: Parity) -> None:
    """Prompts of different lengths, negative prompts, a picture that fills no whole windows."""
    request = parity.request(["a cat", "make it sepia, please"], size=(96, 64), negative=["ugly", ""])
    got = parity.check(request)
    assert largest(got[:1], got[1:]) > CHANGED
    other = parity.edit(replace(request, negative=["", "ugly"]))
    assert largest(got, other) > SAME


def test_without_guidance(parity: Parity) -> None:
    parity.check(parity.request(["a cat"], size=(64, 128), steps=3, guidance={"text": 1.0}))


def test_prompts_and_pictures_matter(parity: Parity) -> None:
    request = parity.request(["a cat"], size=(64, 64))
    got = parity.edit(request)
    assert largest(got, parity.edit(replace(request, prompts=["make it sepia"]))) > CHANGED
    assert largest(got, parity.edit(replace(request, photos=photos(1, 64, 64, 3)))) > CHANGED


def test_default_targets_with_deltas(parity: Parity) -> None:
    targets = [target.module for target in parity.manifest.deltas.targets]
    assert targets == [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    parity.check(parity.request(["a cat"], size=(64, 64)), parity.deltas(scale=0.6), 0.75)


def test_deltas_per_sample(parity: Parity) -> None:
    parity.check_per_sample(parity.request(["a cat", "ugly"], size=(64, 64)))


def test_a_lora_file(parity: Parity, tmp_path: Path) -> None:
    parity.check_lora_file(parity.request(["a cat"], size=(64, 64)), tmp_path)


@pytest.mark.slow
def test_verify(parity: Parity) -> None:
    parity.check_verify()


def test_linked_weights(parity: Parity) -> None:
    parity.check_linked(parity.request(["a cat"], size=(64, 64)))


def test_lint(parity: Parity) -> None:
    parity.check_lint()


@pytest.mark.rtx
@pytest.mark.slow
def test_tensorrt_rtx(parity: Parity) -> None:
    pytest.importorskip("tensorrt_rtx")
    parity.check_tensorrt_rtx()


def test_the_size_of_a_photo_is_the_pipelines(parity: Parity) -> None:
    """Small photos are enlarged and large ones are not, to the area that the pipeline has in its code."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    from hywu_runtime.images import resized_sizes, working_size

    policy = replace(parity.manifest.image, default_area=AREA, max=4096)
    random = np.random.default_rng(0)
    for width, height in random.integers(40, 6000, (300, 2)).tolist():
        if max(width, height) <= 15 * min(width, height):
            expected = calculate_dimensions(AREA, width / height)[:2]
            assert working_size(width, height, policy) == expected
    # And what the text encoder sees is of the size that its processor chooses.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    (step,) = parity.manifest.tensors["seen"].resize
    for most in (step.max_area, 1003520, 200704):
        for width, height in (random.integers(1, 64, (100, 2)) * 32).tolist():
            (got,) = resized_sizes(width, height, [replace(step, max_area=most)])
            assert got[::-1] == smart_resize(height, width, 28, step.min_area, most)


def test_the_text_encoder_sees_the_pipelines_pixels(parity: Parity) -> None:
    """Bit for bit: patches of the bundle's picture are those that the processor makes."""
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
    from PIL import Image

    from hywu_export.families.qwen_image_edit import QwenImageEditPlus
    from hywu_runtime.images import fit, resize, resized_sizes

    process = parity.plain.processor.image_processor
    photo = np.random.default_rng(0).integers(0, 256, (389, 517, 3), np.uint8)

    def same(start: np.ndarray, steps: Any, expected: Any) -> None:
        seen = resize(start, steps, resized_sizes(start.shape[1], start.shape[0], steps))
        assert seen.shape != start.shape
        ours, theirs = (
            process([Image.fromarray(x) if isinstance(x, np.ndarray) else x]) for x in (seen, expected)
        )
        np.testing.assert_array_equal(ours["image_grid_thw"], theirs["image_grid_thw"])
        np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"])

    working = fit(photo, parity.manifest.image, (256, 192))
    same(working, parity.manifest.tensors["seen"].resize, working)
    width, height = calculate_dimensions(384 * 384, 517 / 389)
    small = VaeImageProcessor().resize(Image.fromarray(photo), height, width)
    same(photo, QwenImageEditPlus(parity.base)._seen_sizes(), small)


def test_a_long_prompt_is_refused(parity: Parity) -> None:
    request = parity.request(["a cat " * 60], size=(64, 64))
    with pytest.raises(InputError, match="64"):
        parity.edit(request)


def test_one_photo_is_expected(parity: Parity) -> None:
    with pytest.raises(InputError, match="has 2 photos"):
        parity.editor.edit(photos(2, 64, 64), "a cat", delta_strength=0)


def test_the_text_encoder_is_told_where_pictures_are(parity: Parity) -> None:
    """What the reference adds to the pipeline: without it, transformers counts positions as in text."""
    pipe = parity.plain
    seen: list[torch.Tensor] = []
    rotary = pipe.text_encoder.model.language_model.rotary_emb
    handle = rotary.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    try:
        parity.expected(parity.request(["a cat"], size=(64, 96), guidance={"text": 1.0}))
    finally:
        handle.remove()
    time, row, column = seen[0][:, 0]
    picture = time == time.mode().values
    assert row[picture].unique().numel() == 3
    assert column[picture].unique().numel() == 2
    assert int(time[-1]) < len(time) - 1


def changed(base: Path, folder: Path, file: str, **settings: Any) -> Path:
    """A copy of a pipeline with other settings in one of its files."""
    shutil.copytree(base, folder, copy_function=shutil.copy)
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize(
    ("file", "settings", "error", "match"),
    [
        ("transformer/config.json", {"guidance_embeds": True}, UnsupportedError, "guidance_embeds"),
        ("transformer/config.json", {"use_layer3d_rope": True}, UnsupportedError, "layers"),
        ("processor/preprocessor_config.json", {"resample": 2}, UnsupportedError, "bicubic"),
        ("processor/preprocessor_config.json", {"merge_size": 4}, CheckpointError, "merge_size"),
        ("text_encoder/config.json", {"model_type": "qwen3_vl"}, UnsupportedError, "Qwen2.5-VL"),
    ],
)
def test_what_is_refused(
    parity: Parity, tmp_path: Path, file: str, settings: Any, error: Any, match: str
) -> None:
    with pytest.raises(error, match=match):
        open_base(changed(parity.base, tmp_path / "base", file, **settings))


def test_one_picture_only(parity: Parity) -> None:
    from hywu_export.deltas import DeltaSpec

    family = open_base(parity.base)
    spec = DeltaSpec.from_patterns(family.components["transformer"].module, family.default_targets, 4)
    with pytest.raises(InputError, match="takes one"):
        family.plan(spec, Limits(images=2), None, 3)


PLUS = Case(
    "qwen_image_edit_plus",
    "QwenImageEditPlusPipeline",
    partial(make_base, pipeline="QwenImageEditPlusPipeline", zero_cond_t=True),
    call,
    ExportOptions(
        max_rank=4, max_steps=4, max_batch=2, size=64, max_size=512, text_length=64, images=2,
        targets=("to_q", "add_k_proj", "img_mlp.net.2", "img_mod.1", "txt_mod.1"),
    ),
    denoiser="transformer",
)  # fmt: skip


class PlusRequest(Request):
    """Whose size is that of the last photo."""

    @property
    def size(self) -> tuple[int, int]:
        height, width, _ = self.photos[0][-1].shape
        return width, height


@pytest.fixture(scope="module")
def plus(once: Any) -> Iterator[Parity]:
    with QwenParity(PLUS, once) as parity:
        yield parity


def pair(
    parity: Parity, prompt: str, first: tuple[int, int], last: tuple[int, int], **options: Any
) -> Request:
    """A request with two photos; sizes are width and height."""
    own = [photos(1, height, width, seed)[0] for seed, (width, height) in enumerate((first, last))]
    request = parity.request([prompt], [own[-1]], size=last, **options)
    values = {**request.__dict__, "photos": [own]}
    return PlusRequest(**values)


@pytest.mark.slow  # as its bundle is
def test_two_pictures(plus: Parity) -> None:
    request = pair(plus, "a cat", (96, 32), (64, 96), negative=["ugly"])
    got = plus.check(request)
    swapped = pair(plus, "a cat", (96, 32), (64, 96), negative=["ugly"])
    swapped.photos[0][0] = photos(1, 32, 96, seed=9)[0]
    assert largest(got, plus.edit(swapped)) > CHANGED


@pytest.mark.slow
def test_two_pictures_with_deltas(plus: Parity) -> None:
    request = pair(plus, "make it sepia", (64, 64), (64, 64), guidance={"text": 1.0})
    plus.check(request, plus.deltas(scale=0.6))


@pytest.mark.slow
def test_verify_two_pictures(plus: Parity) -> None:
    plus.check_verify()


@pytest.mark.rtx
@pytest.mark.slow
def test_tensorrt_rtx_two_pictures(plus: Parity) -> None:
    pytest.importorskip("tensorrt_rtx")
    plus.check_tensorrt_rtx()
