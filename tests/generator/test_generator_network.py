from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from generator_cases import DEFAULT, GOLDEN, configs, naive_deltas, randomised, small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from hywu_export.generator import GeneratorConfig, ParameterGenerator
from hywu_export.generator.network import FoldedGenerator, grid_phases, rotary_phases
from hywu_runtime.errors import InputError

quick = settings(max_examples=25, deadline=None)


def largest_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    assert all(got[name].shape == expected[name].shape for name in expected)
    return max((got[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize(
    ("case", "weights"), [("dense", "dense"), ("dense_unsorted", "dense"), ("moe", "moe")]
)  # dense_unsorted has the weights and the condition of dense, and another order of targets
def test_golden(case: str, weights: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / case / "config.json", tmp_path)
    shutil.copy(GOLDEN / weights / "model.safetensors", tmp_path)
    generator = ParameterGenerator.from_pretrained(tmp_path)
    condition = load_file(GOLDEN / weights / "inputs.safetensors")["condition"]
    expected = load_file(GOLDEN / case / "outputs.safetensors")
    assert largest_difference(generator(condition), expected) <= 2e-5


def test_padding_of_a_condition_is_not_seen() -> None:
    generator = ParameterGenerator.from_pretrained(GOLDEN / "moe")
    condition = load_file(GOLDEN / "moe" / "inputs.safetensors")["condition"]
    padded = torch.cat([condition, 9 * torch.ones_like(condition[:, :3])], dim=1)
    mask = torch.arange(padded.shape[1])[None] < condition.shape[1]
    expected = generator.deltas(condition)
    assert largest_difference(generator.deltas(padded, mask), expected) <= 1e-5
    assert largest_difference(generator.deltas(padded), expected) > 1e-2


def test_order_of_the_file_decides() -> None:
    sorted_order, other_order = (
        load_file(GOLDEN / case / "outputs.safetensors") for case in ("dense", "dense_unsorted")
    )
    assert largest_difference(other_order, sorted_order) > 0.1  # or the golden cases could not tell


def test_rotary_tables() -> None:
    data = load_file(GOLDEN / "rope_tables" / "data.safetensors")
    dims = json.loads((GOLDEN / "rope_tables" / "meta.json").read_text())["dims"]
    head_dim, tokens, width, layers, length = (dims[key] for key in ("head_dim", "T", "W=R/a", "N", "L"))
    key = rotary_phases(torch.arange(length) + max(tokens, width), head_dim // 2)
    tables = {
        "n": rotary_phases(torch.arange(layers), head_dim),
        "hw": grid_phases(torch.arange(tokens), torch.arange(width), head_dim),
        "cross_q": grid_phases(torch.arange(layers), torch.arange(tokens * width), head_dim),
        "cross_kv": torch.cat([key, key], dim=-1),
    }
    for name, table in tables.items():
        phases = table[data[f"rows.{name}"]]
        cos, sin = phases.cos(), phases.sin()
        matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
        torch.testing.assert_close(matrices, data[f"fp32.{name}"], rtol=0, atol=1e-6)


@quick
@given(config=configs(), length=st.integers(1, 5), seed=st.integers(0, 3))
def test_equals_the_formulas_term_by_term(config: GeneratorConfig, length: int, seed: int) -> None:
    generator = randomised(config, seed).double()
    condition = torch.randn(1, length, config.input_dim, dtype=torch.float64)
    got, expected = generator(condition), naive_deltas(generator, condition[0].numpy())
    assert got.pop("scale").item() == config.alpha / config.rank
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        # Rotary tables are float32 in the network.
        np.testing.assert_allclose(
            tensor[0].detach().numpy(), expected[name], atol=2e-4, rtol=2e-4, err_msg=name
        )


@quick
@given(config=configs(), batch=st.integers(2, 4), length=st.integers(1, 6))
def test_a_sample_does_not_depend_on_its_neighbours(config: GeneratorConfig, batch: int, length: int) -> None:
    generator = randomised(config)
    condition = torch.randn(batch, length, config.input_dim)
    together = generator.deltas(condition)
    for index in range(batch):
        alone = generator.deltas(condition[index : index + 1])
        assert (
            largest_difference({name: tensor[index : index + 1] for name, tensor in together.items()}, alone)
            < 1e-4
        )


@quick
@given(config=configs(), batch=st.integers(1, 3))
def test_folding_changes_nothing(config: GeneratorConfig, batch: int) -> None:
    generator = randomised(config)
    folded = generator.fold_condition_independent()
    assert isinstance(folded, FoldedGenerator)
    assert folded.state_dict().keys() == generator.state_dict().keys()
    condition = torch.randn(batch, 3, config.input_dim)
    # Several samples are larger products, which may be summed in another order.
    most = 0 if batch == 1 else 1e-4
    assert largest_difference(folded(condition), generator(condition)) <= most
    assert largest_difference(folded.deltas(condition), generator.deltas(condition)) <= most


def test_folding_respects_the_budget() -> None:
    generator = randomised(GeneratorConfig.from_dict(small()))
    size = 2 * generator.layout.hw * 16 * 4
    assert generator.fold_condition_independent(size - 1) is generator
    folded = generator.fold_condition_independent(size)
    assert isinstance(folded, FoldedGenerator)
    assert folded.tokens.numel() * 4 == size


def test_deltas_have_the_scale_in_b() -> None:
    generator = randomised(GeneratorConfig.from_dict(small(alpha=3)))
    condition = torch.randn(2, 4, 12)
    outputs, deltas = generator(condition), generator.deltas(condition)
    scale = outputs.pop("scale")
    scaled = {name: tensor * scale if name.endswith("lora_B") else tensor for name, tensor in outputs.items()}
    assert scale.item() == 0.75
    assert largest_difference(deltas, scaled) < 1e-5


def test_condition_with_a_sequence_axis() -> None:
    generator = randomised(GeneratorConfig.from_dict(small()))
    condition = torch.randn(2, 1, 12)
    assert largest_difference(generator(condition[:, None]), generator(condition)) == 0


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 11), (2, 2, 3, 12), (1, 1, 2, 3, 12)])
def test_condition_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\[batch, length, 12\]"):
        ParameterGenerator(GeneratorConfig.from_dict(small()))(torch.zeros(shape))


def test_every_parameter_gets_a_gradient() -> None:
    generator = randomised(GeneratorConfig.from_dict(small(num_pg_layers=2)))
    sum(tensor.square().sum() for tensor in generator(torch.randn(2, 5, 12)).values()).backward()
    without = [
        name for name, p in generator.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not without
    assert all(p.grad.abs().max() > 0 for name, p in generator.named_parameters())


def test_a_fresh_generator_leaves_the_base_as_it_is() -> None:
    deltas = ParameterGenerator(GeneratorConfig.from_dict(small())).deltas(torch.randn(1, 2, 12))
    assert all((tensor == 0).all() for name, tensor in deltas.items() if name.endswith("lora_B"))
    assert all((tensor != 0).any() for name, tensor in deltas.items() if name.endswith("lora_A"))


def test_released_size() -> None:
    with torch.device("meta"):
        generator = ParameterGenerator(GeneratorConfig.from_dict(DEFAULT))
    assert sum(parameter.numel() for parameter in generator.parameters()) == 8_096_647_168
    assert len(generator.state_dict()) == 779


@pytest.mark.parametrize("folded", [False, True])
def test_exports_with_dynamic_batch_and_length(folded: bool) -> None:
    class Deltas(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = randomised(GeneratorConfig.from_dict(small()))
            self.generator = whole.fold_condition_independent() if folded else whole

        def forward(self, condition: Tensor) -> dict[str, Tensor]:
            return self.generator.deltas(condition)

    module = Deltas().eval()
    axes = {0: torch.export.Dim("batch", max=16), 1: torch.export.Dim("length", max=4096)}
    program = torch.export.export(
        module, (torch.randn(2, 3, 12),), dynamic_shapes={"condition": axes}, strict=False
    )
    assert not any(
        isinstance(value, Tensor) and value.is_complex()
        for node in program.graph.nodes
        for value in [node.meta.get("val")]
    )
    exported = program.module()
    for batch, length in ((1, 1), (1, 9), (5, 2)):
        condition = torch.randn(batch, length, 12)
        assert largest_difference(exported(condition), module(condition)) < 1e-6
