from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hywu_export.generator import TextImageConditionEncoder, load_condition_encoder
from hywu_export.generator.condition import TextImageConditionConfig
from hywu_runtime.errors import CheckpointError

CONFIG = TextImageConditionConfig(text_dim=6, latent_channels=3, output_dim=10, grid=4, patch=2)


@given(
    batch=st.integers(1, 3),
    length=st.integers(0, 5),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    patch=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=25, deadline=None)
def test_text_then_patches(batch: int, length: int, height: int, width: int, patch: int) -> None:
    encoder = TextImageConditionEncoder(TextImageConditionConfig(6, 3, 10, grid=4, patch=patch))
    text, latents = torch.randn(batch, length, 6), torch.randn(batch, 3, height, width)
    condition = encoder(text, latents)
    side = 4 // patch
    assert condition.shape == (batch, length + side * side, 10)

    text_type, image_type = encoder.type_embedding.weight
    torch.testing.assert_close(condition[:, :length], encoder.text_in(text) + text_type)
    resized = F.interpolate(latents, size=(4, 4), mode="bilinear", align_corners=False)
    weight, bias = encoder.image_in.weight.flatten(1), encoder.image_in.bias
    for row in range(side):
        for column in range(side):
            square = resized[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            position = encoder.patch_position.weight[row * side + column]
            expected = square.flatten(1) @ weight.T + bias + position + image_type
            torch.testing.assert_close(condition[:, length + row * side + column], expected)


def test_round_trip(tmp_path: Path) -> None:
    encoder = TextImageConditionEncoder(CONFIG)
    encoder.save_pretrained(tmp_path / "condition_encoder")
    loaded = load_condition_encoder(tmp_path)
    assert isinstance(loaded, TextImageConditionEncoder)
    assert loaded.config == CONFIG
    text, latents = torch.randn(2, 3, 6), torch.randn(2, 3, 9, 5)
    assert torch.equal(loaded(text, latents), encoder(text, latents))
    half = load_condition_encoder(tmp_path, torch.float16)
    assert half is not None
    assert half.text_in.weight.dtype == torch.float16


def test_a_generator_may_have_no_encoder(tmp_path: Path) -> None:
    assert load_condition_encoder(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "os.system"}, "names the class 'os.system'"),
        ({"_class_name": None}, "names the class None"),
        ({"grid": 5}, "grid is 5 and patch is 2"),
        ({"patch": 0}, "patch is 0"),
        ({"text_dim": "6"}, "text_dim is '6'"),
        ({"output_dim": True}, "output_dim is True"),
        ({"heads": 2}, "missing or unknown: heads"),
        ({"output_dim": 12}, "has the shape"),
    ],
)
def test_refuses_another_config(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "condition_encoder"
    TextImageConditionEncoder(CONFIG).save_pretrained(folder)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_condition_encoder(tmp_path)


def test_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match="grid is 9 and patch is 2"):
        TextImageConditionConfig(text_dim=6, latent_channels=3, output_dim=10, grid=9)


def test_refuses_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_condition_encoder(tmp_path / "no")
    (tmp_path / "condition_encoder").write_text("")
    with pytest.raises(CheckpointError, match="condition_encoder is not a folder"):
        load_condition_encoder(tmp_path)
    (tmp_path / "condition_encoder").unlink()
    (tmp_path / "condition_encoder").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_condition_encoder(tmp_path)


def test_exports_with_dynamic_sizes() -> None:
    encoder = TextImageConditionEncoder(CONFIG).eval()
    axis = torch.export.Dim.DYNAMIC
    shapes: tuple[dict[int, Any], ...] = ({0: axis, 1: axis}, {0: axis, 2: axis, 3: axis})

    def example(batch: int, length: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, length, 6), torch.randn(batch, 3, height, width)

    exported = torch.export.export(encoder, example(2, 3, 8, 6), dynamic_shapes=shapes, strict=False).module()
    for sizes in ((1, 5, 4, 4), (3, 2, 16, 10)):
        inputs = example(*sizes)
        torch.testing.assert_close(exported(*inputs), encoder(*inputs))
