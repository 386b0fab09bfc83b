"""Bundles of InstructPix2Pix pipelines against diffusers and PEFT: the same pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import draws, largest, photos, random_deltas
from pix2pix_reference import Reference

from hywu_runtime import Deltas, Editor

SCHEDULERS = {
    "euler_a": "EulerAncestralDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@pytest.fixture(scope="module")
def editor(bundle: Path) -> Iterator[Editor]:
    with Editor.load(bundle) as editor:
        yield editor


@pytest.fixture(scope="module")
def lora_editor(lora_bundle: Path) -> Iterator[Editor]:
    with Editor.load(lora_bundle) as editor:
        yield editor


@pytest.fixture(scope="module")
def plain(pair: Any) -> Reference:
    """The pipeline without adapters. Tests do not change it."""
    return Reference(pair.base)


def both(
    editor: Editor,
    reference: Reference,
    requests: list[tuple[np.ndarray, str]],
    steps: int = 3,
    **options: Any,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The editor's and the pipeline's pictures, from the same noise."""
    height, width, _ = requests[0][0].shape
    shape = (len(requests), 4, height // 2, width // 2)
    latents = draws(1, shape, seed=7)[0]
    sampler = options.get("sampler", "euler_a")
    evaluations = 2 * steps - 1 if sampler == "heun" else steps
    ours = {key: options.pop(key) for key in ("sampler", "deltas", "delta_strength") if key in options}
    got = editor.edit_batch(
        requests, steps=steps, size=(width, height), latents=latents, noise=draws(evaluations, shape, seed=3),
        output="array", **({"guidance": 5.0, "image_guidance": 1.5} | options), **ours,
    )  # fmt: skip
    return got, reference(requests, steps=steps, latents=latents, noise_seed=3, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"negative_prompt": "ugly"},
        {"guidance": 1.0},
        {"guidance": 9.0, "image_guidance": 1.0},
        {"guidance": 4.0, "image_guidance": 0.5},
    ],
    ids=["negative prompt", "unguided", "image guidance 1", "image guidance below 1"],
)
def test_deltas_off_is_the_pipeline(editor: Editor, plain: Reference, options: dict[str, Any]) -> None:
    requests = [(photos(1)[0], "make it sepia")]
    got, expected = both(editor, plain, requests, delta_strength=0.0, **options)
    assert largest(got, expected) <= 1


@pytest.mark.parametrize("steps", [1, 2, 7, 12])
def test_step_counts(editor: Editor, plain: Reference, steps: int) -> None:
    got, expected = both(editor, plain, [(photos(1)[0], "a cat")], steps, delta_strength=0.0)
    assert largest(got, expected) <= 1


@pytest.mark.parametrize("size", [(32, 64), (48, 20), (8, 8)])
def test_sizes(editor: Editor, plain: Reference, size: tuple[int, int]) -> None:
    got, expected = both(editor, plain, [(photos(1, *size)[0], "blur the photo")], delta_strength=0.0)
    assert got[0].shape == (*size, 3)
    assert largest(got, expected) <= 1


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_batch(editor: Editor, plain: Reference, guidance: float) -> None:
    requests = list(zip(photos(2, 32, 24), ["make it sepia", "a cat with a hat"]))
    negatives = ["ugly", ""]
    got, expected = both(
        editor, plain, requests, negative_prompt=negatives, guidance=guidance, delta_strength=0.0
    )
    assert largest(got, expected) <= 1
    assert largest(got[:1], got[1:]) > 20


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_samplers(editor: Editor, pair: Any, sampler: str) -> None:
    reference = Reference(pair.base, SCHEDULERS[sampler])
    for steps in (3, 8):
        got, expected = both(
            editor, reference, [(photos(1)[0], "a cat")], steps, sampler=sampler, delta_strength=0.0
        )
        assert largest(got, expected) <= 1


def test_a_base_alone_is_the_pipeline(lora_editor: Editor, plain: Reference) -> None:
    requests = list(zip(photos(2, 16, 32), ["make it sepia", "a cat"]))
    got, expected = both(lora_editor, plain, requests, delta_strength=0.0)
    assert largest(got, expected) <= 1


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.25])
def test_deltas_are_the_adapter_in_peft(
    lora_editor: Editor, pair: Any, plain: Reference, strength: float
) -> None:
    spec = lora_editor.bundle.manifest.deltas
    assert spec is not None
    kinds = {(target.kind, target.kernel) for target in spec.targets}
    assert kinds == {("linear", None), ("conv", (1, 1)), ("conv", (3, 3))}
    assert any(target.module.endswith("downsamplers.0.conv") for target in spec.targets)
    deltas = random_deltas(spec)
    adapted = Reference(pair.base)
    adapted.add_adapter(deltas, strength=strength)
    requests = [(photos(1)[0], "make it sepia")]
    got, expected = both(lora_editor, adapted, requests, deltas=deltas, delta_strength=strength)
    _, without = both(lora_editor, plain, requests, delta_strength=0.0)
    assert largest(got, without) > 20
    assert largest(got, expected) <= 1


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_each_kind_of_target(lora_editor: Editor, pair: Any, plain: Reference, kind: str) -> None:
    spec = lora_editor.bundle.manifest.deltas
    assert spec is not None
    chosen = {target.module for target in spec.targets if target.kind == kind}
    deltas = Deltas(
        {
            name: array if name.rpartition(".")[0] in chosen else np.zeros_like(array)
            for name, array in random_deltas(spec, seed=1, scale=0.6).items()
        }
    )
    adapted = Reference(pair.base)
    adapted.add_adapter({n: a for n, a in deltas.items() if n.rpartition(".")[0] in chosen})
    requests = [(photos(1)[0], "a cat")]
    got, expected = both(lora_editor, adapted, requests, deltas=deltas, guidance=1.0)
    _, without = both(lora_editor, plain, requests, delta_strength=0.0, guidance=1.0)
    assert largest(got, without) > 20
    assert largest(got, expected) <= 1


def test_deltas_per_sample(lora_editor: Editor, pair: Any) -> None:
    spec = lora_editor.bundle.manifest.deltas
    sets = [random_deltas(spec, seed=seed) for seed in (1, 2)]
    requests = list(zip(photos(2), ["make it sepia", "a cat"]))
    shape = (2, 4, 16, 16)
    latents, noise = draws(1, shape, seed=7)[0], draws(3, shape, seed=3)
    got = lora_editor.edit_batch(
        requests, deltas=sets, delta_strength=[1.0, 0.5], steps=3, latents=latents, noise=noise,
        sampler="euler_a", guidance=5.0, image_guidance=1.5, output="array",
    )  # fmt: skip
    for sample, (deltas, strength) in enumerate(zip(sets, [1.0, 0.5])):
        adapted = Reference(pair.base)
        adapted.add_adapter(deltas, strength=strength)
        # The pipeline draws noise for the whole batch, so it is given both photographs.
        expected = adapted(requests, steps=3, latents=latents, noise_seed=3)
        assert largest([got[sample]], [expected[sample]]) <= 1


def test_a_blend_is_both_adapters(lora_editor: Editor, pair: Any) -> None:
    spec = lora_editor.bundle.manifest.deltas
    assert spec is not None
    first, second = (random_deltas(spec, seed=seed, rank=4) for seed in (1, 2))
    blend = Deltas.blend([(first, 0.75), (second, -0.5)], spec.rank)
    adapted = Reference(pair.base)
    adapted.add_adapter(first, "first")
    adapted.add_adapter(second, "second")
    adapted.pipe.set_adapters(["first", "second"], [0.75, -0.5])
    got, expected = both(lora_editor, adapted, [(photos(1)[0], "a cat")], deltas=blend)
    assert largest(got, expected) <= 1
    alone, _ = both(lora_editor, adapted, [(photos(1)[0], "a cat")], deltas=first)
    assert largest(got, alone) > 20


def test_an_adapter_saved_by_peft(lora_editor: Editor, pair: Any, tmp_path: Path) -> None:
    """Ranks and scales that differ from module to module, and fewer targets than the bundle's."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, PeftModel, get_peft_model

    from hywu_export.deltas import DeltaSpec, peft_to_deltas

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "ff.net.2", "conv1"],
        rank_pattern={"to_v": 2, "mid_block.resnets.0.conv1": 7},
        alpha_pattern={"attn2.to_q": 3, "conv1": 9},
    )
    torch.manual_seed(5)
    adapted = get_peft_model(UNet2DConditionModel.from_pretrained(pair.base / "unet"), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path)

    manifest = lora_editor.bundle.manifest
    assert manifest.deltas is not None
    spec = DeltaSpec.from_manifest(manifest.to_dict()["deltas"])
    deltas = Deltas(peft_to_deltas(tmp_path, spec))
    reference = Reference(pair.base)
    PeftModel.from_pretrained(reference.pipe.unet, tmp_path)  # puts its layers into this very UNet
    got, expected = both(lora_editor, reference, [(photos(1)[0], "a cat")], deltas=deltas)
    assert largest(got, expected) <= 1
    without, _ = both(lora_editor, reference, [(photos(1)[0], "a cat")], delta_strength=0.0)
    assert largest(got, without) > 20


def test_generated_deltas(editor: Editor, pair: Any, plain: Reference) -> None:
    """The chain of the bundle is torch's: pipeline → condition encoder → generator → adapter → pipeline."""
    import json

    from hywu_export.generator import ParameterGenerator, load_condition_encoder

    photo, prompt = photos(1, 24, 40)[0], "make it sepia"
    pipe = plain.pipe
    generator = ParameterGenerator.from_pretrained(pair.generator)
    encoder = load_condition_encoder(pair.generator)
    assert encoder is not None
    with torch.no_grad():
        tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
        hidden = pipe.text_encoder(tokens.input_ids)[0]
        pixels = pipe.image_processor.preprocess(photo[None] / np.float32(255))
        latents = pipe.vae.encode(pixels).latent_dist.mode()
        made = generator.deltas(encoder(hidden, latents))
    modules = json.loads((pair.generator / "targets.json").read_text())
    expected = {}
    for name, tensor in made.items():
        path, _, part = name.rpartition(".")
        expected[f"{modules[path]}.{part}"] = tensor.numpy()
    deltas = editor.generate(photo, prompt)
    assert deltas.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(deltas[name], expected[name], rtol=0, atol=1e-4)

    adapted = Reference(pair.base)
    adapted.add_adapter(expected)
    got, pictures = both(editor, adapted, [(photo, prompt)])
    assert largest(got, pictures) <= 1
    without, _ = both(editor, plain, [(photo, prompt)], delta_strength=0.0)
    assert largest(got, without) > 20
