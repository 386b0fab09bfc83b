from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from generator_cases import DEFAULT, GOLDEN, randomised, small
from safetensors.torch import load_file, save_file
from torch import Tensor

from hywu_export.generator import GeneratorConfig, ParameterGenerator
from hywu_export.generator.checkpoint import check_checkpoint
from hywu_runtime.errors import CheckpointError

NORM = "model.norm_final.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "generator"
    randomised(GeneratorConfig.from_dict(small())).save_pretrained(folder)
    return folder


def split(folder: Path, shards: int = 3) -> None:
    """Turn the single file into shards with an index."""
    whole = folder / "model.safetensors"
    state = load_file(whole)
    whole.unlink()
    weight_map = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(state)
    }
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in state.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def same(first: ParameterGenerator, second: ParameterGenerator) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip(checkpoint: Path) -> None:
    loaded = ParameterGenerator.from_pretrained(checkpoint)
    assert same(loaded, randomised(GeneratorConfig.from_dict(small())))
    assert loaded.config == GeneratorConfig.from_dict(small())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]


def test_loading_does_not_change_the_files(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    loaded = ParameterGenerator.from_pretrained(checkpoint)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    loaded.save_pretrained(checkpoint)  # over the file that is still mapped
    assert (checkpoint / "model.safetensors").read_bytes() != before
    assert same(ParameterGenerator.from_pretrained(checkpoint), loaded)


def test_saved_config_has_the_released_form(tmp_path: Path) -> None:
    for case in ("dense", "moe"):
        released = json.loads((GOLDEN / case / "config.json").read_text())
        generator = ParameterGenerator(GeneratorConfig.from_file(GOLDEN / case / "config.json"))
        generator.save_pretrained(tmp_path)
        del released["transformers_version"]  # not made by that library
        assert json.loads((tmp_path / "config.json").read_text()) == released


def test_names_are_those_of_the_reference() -> None:
    for case in ("dense", "moe"):
        generator = ParameterGenerator(GeneratorConfig.from_file(GOLDEN / case / "config.json"))
        assert generator.state_dict().keys() == load_file(GOLDEN / case / "model.safetensors").keys()


def test_shards_equal_the_single_file(checkpoint: Path) -> None:
    whole = ParameterGenerator.from_pretrained(checkpoint)
    split(checkpoint)
    assert same(ParameterGenerator.from_pretrained(checkpoint), whole)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_precisions(stored: torch.dtype, dtype: torch.dtype, checkpoint: Path) -> None:
    whole = ParameterGenerator.from_pretrained(checkpoint)
    whole.save_pretrained(checkpoint, dtype=stored)
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    loaded = ParameterGenerator.from_pretrained(checkpoint, dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name].to(stored).to(dtype))
    assert loaded(torch.randn(1, 3, 12, dtype=dtype))["scale"].dtype == dtype


def test_released_checkpoint_is_checked_by_headers_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEFAULT))
    with torch.device("meta"):
        state = ParameterGenerator(GeneratorConfig.from_dict(DEFAULT)).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + 2 * tensor.numel()],
        }
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # 16 GB of hole, which takes no space
    index = check_checkpoint(tmp_path)
    assert len(index) == 779
    assert max(entry.offset + entry.length for entry in index.values()) == 8 + len(text) + end
    assert index["model.hw_pos.weight"].shape == (22064, 1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NORM), f"lack the tensor '{NORM}'"),
        (lambda state: state.update(more=torch.zeros(1)), "have the extra tensor 'more'"),
        (lambda state: state.update({NORM: torch.zeros(15)}), rf"'{NORM}' .* has the shape \[15\]\. \[16\]"),
        (
            lambda state: state.update({NORM: torch.zeros(16, dtype=torch.int32)}),
            f"'{NORM}' .* stored as I32",
        ),
    ],
)
def test_refuses_other_tensors(
    change: Callable[[dict[str, Tensor]], object], message: str, checkpoint: Path
) -> None:
    rewrite(checkpoint, change)
    for read in (check_checkpoint, ParameterGenerator.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            read(checkpoint)


def test_refuses_a_folder_that_is_none(checkpoint: Path) -> None:
    for path in (checkpoint / "no", checkpoint / "config.json"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            ParameterGenerator.from_pretrained(path)


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "config.json cannot be read"), ("model.safetensors", "has no weights")],
)
def test_refuses_a_missing_file(file: str, message: str, checkpoint: Path) -> None:
    (checkpoint / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        ParameterGenerator.from_pretrained(checkpoint)


def test_refuses_a_missing_shard(checkpoint: Path) -> None:
    split(checkpoint)
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors cannot be read"):
        ParameterGenerator.from_pretrained(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_refuses_a_truncated_file(keep: int, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ParameterGenerator.from_pretrained(checkpoint)


@pytest.mark.parametrize("experts", [1, 1 << 24])  # too many elements, a size beyond 64 bits
def test_refuses_weights_that_cannot_exist(experts: int, checkpoint: Path) -> None:
    huge = 1 << 24
    sizes = {"rank": huge, "d_model": huge, "token_dim": 1, "output_dim": 1, "dim_accumulation": 1}
    weights = {"w": {"lora_A_dim": huge, "lora_B_dim": huge}}
    mapping = {"q": {"type": "grouped", "num_experts": experts, "sub_weights": weights}}
    (checkpoint / "config.json").write_text(json.dumps(small(**sizes, pg_mapping=mapping)))
    with pytest.raises(CheckpointError, match="a weight that cannot exist"):
        check_checkpoint(checkpoint)


def test_saving_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        ParameterGenerator(GeneratorConfig.from_dict(small())).save_pretrained(tmp_path / "taken")
