"""Small random models and the bundles made from them, shared by all tests of a run.

They are made once, by whichever worker comes first: tracing is what takes time here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Machines are noisy: a slow example is no failure, and in CI every run tries the same examples.
settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("project")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ["make it sepia", "blur the photo", "a cat", "ugly"]
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1"]
LORA_TARGETS += ["downsamplers.0.conv"]


@dataclass(frozen=True)
class Pair:
    """Folders of a base pipeline and of a generator for it."""

    base: Path
    generator: Path


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """``once(name, make)``: the folder ``name``, made by ``make(folder)`` in one worker and shared by all."""
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / "shared" / name, root / "shared" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(root / "shared" / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get


def make_base(folder: Path, seed: int = 0, **unet: Any) -> None:
    """A random ``StableDiffusionInstructPix2PixPipeline``: two levels, one with attention; factor-2 VAE."""
    import torch
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from demo.recipe.tokenizer import train_tokenizer

    train_tokenizer(WORDS, folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 8,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**(settings | unet)),
        scheduler=EulerAncestralDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_generator(folder: Path, base: Path, seed: int = 1) -> None:
    """A random generator for the UNet's 32-channel query and value projections, and its encoder."""
    import torch
    from diffusers import UNet2DConditionModel

    from hywu_export.generator import GeneratorConfig, ParameterGenerator, TextImageConditionEncoder
    from hywu_export.generator.condition import TextImageConditionConfig

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    targets = [
        name
        for name, module in unet.named_modules()
        if name.endswith(("to_q", "to_v")) and (module.in_features, module.out_features) == (32, 32)
    ]
    config = GeneratorConfig.from_dict(
        {
            "model_type": "parameter_generator",
            "token_dim": 16,
            "output_dim": 16,
            "rank": 4,
            "alpha": 8,
            "input_dim": 24,
            "dim_accumulation": 2,
            "d_model": 32,
            "head_dim": 8,
            "num_base_model_layers": len(targets),
            "num_pg_layers": 2,
            "prefix": "blocks.",
            "pg_mapping": {"projection": {"lora_A_dim": 32, "lora_B_dim": 32}},
        }
    )
    torch.manual_seed(seed)
    generator = ParameterGenerator(config)
    torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.1)
    generator.save_pretrained(folder)
    encoder = TextImageConditionEncoder(
        TextImageConditionConfig(text_dim=32, latent_channels=4, output_dim=24)
    )
    encoder.save_pretrained(folder / "condition_encoder")
    names = {f"blocks.{layer}.projection": name for layer, name in enumerate(targets)}
    (folder / "targets.json").write_text(json.dumps(names))


@pytest.fixture(scope="session")
def pair(once: Callable[[str, Callable[[Path], None]], Path]) -> Pair:
    """A random base and a random generator for it."""

    def make(folder: Path) -> None:
        make_base(folder / "base")
        make_generator(folder / "generator", folder / "base")

    folder = once("pair", make)
    return Pair(folder / "base", folder / "generator")


@pytest.fixture(scope="session")
def bundle(pair: Pair, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The bundle of `pair`, with every sampler that the tests use. Do not write to it."""

    def make(folder: Path) -> None:
        from hywu_export import ExportOptions, export

        samplers = ("euler_a", "euler", "dpmpp_2m", "heun", "unipc")
        options = ExportOptions(samplers=samplers, max_steps=12, max_size=128)
        export(folder, pair.base, pair.generator, options)

    return once("bundle", make)


@pytest.fixture(scope="session")
def linked_bundle(pair: Pair, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A bundle of `pair` whose weights stay in the checkpoints, small in all; beside it what
    ``hywu export --json`` printed, ``export.json``. Do not write to it."""

    def make(folder: Path) -> None:
        from cli_tools import answer

        report = answer(
            "export", "--base", pair.base, "--generator", pair.generator, "--out", folder / "bundle",
            "--link-weights", "--scheduler", "euler", "--scheduler", "dpmpp_2m", "--max-steps", 6,
            "--steps", 3, "--guidance", 3, "--image-guidance", 1.25, "--size", 16, "--max-size", 64,
            "--batch", 2,
        )  # fmt: skip
        (folder / "export.json").write_text(json.dumps(report))

    return once("linked_bundle", make) / "bundle"


@pytest.fixture(scope="session")
def lora_bundle(pair: Pair, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The base of `pair` alone, with deltas of rank 8 for attention, feed-forward and convolutions."""

    def make(folder: Path) -> None:
        from hywu_export import ExportOptions, export

        export(folder, pair.base, options=ExportOptions(targets=LORA_TARGETS, max_rank=8, max_steps=12))

    return once("lora_bundle", make)


@pytest.fixture(scope="session")
def demo_bundle(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The exported demo pair: that of `make demo`, or one made now."""
    from hywu_runtime import Bundle
    from hywu_runtime.errors import HywuError

    made = Path(__file__).parents[1] / "out" / "bundle"
    try:
        Bundle.open(made)
        return made
    except HywuError:
        pass

    def make(folder: Path) -> None:
        from hywu_export import export

        demo = Path(__file__).parents[1] / "demo"
        export(folder, demo / "base", demo / "generator")

    return once("demo_bundle", make)


@pytest.fixture(scope="session")
def staged_bundles(pair: Pair, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Bundles of `pair` cut into stages, ``2`` and ``4``, and not cut, ``1``. Do not write to them."""

    def make(folder: Path) -> None:
        from unittest import mock

        import hywu_export.tracing
        from hywu_export import ExportOptions, export

        traced: dict[str, Any] = {}
        trace = hywu_export.tracing.trace

        def trace_once(spec: Any, axes: Any) -> Any:
            if spec.name not in traced:
                traced[spec.name] = trace(spec, axes)
            return traced[spec.name]

        folder.mkdir()
        with mock.patch.object(hywu_export.tracing, "trace", trace_once):
            for stages in (1, 2, 4):
                options = ExportOptions(samplers=("dpmpp_2m",), max_steps=6, max_size=128, stages=stages)
                export(folder / str(stages), pair.base, pair.generator, options)

    return once("staged_bundles", make)
