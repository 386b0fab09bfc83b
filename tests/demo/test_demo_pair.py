"""The demo pair that is shipped: equal to diffusers and PEFT, and its edits better than doing nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo import run as demo
from demo.recipe import operations
from hywu_runtime import Editor
from hywu_runtime.images import load_photo

pytestmark = pytest.mark.slow

STEPS, SEED = 3, 7
PHOTO = demo.HERE / "photos" / "coffee.jpg"


@pytest.fixture(scope="module")
def editor(demo_bundle: Path) -> Iterator[Editor]:
    with Editor.load(demo_bundle) as editor:
        yield editor


@pytest.fixture(scope="module")
def pipeline() -> Any:
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(
        demo.HERE / "base", torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit_with_diffusers(pipeline: Any, pixels: np.ndarray, latents: np.ndarray) -> np.ndarray:
    import torch
    from PIL import Image

    (image,) = pipeline(
        "",
        image=Image.fromarray(pixels),
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=torch.from_numpy(latents),
    ).images
    return np.asarray(image)


def test_equals_the_pipeline_without_and_with_the_same_deltas_in_peft(editor: Editor, pipeline: Any) -> None:
    import torch
    from peft import LoraConfig

    policy = editor.bundle.manifest.image
    pixels = load_photo(PHOTO, policy)
    side = pixels.shape[0] // 4
    latents = np.random.default_rng(SEED).standard_normal((1, 8, side, side), np.float32)
    ours = editor.edit(
        PHOTO, "make it sepia", steps=STEPS, latents=latents, delta_strength=0.0, output="array"
    )
    theirs = edit_with_diffusers(pipeline, pixels, latents)
    assert np.abs(ours.astype(int) - theirs).max() <= 1

    deltas = editor.generate(PHOTO, "make it sepia")
    modules = [name.removesuffix(".lora_A") for name in deltas if name.endswith(".lora_A")]
    pipeline.unet.add_adapter(LoraConfig(r=deltas.rank, lora_alpha=deltas.rank, target_modules=modules))
    try:
        with torch.no_grad():
            for module in modules:
                layer = pipeline.unet.get_submodule(module)
                layer.lora_A["default"].weight.copy_(torch.from_numpy(deltas[f"{module}.lora_A"][0]))
                layer.lora_B["default"].weight.copy_(torch.from_numpy(deltas[f"{module}.lora_B"][0]))
        theirs_edited = edit_with_diffusers(pipeline, pixels, latents)
    finally:
        pipeline.unet.delete_adapters("default")
    ours_edited = editor.edit(PHOTO, "make it sepia", steps=STEPS, latents=latents, output="array")
    assert np.abs(theirs_edited.astype(int) - theirs).mean() > 5
    assert np.abs(ours_edited.astype(int) - theirs_edited).max() <= 1


def test_every_instruction_beats_the_untouched_photo_and_wrong_deltas(editor: Editor) -> None:
    pixels = load_photo(PHOTO, editor.bundle.manifest.image)
    edits = {o.name: editor.edit(PHOTO, o.phrasings[1], output="array") for o in operations.OPERATIONS}
    gains = []
    for name, edited in edits.items():
        exact = demo._exact(name, pixels)
        mine = demo.psnr(edited, exact)
        assert mine > demo.psnr(pixels, exact), name
        gains.append(mine - np.mean([demo.psnr(other, exact) for key, other in edits.items() if key != name]))
    assert np.mean(gains) > 6


def test_strength_moves_between_the_photo_and_the_edit(editor: Editor) -> None:
    off, half, full = (
        editor.edit(PHOTO, "make it darker", delta_strength=strength, output="array").mean()
        for strength in (0.0, 0.5, 1.0)
    )
    assert full < half < off
