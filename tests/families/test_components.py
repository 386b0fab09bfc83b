"""Pipeline folders as they are found: old names, other file layouts, and what is wrong with them by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hywu_export.bundle.weights import read_tensor
from hywu_export.families import open_base
from hywu_export.families.base import Family
from hywu_runtime.errors import CheckpointError, UnsupportedError

WEIGHTS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def base(pair: Any, tmp_path: Path) -> Path:
    """A copy of the base that a test may change."""
    shutil.copytree(pair.base, tmp_path / "base")
    return tmp_path / "base"


def weights(base: Path, component: str) -> Path:
    return base / component / f"{WEIGHTS[component]}.safetensors"


def rewrite(base: Path, component: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = weights(base, component)
    save_file(change(load_file(path)), path)


def configure(base: Path, file: str, **settings: Any) -> None:
    path = base / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def assert_same_weights(family: Family, original: Path, dtype: str = "F32") -> None:
    """Every parameter has the bytes that it has in the untouched base."""
    expected = open_base(original).components
    assert family.components.keys() == expected.keys()
    for name, component in family.components.items():
        assert component.tensors.keys() == expected[name].tensors.keys()
        for parameter, location in component.tensors.items():
            got = b"".join(read_tensor(parameter, location, "F32"))
            want = b"".join(read_tensor(parameter, expected[name].tensors[parameter], "F32"))
            if dtype != "F32":
                assert location.dtype == dtype
                want = np.frombuffer(want, np.float32).astype(np.float16).astype(np.float32).tobytes()
            assert got == want


def test_old_attention_names_of_the_vae(base: Path, pair: Any) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            for today, before in old.items():
                name = name.replace(f".{today}.", f".{before}.")
            renamed[name] = tensor
        assert renamed.keys() != tensors.keys()
        return renamed

    rewrite(base, "vae", rename)
    assert_same_weights(open_base(base), pair.base)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_encoder_names_of_every_version(base: Path, pair: Any, prefix: str) -> None:
    """Some versions of transformers write a prefix and position ids, others do not."""

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {prefix + name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        return renamed | {f"{prefix}embeddings.position_ids": torch.arange(32)[None]}

    rewrite(base, "text_encoder", rename)
    assert_same_weights(open_base(base), pair.base)


def test_half_precision_variant(base: Path, pair: Any) -> None:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(base, torch_dtype=torch.float16)
    for component in WEIGHTS:
        shutil.rmtree(base / component)
    pipe.save_pretrained(base, variant="fp16")
    assert weights(base, "unet").with_suffix("").with_suffix(".fp16.safetensors").exists()
    assert_same_weights(open_base(base), pair.base, "F16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(base: Path, pair: Any, variant: str | None) -> None:
    from diffusers import UNet2DConditionModel

    dtype = None if variant is None else torch.float16
    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=dtype)
    shutil.rmtree(base / "unet")
    unet.save_pretrained(base / "unet", max_shard_size="200KB", variant=variant)
    family = open_base(base)
    assert len({location.file for location in family.components["unet"].tensors.values()}) > 1
    if variant is None:
        assert_same_weights(family, pair.base)


def test_full_precision_comes_before_a_variant(base: Path, pair: Any) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(weights(base, "vae")).items()}
    save_file(tensors, base / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert_same_weights(open_base(base), pair.base)


@pytest.mark.parametrize("component", WEIGHTS)
def test_missing_extra_and_misshapen_tensors(base: Path, component: str) -> None:
    original = load_file(weights(base, component))
    victim = sorted(original)[3]
    for changed, message in (
        ({name: tensor for name, tensor in original.items() if name != victim}, "lacks"),
        (original | {victim: original[victim][..., None].clone()}, r"has shape \[.*, 1\]"),
        (original | {"surplus.weight": torch.zeros(2)}, "holds"),
    ):
        save_file(changed, weights(base, component))
        with pytest.raises(CheckpointError, match=message) as raised:
            open_base(base)
        named = "surplus.weight" if "holds" in message else victim.removeprefix("text_model.")
        assert named in str(raised.value)
        assert component in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("addition_embed_type", "text"),
        ("class_embed_type", "timestep"),
        ("encoder_hid_dim_type", "text_proj"),
        ("num_class_embeds", 4),
        ("time_cond_proj_dim", 16),
    ],
)
def test_a_foreign_unet(base: Path, setting: str, value: object) -> None:
    configure(base, "unet/config.json", **{setting: value})
    with pytest.raises(UnsupportedError, match=setting):
        open_base(base)


def test_a_foreign_text_encoder(base: Path) -> None:
    configure(base, "text_encoder/config.json", model_type="t5")
    with pytest.raises(UnsupportedError, match="t5"):
        open_base(base)


def test_an_unknown_pipeline(base: Path) -> None:
    configure(base, "model_index.json", _class_name="StableDiffusionUpscalePipeline")
    with pytest.raises(UnsupportedError, match=r"StableDiffusionUpscalePipeline.*InstructPix2Pix"):
        open_base(base)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("model_index.json", {"_class_name": None}, "names no class"),
        ("unet/config.json", {"down_block_types": ["NoSuchBlock2D", "DownBlock2D"]}, "NoSuchBlock2D"),
        ("unet/config.json", {"block_out_channels": [32]}, "unet"),
        ("vae/config.json", {"block_out_channels": "wide"}, "vae"),
        ("vae/config.json", {"norm_num_groups": 7}, "vae"),
        ("text_encoder/config.json", {"hidden_size": 33}, "text_encoder"),
    ],
)
def test_configurations_that_cannot_be(base: Path, file: str, settings: dict[str, Any], message: str) -> None:
    configure(base, file, **settings)
    with pytest.raises(CheckpointError, match=message):
        open_base(base)


@pytest.mark.parametrize("setting", ["in_channels", "out_channels", "cross_attention_dim"])
def test_a_unet_of_another_pipeline(base: Path, setting: str) -> None:
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(base / "unet")
    unet = UNet2DConditionModel.from_config(config | {setting: 2 * config[setting]})
    shutil.rmtree(base / "unet")
    unet.save_pretrained(base / "unet")
    with pytest.raises(
        CheckpointError, match=rf"sets {setting} to {2 * config[setting]}\. Expected {config[setting]}"
    ):
        open_base(base)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_missing_and_damaged_files(base: Path, file: str) -> None:
    path = base / file
    for content in (path.read_bytes()[:-7], b"", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=path.parent.name) as raised:
            open_base(base)
        assert raised.value.remedy
        path.write_bytes(b"")


def test_a_pickle(base: Path) -> None:
    weights(base, "unet").unlink()
    torch.save({}, base / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="pickle"):
        open_base(base)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        open_base(tmp_path / "nowhere")


def test_a_safety_checker_is_left_out_aloud(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_base(base)
    assert not caplog.records
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    configure(base, "model_index.json", safety_checker=checker)
    open_base(base)
    assert "safety checker" in caplog.text
