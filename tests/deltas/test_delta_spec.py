"""Delta specifications: from manifests, generators and patterns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import nn

from hywu_export.deltas import DeltaSpec, DeltaTarget, generator_paths
from hywu_runtime.errors import CheckpointError, DeltaError, UnsupportedError

LINEAR = DeltaTarget("a.to_q", "linear", 6, 4, 3)
CONV = DeltaTarget("b.conv", "conv", 5, 7, 2, (3, 1))


def test_tensors_and_manifest() -> None:
    spec = DeltaSpec((LINEAR, CONV))
    assert spec.tensors() == {
        "a.to_q.lora_A": (3, 6),
        "a.to_q.lora_B": (4, 3),
        "b.conv.lora_A": (2, 5, 3, 1),
        "b.conv.lora_B": (7, 2),
    }
    manifest = spec.to_manifest()
    assert manifest == {
        "rank": 3,
        "gate": "gate",
        "axis": "delta_batch",
        "targets": [
            {"module": "a.to_q", "kind": "linear", "in": 6, "out": 4, "rank": 3},
            {"module": "b.conv", "kind": "conv", "in": 5, "out": 7, "rank": 2, "kernel": [3, 1]},
        ],
    }
    assert DeltaSpec.from_manifest(json.loads(json.dumps(manifest))) == spec
    assert DeltaSpec(()).rank == 0


def test_one_by_one_convolutions_keep_their_kernel() -> None:
    assert DeltaTarget("c", "conv", 5, 7, 2).tensors() == {"c.lora_A": (2, 5, 1, 1), "c.lora_B": (7, 2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m", "embedding", 1, 1, 1), "kind 'embedding'"),
        (("m", "linear", 4, 4, 0), "rank 0"),
        (("m", "conv", 4, 4, 1, (3, 0)), r"kernel \(3, 0\)"),
        (("m", "linear", 4, 4, 1, (3, 3)), r"kernel \(3, 3\)"),
    ],
)
def test_impossible_targets(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(DeltaError, match=message):
        DeltaTarget(*arguments)  # type: ignore[arg-type]


def test_a_module_is_a_target_once() -> None:
    with pytest.raises(DeltaError, match=r"'a.to_q' is a delta target twice"):
        DeltaSpec((LINEAR, LINEAR))


def test_the_specification_needs_no_torch() -> None:
    code = "import sys; from hywu_export.deltas import DeltaSpec, load_lora; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@dataclass(frozen=True)
class Sizes:
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Config:
    pg_mapping: Mapping[str, object] = field(default_factory=lambda: {"q": Sizes(6, 4), "conv": Sizes(18, 5)})
    rank: int = 4
    prefix: str = "blocks."
    num_base_model_layers: int = 2


def base() -> nn.Module:
    block = lambda: nn.ModuleDict({"q": nn.Linear(6, 4), "conv": nn.Conv2d(2, 5, 3), "norm": nn.LayerNorm(4)})  # noqa: E731
    return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "other": nn.Linear(6, 4)})


NAMES = ["blocks.0.q", "blocks.0.conv", "blocks.1.q", "blocks.1.conv"]


def test_from_generator_by_the_same_names() -> None:
    spec = DeltaSpec.from_generator(Config(), None, base())
    assert [target.module for target in spec.targets] == NAMES
    assert spec.targets[0] == DeltaTarget("blocks.0.q", "linear", 6, 4, 4)
    assert spec.targets[3] == DeltaTarget("blocks.1.conv", "conv", 2, 5, 4, (3, 3))


def test_from_generator_by_a_mapping(tmp_path: Path) -> None:
    mapping = {**{name: name for name in reversed(NAMES)}, "blocks.1.q": "other"}
    path = tmp_path / "targets.json"
    path.write_text(json.dumps(mapping))
    spec = DeltaSpec.from_generator(Config(), path, base())
    assert [target.module for target in spec.targets] == [
        "blocks.0.q",
        "blocks.0.conv",
        "other",
        "blocks.1.conv",
    ]
    assert DeltaSpec.from_generator(Config(), mapping, base()) == spec
    assert generator_paths(Config(), path)["blocks.1.q"] == "other"


def test_a_real_configuration_serves() -> None:
    from hywu_export.generator.config import GeneratorConfig

    sizes = {
        "token_dim": 16,
        "rank": 4,
        "alpha": 4,
        "input_dim": 16,
        "dim_accumulation": 2,
        "d_model": 16,
        "head_dim": 8,
        "num_base_model_layers": 2,
        "output_dim": 16,
        "num_pg_layers": 1,
        "prefix": "blocks.",
    }
    plain = {"q": {"lora_A_dim": 6, "lora_B_dim": 4}}
    spec = DeltaSpec.from_generator(GeneratorConfig.from_dict({**sizes, "pg_mapping": plain}), None, base())
    assert [target.module for target in spec.targets] == ["blocks.0.q", "blocks.1.q"]
    experts = {"experts": {"type": "grouped", "num_experts": 2, "sub_weights": {"w1": plain["q"]}}}
    config = GeneratorConfig.from_dict({**sizes, "pg_mapping": {**plain, **experts}})
    with pytest.raises(CheckpointError, match=r"no module 'blocks.0.experts.w1'"):
        DeltaSpec.from_generator(config, None, base())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.k": "other"}, "maps 'blocks.0.k', which the generator does not make.*'blocks.0.q'"),
        ({"blocks.1.q": "blocks.0.q"}, "both 'blocks.0.q' and 'blocks.1.q' to 'blocks.0.q'"),
        ({"blocks.1.q": None}, "maps 'blocks.1.q' to None"),
        ({"blocks.1.q": "blocks.2.q"}, "no module 'blocks.2.q'.*'blocks.[01].q'"),
        ({"blocks.1.conv": "other"}, "'other' .* is a linear layer 6 -> 4, but .* 18 -> 5 .*'blocks.1.conv'"),
    ],
)
def test_mappings_that_do_not_fit(change: dict[str, str | None], message: str) -> None:
    mapping = {**{name: name for name in NAMES}, **change}
    with pytest.raises(CheckpointError, match=message):
        DeltaSpec.from_generator(Config(), mapping, base())  # type: ignore[arg-type]


def test_every_generated_name_is_mapped() -> None:
    with pytest.raises(CheckpointError, match=r"does not map 'blocks.1.conv'"):
        generator_paths(Config(), {name: name for name in NAMES[:3]})


@pytest.mark.parametrize("text", ['{"a": ', '["a"]', '{"blocks.0.q": "x", "blocks.0.q": "y"}', ""])
def test_damaged_target_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "targets.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"targets\.json"):
        generator_paths(Config(), path)


def test_a_generator_target_of_an_unsupported_type() -> None:
    with pytest.raises(UnsupportedError, match=r"'blocks.0.norm' is a LayerNorm"):
        DeltaSpec.from_generator(Config({"norm": Sizes(4, 4)}), None, base())


@pytest.mark.parametrize(
    ("patterns", "modules"),
    [
        (["q"], ["blocks.0.q", "blocks.1.q"]),
        (["blocks.1.q"], ["blocks.1.q"]),
        (["1.conv", "0.q"], ["blocks.0.q", "blocks.1.conv"]),
        (["blocks.?.conv"], ["blocks.0.conv", "blocks.1.conv"]),
        (["blocks.0*"], ["blocks.0.q", "blocks.0.conv"]),
        (["*"], [*NAMES, "other"]),
    ],
)
def test_patterns(patterns: list[str], modules: list[str]) -> None:
    spec = DeltaSpec.from_patterns(base(), patterns, 8)
    assert [target.module for target in spec.targets] == modules
    assert {target.rank for target in spec.targets} == {8}


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("qq", CheckpointError, "pattern 'qq' matches no module"),
        ("locks.0.q", CheckpointError, "matches no module.*'blocks.0.q'"),
        ("blocks.1.norm", UnsupportedError, "'blocks.1.norm' is a LayerNorm"),
        ("blocks.1", UnsupportedError, "'blocks.1' is a ModuleDict"),
        ("norm", UnsupportedError, "'blocks.0.norm' is a LayerNorm"),
    ],
)
def test_patterns_without_effect(pattern: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeltaSpec.from_patterns(base(), ["other", pattern], 8)
