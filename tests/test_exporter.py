"""What cannot be exported is refused at once, by name, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hywu_export import ExportOptions, export
from hywu_export.exporter import _Job
from hywu_runtime.errors import CheckpointError, HywuError, InputError, UnsupportedError


@pytest.mark.parametrize("name", ["max_rank", "max_steps", "steps", "max_batch", "max_size", "size"])
def test_numbers_below_one(name: str) -> None:
    with pytest.raises(InputError, match=rf"{name} is 0\. Expected 1"):
        ExportOptions(**{name: 0})  # type: ignore[arg-type]


def test_a_size_beyond_the_largest() -> None:
    with pytest.raises(InputError, match="size is 128, and max_size 64"):
        ExportOptions(size=128, max_size=64)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ((), {}, "nothing to export"),
        (("base", "generator"), {"targets": ["to_q"]}, "Targets were given beside a generator"),
        (("generator",), {"loras": [Path("x")]}, "Targets were given beside a generator"),
        (("base",), {"targets": ["to_x"]}, "'to_x' matches no module"),
        (("base",), {"samplers": ["magic"]}, "'magic'"),
        (("base",), {"steps": 50, "max_steps": 12}, "step count is 50.*1 to 12"),
        (("base",), {"guidance": {"audio": 2.0}}, "'audio'.*text or image"),
        (("base",), {"max_size": 3}, "3 pixels.*multiples of 4"),
    ],
)
def test_options_that_do_not_fit(
    pair: Any, tmp_path: Path, parts: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    folders = {part: getattr(pair, part) for part in parts}
    with pytest.raises(HywuError, match=message) as raised:
        export(tmp_path / "bundle", **folders, options=ExportOptions(**options))
    assert isinstance(raised.value, InputError | CheckpointError)
    assert list(tmp_path.iterdir()) == []


def write(path: Path, **settings: Any) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | settings))


def other_condition_encoder(generator: Path, **sizes: int) -> None:
    from hywu_export.generator import TextImageConditionEncoder
    from hywu_export.generator.condition import TextImageConditionConfig

    config = {"text_dim": 32, "latent_channels": 4, "output_dim": 24} | sizes
    encoder = TextImageConditionEncoder(TextImageConditionConfig(**config))
    encoder.save_pretrained(generator / "condition_encoder")


BROKEN: dict[str, tuple[Callable[[Path], object], type[HywuError], str]] = {
    "scheduler that clips": (
        lambda root: write(
            root / "base/scheduler/scheduler_config.json", _class_name="DDIMScheduler", clip_sample=True
        ),
        UnsupportedError,
        "clip_sample",
    ),
    "no tokenizer": (
        lambda root: (root / "base/tokenizer/tokenizer.json").unlink(),
        CheckpointError,
        "holds no vocabulary",
    ),
    "damaged tokenizer": (
        lambda root: (root / "base/tokenizer/tokenizer.json").write_text("{"),
        CheckpointError,
        "cannot be loaded",
    ),
    "condition encoder for other latents": (
        lambda root: other_condition_encoder(root / "generator", latent_channels=16),
        CheckpointError,
        "does not take the base's tensors",
    ),
    "condition encoder for another text encoder": (
        lambda root: other_condition_encoder(root / "generator", text_dim=40),
        CheckpointError,
        "does not take the base's tensors",
    ),
    "condition encoder of another generator": (
        lambda root: other_condition_encoder(root / "generator", output_dim=20),
        CheckpointError,
        "gives 20 channels.*input_dim = 24",
    ),
    "defaults of the wrong type": (
        lambda root: write(root / "generator/generation_config.json", num_inference_steps="many"),
        CheckpointError,
        "num_inference_steps is 'many'. Expected int",
    ),
    "targets of another base": (
        lambda root: write(root / "generator/targets.json", **{"blocks.0.projection": "nowhere.to_q"}),
        CheckpointError,
        "nowhere.to_q",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_checkpoints_that_do_not_fit(pair: Any, tmp_path: Path, case: str) -> None:
    spoil, error, message = BROKEN[case]
    shutil.copytree(pair.base.parent, tmp_path / "pair")
    spoil(tmp_path / "pair")
    with pytest.raises(error, match=message) as raised:
        export(tmp_path / "out" / "bundle", tmp_path / "pair" / "base", tmp_path / "pair" / "generator")
    assert raised.value.remedy
    assert not (tmp_path / "out").exists()


def test_defaults_of_the_pair(pair: Any, tmp_path: Path) -> None:
    """A generator may say how it is to be used; options come before that, both before the pipeline's own."""
    shutil.copytree(pair.generator, tmp_path / "generator")
    write(
        tmp_path / "generator/generation_config.json",
        base_prompt="", num_inference_steps=8, guidance_scale=1, image_guidance_scale=2.5,
    )  # fmt: skip

    def job(**options: Any) -> _Job:
        return _Job(pair.base, tmp_path / "generator", ExportOptions(**options))

    own, asked = job(), job(steps=3, guidance={"text": 4.0})
    assert (own.default_steps, asked.default_steps, job(max_steps=5).default_steps) == (8, 3, 5)
    assert [scale.default for scale in own.guidance] == [1.0, 2.5]
    assert [scale.default for scale in asked.guidance] == [4.0, 2.5]
    constant = own.plan.tensors["base_prompt.ids"]
    assert (constant.source, constant.constant) == ("text", "")
    step = next(graph for graph in own.plan.graphs if graph.name == "step")
    names = {tensor.name for tensor in step.inputs}
    assert "base_prompt.embeds" in names
    assert "prompt.embeds" not in names  # the instruction reaches the base through the deltas alone
