from __future__ import annotations

from typing import Any

import pytest
from generator_cases import DEFAULT, GOLDEN, configs, small
from hypothesis import given

from hywu_export.generator import GeneratorConfig, TokenLayout


def layout(mapping: dict[str, Any], **changes: Any) -> TokenLayout:
    return TokenLayout(GeneratorConfig.from_dict(small(pg_mapping=mapping, **changes)))


def plain(in_features: int = 8, out_features: int = 8) -> dict[str, int]:
    return {"lora_A_dim": in_features, "lora_B_dim": out_features}


@pytest.mark.parametrize(("case", "t_a", "t_b"), [("dense", 4, 5), ("dense_unsorted", 4, 5), ("moe", 22, 21)])
def test_golden_token_counts(case: str, t_a: int, t_b: int) -> None:
    found = TokenLayout(GeneratorConfig.from_file(GOLDEN / case / "config.json"))
    assert (found.t_a, found.t_b) == (t_a, t_b)


def test_released_token_counts() -> None:
    found = TokenLayout(GeneratorConfig.from_dict(DEFAULT))
    assert (found.t_a, found.t_b, found.t, found.w, found.hw) == (719, 660, 1379, 4, 5516)
    assert sum(slot.size for slot in found.slots) == 22_593_536 == found.t * found.area  # no padding
    assert [slot.entry for slot in found.slots if slot.kind == "A"] == [
        *("mlp.experts.w1", "mlp.experts.w2", "mlp.experts.w3"),
        *("mlp.shared_mlp.down_proj", "mlp.shared_mlp.gate_and_up_proj"),
        *("self_attn.o_proj", "self_attn.qkv_proj"),
    ]
    assert found.slots[0].shape == (64, 16, 4096)
    assert found.slots[7].shape == (64, 3072, 16)


def test_padding_is_per_slot() -> None:
    # A token holds 4·8 = 32 numbers: A of 4·11 = 44 takes two, and the next slot starts at its own token.
    found = layout({"p": plain(11, 1), "q": plain(8, 9)})
    assert [(slot.key("m.", 3), slot.shape, slot.offset, slot.tokens) for slot in found.slots] == [
        ("m.3.p.lora_A", (4, 11), 0, 2),
        ("m.3.q.lora_A", (4, 8), 2, 1),
        ("m.3.p.lora_B", (1, 4), 0, 1),
        ("m.3.q.lora_B", (9, 4), 1, 2),
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["q", "o"], ["q", "o"]),
        (["o", "q"], ["o", "q"]),
        # A name goes where the first mapping name that it contains stands.
        (["proj", "q", "o_proj"], ["proj", "o_proj", "q"]),
        (["o_proj", "q", "proj"], ["o_proj", "q", "proj"]),
        (["x", "mlp.w2", "mlp", "w"], ["x", "mlp.w2", "mlp", "w"]),
        (["w", "x", "mlp.w", "mlp.x.w"], ["w", "mlp.w", "mlp.x.w", "x"]),
    ],
)
def test_order_when_names_contain_one_another(names: list[str], expected: list[str]) -> None:
    found = layout({name: plain() for name in names}, prefix="")
    assert [slot.entry for slot in found.slots] == expected * 2


def test_the_prefix_counts_as_part_of_a_name() -> None:
    found = layout({"q": plain(), "blocks": plain(), "o": plain()}, prefix="blocks.")
    # "blocks" is in every name, and so is the "o" of "blocks" and of "lora": only q comes before.
    assert [slot.entry for slot in found.slots if slot.kind == "A"] == ["q", "blocks", "o"]


def test_sub_weights_keep_their_order() -> None:
    weights = {"w10": plain(), "w1": plain(), "w2": plain()}
    found = layout({"z": plain(), "experts": {"type": "grouped", "num_experts": 2, "sub_weights": weights}})
    entries = ["z", "experts.w10", "experts.w1", "experts.w2"]
    assert [slot.entry for slot in found.slots] == entries * 2


@given(config=configs())
def test_slots_are_side_by_side(config: GeneratorConfig) -> None:
    found = TokenLayout(config)
    for kind, total in (("A", found.t_a), ("B", found.t_b)):
        end = 0
        for slot in (slot for slot in found.slots if slot.kind == kind):
            assert slot.offset == end
            assert (slot.tokens - 1) * found.area < slot.size <= slot.tokens * found.area
            end += slot.tokens
        assert end == total
    assert found.hw * config.dim_accumulation == found.t * config.rank
    assert [slot.kind for slot in found.slots] == sorted(slot.kind for slot in found.slots)
