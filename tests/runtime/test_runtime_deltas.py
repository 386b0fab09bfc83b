"""Delta sets in memory, in files and combined."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hywu_runtime import Deltas
from hywu_runtime.errors import DeltaError, InputError
from hywu_runtime.manifest import DeltaSpec, DeltaTarget

SPEC = DeltaSpec(
    4,
    "gate",
    "delta_batch",
    (DeltaTarget("block.to_q", "linear", 6, 5, 4), DeltaTarget("block.conv", "conv", 3, 2, 2, (3, 1))),
)


def random(seed: int = 0, rank: int = 4, batch: int = 1) -> Deltas:
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for target in SPEC.targets:
        for name, shape in target.shapes(min(rank, target.rank)).items():
            tensors[name] = rng.standard_normal((batch, *shape)).astype(np.float32)
    return Deltas(tensors)


def product(deltas: Deltas, module: str) -> np.ndarray:
    """The weight change B·A of each sample, [D, out, in·kh·kw]."""
    a = deltas[f"{module}.lora_A"]
    return np.asarray(deltas[f"{module}.lora_B"] @ a.reshape(*a.shape[:2], -1))


def test_names_and_shapes() -> None:
    assert SPEC.tensors == {
        "block.to_q.lora_A": (4, 6),
        "block.to_q.lora_B": (5, 4),
        "block.conv.lora_A": (2, 3, 3, 1),
        "block.conv.lora_B": (2, 2),
    }
    experts = DeltaTarget("mlp.experts.w1", "experts", 6, 5, 4, experts=3)
    assert experts.shapes() == {"mlp.experts.w1.lora_A": (3, 4, 6), "mlp.experts.w1.lora_B": (3, 5, 4)}
    random().check(SPEC, 7)
    assert (random().rank, random(batch=3).batch) == (4, 3)


def test_save_and_load(tmp_path: Path) -> None:
    deltas = random(batch=2)
    deltas.save(tmp_path / "a.safetensors")
    Deltas(dict(reversed(list(deltas.items())))).save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = Deltas.load(tmp_path / "a.safetensors")
    assert set(again) == set(deltas)
    for name in deltas:
        np.testing.assert_array_equal(again[name], deltas[name])
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stored_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: torch.from_numpy(tensor.copy()).to(dtype) for name, tensor in random().items()}
    save_file(tensors, tmp_path / "d.safetensors", {"hywu.deltas": "1"})
    for name, tensor in Deltas.load(tmp_path / "d.safetensors").items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, tensors[name].float().numpy())


def test_files_that_are_no_deltas(tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(tensor.copy()) for name, tensor in random().items()}
    save_file(tensors, tmp_path / "no_mark.safetensors")
    save_file(
        {"x.lora_A": torch.ones(1, 2, 3, dtype=torch.int32)},
        tmp_path / "int.safetensors",
        {"hywu.deltas": "1"},
    )
    save_file({"x.weight": torch.ones(1, 2, 3)}, tmp_path / "name.safetensors", {"hywu.deltas": "1"})
    nine = {"x.lora_A": torch.ones([1] * 9)}
    many = {"x.lora_A": torch.ones([1] * 64)}
    for name, value in (("nine", nine), ("many", many)):
        save_file(value, tmp_path / f"{name}.safetensors", {"hywu.deltas": "1"})
    random().save(tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_bytes(b"not a safetensors file at all")
    for name in ("no_mark", "int", "name", "nine", "many", "cut", "empty", "text", "ghost"):
        with pytest.raises(DeltaError):
            Deltas.load(tmp_path / f"{name}.safetensors")
    for i in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[i] ^= 0x20
        (tmp_path / "flipped.safetensors").write_bytes(flipped)
        with contextlib.suppress(DeltaError):
            Deltas.load(tmp_path / "flipped.safetensors").check(SPEC, 1)


def test_saving_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        random().save(tmp_path / "ghost" / "d.safetensors")
    (tmp_path / "dir").mkdir()
    with pytest.raises(InputError):
        random().save(tmp_path / "dir")
    assert os.listdir(tmp_path) == ["dir"]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2), st.floats(-3, 3)), min_size=1, max_size=3), st.sampled_from([1, 3])
)
def test_blend_is_the_weighted_sum(parts: list[tuple[int, float]], batch: int) -> None:
    sets = [(random(i, rank, batch if i == 0 else 1), weight) for i, (rank, weight) in enumerate(parts)]
    blended = Deltas.blend(sets, max_rank=6)
    assert blended.rank == sum(rank for rank, _ in parts)
    for target in SPEC.targets:
        expected = sum(np.float32(weight) * product(deltas, target.module) for deltas, weight in sets)
        np.testing.assert_allclose(product(blended, target.module), expected, atol=1e-4)


def test_blends_that_cannot_be() -> None:
    for parts, match in (
        ([(random(), 1.0), (random(1), 1.0)], "rank 8"),
        ([], "nothing"),
        ([(random(), float("nan"))], "nan"),
        ([(random(rank=1, batch=2), 1.0), (random(rank=1, batch=3), 1.0)], "samples"),
        ([(random(rank=1), 1.0), (Deltas({"x.lora_A": np.ones((1, 1, 2))}), 1.0)], "extra"),
    ):
        with pytest.raises(DeltaError, match=match):
            Deltas.blend(parts, max_rank=4)
    other = Deltas({name: np.ones((*tensor.shape, 1)) for name, tensor in random(rank=1).items()})
    with pytest.raises(DeltaError, match="shape"):
        Deltas.blend([(random(rank=1), 1.0), (other, 1.0)])
    with pytest.raises(DeltaError, match="shape"):
        Deltas.stack([random(rank=1), other])


def test_tensors_of_one_set_for_different_numbers_of_samples() -> None:
    tensors = dict(random(rank=1, batch=4))
    tensors["block.to_q.lora_A"] = tensors["block.to_q.lora_A"][:2]
    mixed = Deltas(tensors)
    with pytest.raises(DeltaError, match="shape"):
        Deltas.blend([(mixed, 1.0)])
    with pytest.raises(DeltaError, match="one D"):
        mixed.select(3)
    with pytest.raises(DeltaError, match=r"\[2, 4\] samples"):
        mixed.pad(SPEC).check(SPEC)


def test_padding_changes_nothing() -> None:
    small = random(rank=1)
    padded = small.pad(SPEC)
    padded.check(SPEC, 1)
    for target in SPEC.targets:
        np.testing.assert_array_equal(product(padded, target.module), product(small, target.module))


def test_stack_and_select() -> None:
    sets = [random(i, rank) for i, rank in enumerate((4, 1, 2))]
    stacked = Deltas.stack(sets)
    stacked.check(SPEC, 3)
    for i, deltas in enumerate(sets):
        for target in SPEC.targets:
            np.testing.assert_array_equal(
                product(stacked.select(i), target.module), product(deltas, target.module)
            )
    for bad in ([], [stacked]):
        with pytest.raises(DeltaError):
            Deltas.stack(bad)
    for sample in (-1, 3):
        with pytest.raises(DeltaError):
            stacked.select(sample)


def test_deltas_of_another_model_are_named() -> None:
    other = {name.replace("block", "blocks.0"): tensor for name, tensor in random().items()}
    with pytest.raises(DeltaError) as caught:
        Deltas(other).check(SPEC)
    assert "of which 0 are there" in str(caught.value)
    assert "nearest" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("weight", np.ones((1, 2, 3)), "called"),
        ("x.lora_A", np.ones((1, 2, 3), np.int64), "int64"),
        ("x.lora_A", np.ones((2, 3)), "shape"),
        ("x.lora_A", np.ones((1, 0, 3)), "shape"),
        (5, np.ones((1, 2, 3)), "called"),
        ("x.lora_A", "abc", "dtype"),
    ],
)
def test_malformed_tensors(name: Any, tensor: Any, match: str) -> None:
    with pytest.raises(DeltaError, match=match):
        Deltas({name: tensor})


def test_sets_of_experts() -> None:
    """The rank's axis comes after that of the experts."""
    rng = np.random.default_rng(0)

    def experts(rank: int) -> Deltas:
        return Deltas(
            {
                "mlp.lora_A": rng.standard_normal((1, 3, rank, 6)).astype(np.float32),
                "mlp.lora_B": rng.standard_normal((1, 3, 5, rank)).astype(np.float32),
            }
        )

    first, second = experts(2), experts(4)
    assert (first.rank, second.rank) == (2, 4)
    blend = Deltas.blend([(first, 0.5), (second, -2.0)], 6)
    products = [deltas["mlp.lora_B"] @ deltas["mlp.lora_A"] for deltas in (first, second, blend)]
    np.testing.assert_allclose(products[2], 0.5 * products[0] - 2 * products[1], rtol=0, atol=1e-5)
    stacked = Deltas.stack([first, second])
    assert stacked["mlp.lora_A"].shape == (2, 3, 4, 6)
    for i, expected in enumerate(products[:2]):
        one = stacked.select(i)
        np.testing.assert_allclose(one["mlp.lora_B"] @ one["mlp.lora_A"], expected, rtol=0, atol=1e-6)
