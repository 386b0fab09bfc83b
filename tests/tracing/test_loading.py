"""Weights for modules without data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hywu_export.bundle.sources import SafetensorsIndex
from hywu_export.tracing import fake_module
from hywu_export.tracing.loading import with_weights
from hywu_runtime.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x))
        return result


def graph_module() -> nn.Module:
    return nn.ModuleDict({"part": fake_module(Tied)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stored", ["first.weight", "second.weight"])
def test_values_are_the_checkpoint_s(tmp_path: Path, dtype: torch.dtype, stored: str) -> None:
    torch.manual_seed(0)
    weight, *biases = torch.randn(3, 3), torch.randn(3), torch.randn(3)
    tensors = {stored: weight, "first.bias": biases[0], "second.bias": biases[1]}
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "w.safetensors")
    module = graph_module()
    before = dict(module.named_parameters())
    x = torch.randn(2, 3)
    with with_weights(module, {"part": SafetensorsIndex.from_file(tmp_path / "w.safetensors")}):
        got = module["part"](x)  # type: ignore[index]
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    w, a, b = (t.to(dtype).float() for t in (weight, *biases))
    torch.testing.assert_close(got, (x @ w.T + a) @ w.T + b)
    after = dict(module.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter and parameter.is_meta for name, parameter in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"first.bias": None}, "part.first.bias"), ({"first.bias": torch.zeros(4)}, r"\[4\]")],
)
def test_refused(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {"first.weight": torch.zeros(3, 3), "first.bias": torch.zeros(3), "second.bias": torch.zeros(3)}
    wanted = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    save_file(wanted, tmp_path / "w.safetensors")
    module = graph_module()
    index = SafetensorsIndex.from_file(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message), with_weights(module, {"part": index}):
        pass
    assert all(parameter.is_meta for parameter in module.parameters())
