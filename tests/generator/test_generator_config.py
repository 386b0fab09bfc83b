from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from generator_cases import DEFAULT, GOLDEN, configs, small
from hypothesis import given
from transformers import PretrainedConfig

from hywu_export.generator import GeneratorConfig
from hywu_export.generator.config import GroupedTarget, PlainTarget
from hywu_runtime.errors import CheckpointError

PLAIN = {"lora_A_dim": 4, "lora_B_dim": 4}


def grouped(**changes: Any) -> dict[str, Any]:
    return {"type": "grouped", "num_experts": 2, "sub_weights": {"w": PLAIN}, **changes}


def test_reads_a_saved_file() -> None:
    config = GeneratorConfig.from_file(GOLDEN / "moe" / "config.json")
    assert (config.d_model, config.rank, config.alpha, config.num_heads, config.scale) == (64, 4, 8, 4, 2.0)
    group = config.pg_mapping["mlp.experts"]
    assert isinstance(group, GroupedTarget)
    assert (group.num_experts, group.weights["w2"]) == (3, PlainTarget(32, 64))


@pytest.mark.parametrize("order", [["b", "a", "c"], ["c", "b", "a"], ["a", "b", "c"]])
def test_keeps_the_order_of_the_file(order: list[str], tmp_path: Path) -> None:
    mapping = {name: grouped(sub_weights=dict.fromkeys(order, PLAIN)) for name in order}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small(pg_mapping=mapping)))
    config = GeneratorConfig.from_file(path)
    assert list(config.pg_mapping) == order
    for group in config.pg_mapping.values():
        assert isinstance(group, GroupedTarget)
        assert list(group.weights) == order


@given(config=configs())
def test_round_trip(config: GeneratorConfig) -> None:
    again = GeneratorConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert list(again.pg_mapping) == list(config.pg_mapping)


def test_keys_that_saving_libraries_add_are_harmless() -> None:
    common = {**PretrainedConfig().to_dict(), "torch_dtype": "bfloat16", "model_type": "parameter_generator"}
    assert GeneratorConfig.from_dict({**DEFAULT, **common}) == GeneratorConfig.from_dict(DEFAULT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"d_modle": 64}, "unknown key d_modle"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": -4}, "rank is -4"),
        ({"rank": 4.0}, "rank is 4.0"),
        ({"rank": True}, "rank is True"),
        ({"rank": "4"}, "rank is '4'"),
        ({"token_dim": None}, "token_dim is None"),
        ({"input_dim": 1 << 40}, "input_dim is 1099511627776"),
        ({"num_pg_layers": 1_000_000}, "num_pg_layers is 1000000"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": 10**400}, "alpha is 1000"),
        ({"alpha": False}, "alpha is False"),
        ({"prefix": 3}, "prefix is 3"),
        ({"prefix": "\ud800"}, r"prefix is '\\ud800'"),
        ({"head_dim": 12}, "d_model is 16 and head_dim is 12"),
        ({"head_dim": 2}, "head_dim is 2"),
        ({"dim_accumulation": 3}, "d_model is 16 and dim_accumulation is 3"),
        ({"dim_accumulation": 8}, "rank is 4 and dim_accumulation is 8"),
        ({"output_dim": 16}, "output_dim is 16 and token_dim is 8"),
        ({"pg_mapping": {}}, "pg_mapping is {}"),
        ({"pg_mapping": ["q"]}, r"pg_mapping is \['q'\]"),
        ({"pg_mapping": {"": PLAIN}}, "pg_mapping has the name ''"),
        ({"pg_mapping": {"\n": PLAIN}}, r"pg_mapping has the name '\\n'"),
        ({"pg_mapping": {"q": 3}}, r"pg_mapping\['q'\] is 3"),
        ({"pg_mapping": {"q": {"lora_A_dim": 4}}}, r"pg_mapping\['q'\] lacks lora_B_dim"),
        ({"pg_mapping": {"q": {**PLAIN, "bias": 1}}}, r"pg_mapping\['q'\] has the unknown key bias"),
        ({"pg_mapping": {"q": {**PLAIN, "lora_A_dim": 0}}}, r"pg_mapping\['q'\].lora_A_dim is 0"),
        ({"pg_mapping": {"q": {**PLAIN, "type": "conv"}}}, r"pg_mapping\['q'\].type is 'conv'"),
        ({"pg_mapping": {"q": {"type": "grouped"}}}, r"pg_mapping\['q'\] lacks num_experts, sub_weights"),
        ({"pg_mapping": {"q": grouped(num_experts=0)}}, r"pg_mapping\['q'\].num_experts is 0"),
        ({"pg_mapping": {"q": grouped(sub_weights={})}}, r"pg_mapping\['q'\].sub_weights is {}"),
        ({"pg_mapping": {"q": grouped(sub_weights={"w": {}})}}, r"sub_weights\['w'\] lacks lora_A_dim"),
        ({"pg_mapping": {"q": grouped(), "q.w": PLAIN}}, "pg_mapping names 'q.w' twice"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here: .*{message}"):
        GeneratorConfig.from_dict(small(**changes), source="here")


@pytest.mark.parametrize("field", sorted(set(small())))
def test_refuses_a_missing_field(field: str) -> None:
    with pytest.raises(CheckpointError, match=f"lacks {field}"):
        GeneratorConfig.from_dict({key: value for key, value in small().items() if key != field})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"rank": 4', "not valid JSON"),
        (b"[1]", "JSON list"),
        (b'{"rank": 4, "rank": 8}', "'rank' occurs twice"),
        (b'{"pg_mapping": {"q": {}, "q": {}}}', "'q' occurs twice"),
        (b'{"prefix": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_refuses_a_damaged_file(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        GeneratorConfig.from_file(path)
    assert str(path) in str(caught.value)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        GeneratorConfig.from_file(tmp_path / "config.json")


def test_needs_no_torch() -> None:
    code = "import sys; from hywu_export.generator import GeneratorConfig, TokenLayout; "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
