"""Layouts of hypernetworks against the matrices that they are made from, in NumPy and in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hywu_export.deltas import DeltaSpec, DeltaTarget, Layout, Pair, flatten
from hywu_export.deltas.layouts import fuse, split_rows, stack_rows
from hywu_runtime.errors import DeltaError

sizes = st.integers(1, 4)


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Small integers: sums and products are exact in any order."""
    return rng.integers(-8, 9, shape).astype(np.float32)


def either(layout: Layout, outputs: dict[str, np.ndarray], **how: Any) -> dict[str, np.ndarray]:
    """What the layout makes of NumPy arrays, after a comparison with what it makes of torch tensors."""
    made = layout.deltas(outputs, **how)
    tensors = layout.deltas({name: torch.from_numpy(a) for name, a in outputs.items()}, **how)
    assert list(made) == list(tensors)
    for name, array in made.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, tensors[name].numpy())
    return made


@given(
    st.permutations(["batch", "layer", "rank", "in"]),
    st.permutations(["batch", "layer", "out", "rank"]),
    st.tuples(sizes, sizes, sizes, sizes, sizes),
    st.integers(0, 2**32 - 1),
)
def test_every_order_of_the_axes(
    a_axes: list[str], b_axes: list[str], dims: tuple[int, int, int, int, int], seed: int
) -> None:
    batch, layers, rank, width, out = dims
    size = dict(zip(("batch", "layer", "rank", "in", "out"), dims))
    rng = np.random.default_rng(seed)
    a, b = numbers(rng, *(size[n] for n in a_axes)), numbers(rng, *(size[n] for n in b_axes))
    pair = Pair("a", "b", "layers.{layer}.q", " ".join(a_axes), " ".join(b_axes), scale=0.5)
    made = either(Layout([pair]), {"a": a, "b": b})
    letters = {"batch": "b", "layer": "l", "rank": "r", "in": "i", "out": "o"}
    sides = ["".join(letters[n] for n in axes) for axes in (a_axes, b_axes)]
    whole = np.einsum(f"{sides[0]},{sides[1]}->lboi", a, b)  # B A of every layer and sample
    for layer in range(layers):
        got_a, got_b = (made[f"layers.{layer}.q.lora_{side}"] for side in "AB")
        assert got_a.shape == (batch, rank, width)
        assert got_b.shape == (batch, out, rank)
        assert np.array_equal(got_b @ got_a, 0.5 * whole[layer])


@given(
    st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3), sizes, sizes, sizes, st.integers(0, 2**32 - 1)
)
def test_slices_of_a_fused_projection(
    parts: list[tuple[int, int]], batch: int, width: int, groups: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pairs = [
        (numbers(rng, batch, rank, width), numbers(rng, batch, groups * rows, rank)) for rank, rows in parts
    ]
    a, b = fuse(pairs, groups)
    assert a.shape[1] == sum(rank for rank, _ in parts)
    wanted = [one_b @ one_a for one_a, one_b in pairs]
    # The rows of the fused product, group by group.
    rows = [
        product[:, group * (product.shape[1] // groups) : (group + 1) * (product.shape[1] // groups)]
        for group in range(groups)
        for product in wanted
    ]
    assert np.array_equal(b @ a, np.concatenate(rows, 1))
    first = [b for (_, b), (rank, _) in zip(pairs, parts) if rank == parts[0][0]]
    back = split_rows(stack_rows(first, groups), [b.shape[1] for b in first], groups)
    assert all(np.array_equal(x, y) for x, y in zip(back, first, strict=True))


def test_fused_in_the_base_separate_in_the_generator() -> None:
    rng = np.random.default_rng(0)
    outputs = {
        name: numbers(rng, 2, 3, *shape)  # batch, layer
        for name, shape in {
            "q.A": (5, 4), "q.B": (8, 4), "k.A": (5, 4), "k.B": (6, 4), "v.A": (5, 4), "v.B": (6, 4),
        }.items()
    }  # fmt: skip
    pair = Pair(
        ("q.A", "k.A", "v.A"), ("q.B", "k.B", "v.B"), "blocks.{layer}.qkv",
        a_axes="batch layer in rank", b_axes="batch layer out rank", layers=(4, 7, 9), groups=2,
    )  # fmt: skip
    made = either(Layout([pair]), outputs)
    assert [name for name in made if name.endswith("A")] == [f"blocks.{n}.qkv.lora_A" for n in (4, 7, 9)]
    product = made["blocks.7.qkv.lora_B"] @ made["blocks.7.qkv.lora_A"]
    q, k, v = (outputs[f"{n}.B"][:, 1] @ outputs[f"{n}.A"][:, 1].transpose(0, 2, 1) for n in "qkv")
    wanted = [q[:, :4], k[:, :3], v[:, :3], q[:, 4:], k[:, 3:], v[:, 3:]]
    assert np.array_equal(product, np.concatenate(wanted, 1))


def test_an_axis_of_slices_with_one_a() -> None:
    rng = np.random.default_rng(1)
    outputs = {"a": numbers(rng, 2, 3, 5), "b": numbers(rng, 2, 3, 4, 3)}
    pair = Pair("a", "b", "qkv", b_axes="batch slice out rank")
    made = either(Layout([pair]), outputs)
    assert made["qkv.lora_A"].shape == (2, 3, 5)  # the rank is not multiplied: the slices share A
    assert np.array_equal(made["qkv.lora_B"], outputs["b"].reshape(2, 12, 3))


def test_separate_in_the_base_fused_in_the_generator() -> None:
    rng = np.random.default_rng(2)
    outputs = {"a": numbers(rng, 3, 2, 5), "b": numbers(rng, 3, 10, 2)}
    layout = Layout([Pair("a", "b", ("q", "k", "v"))])
    made = either(layout, outputs, out_features={"q": 6, "k": 2, "v": 2})
    joined = np.concatenate([made[f"{n}.lora_B"] @ made[f"{n}.lora_A"] for n in "qkv"], 1)
    assert np.array_equal(joined, outputs["b"] @ outputs["a"])
    with pytest.raises(DeltaError, match="not known"):
        layout.deltas(outputs)
    with pytest.raises(DeltaError, match="10 rows"):
        layout.deltas(outputs, out_features={"q": 6, "k": 2, "v": 1})


def test_scales_of_layers_and_samples() -> None:
    rng = np.random.default_rng(3)
    outputs = {"a": numbers(rng, 2, 1, 4), "b": numbers(rng, 2, 3, 1), "alpha": numbers(rng, 5, 2)}
    pair = Pair("a", "b", "m.{layer}", scale="alpha", scale_axes="layer batch")
    made = either(Layout([pair]), outputs)  # one A and B for all five layers, which differ in scale
    for layer in range(5):
        assert np.array_equal(made[f"m.{layer}.lora_A"], outputs["a"])
        assert np.array_equal(
            made[f"m.{layer}.lora_B"], outputs["b"] * outputs["alpha"][layer][:, None, None]
        )


def test_ranks_are_padded_and_kernels_unfolded() -> None:
    rng = np.random.default_rng(4)
    spec = DeltaSpec((DeltaTarget("conv", "conv", 3, 4, 5, (2, 2)), DeltaTarget("lin", "linear", 3, 4, 2)))
    outputs = {
        "0.0": numbers(rng, 2, 12), "0.1": numbers(rng, 4, 2),
        "1.0": numbers(rng, 1, 3, 2), "1.1": numbers(rng, 1, 4, 2),
    }  # fmt: skip
    layout = Layout([
        Pair("1.0", "1.1", "lin", a_axes="batch in rank"),
        Pair("0.0", "0.1", "conv", a_axes="rank in", b_axes="out rank"),
    ])  # fmt: skip
    made = either(layout, outputs, spec=spec)
    assert {name: a.shape for name, a in made.items()} == {n: (1, *s) for n, s in spec.tensors().items()}
    assert list(made) == list(spec.tensors())
    product = np.einsum("dor,drikl->doikl", made["conv.lora_B"], made["conv.lora_A"])
    assert np.array_equal(product[0].reshape(4, 12), outputs["0.1"] @ outputs["0.0"])
    assert not made["conv.lora_A"][:, 2:].any()
    named = Layout([Pair("a", "b", "conv", a_axes="in kh kw rank", b_axes="rank out")])
    as_named = {"a": outputs["0.0"].T.reshape(3, 2, 2, 2), "b": outputs["0.1"].T}
    alone = either(named, as_named, spec=DeltaSpec(spec.targets[:1]))
    assert all(np.array_equal(alone[name], made[name]) for name in alone)


def test_names_of_nested_outputs() -> None:
    assert flatten({"q": {"A": 1, "B": 2}, "more": [(3, 4), None]}) == {
        "q.A": 1, "q.B": 2, "more.0.0": 3, "more.0.1": 4,
    }  # fmt: skip
    assert flatten(5) == {"output": 5}
    assert flatten(None) == {}


A, B = np.zeros((2, 3, 4), np.float32), np.zeros((2, 5, 3), np.float32)
SPEC = DeltaSpec((DeltaTarget("q", "linear", 4, 5, 3),))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([Pair("c", "b", "q")], "no tensor 'c'"),
        ([Pair("a", "b", "q", a_axes="rank in")], "Expected the 2 axes"),
        ([Pair("a", "b", "q", a_axes="batch in rank")], "Check the axes"),
        ([Pair("a", "b", "k")], "'k', which takes none"),
        ([Pair("a", "b", "q"), Pair("a", "b", "q")], "twice"),
        ([Pair("a", "b", "q", a_axes="layer rank in", b_axes="layer out rank")], "{layer}"),
        ([], "no delta for the target 'q'"),
    ],
)
def test_what_does_not_fit_is_refused(pairs: list[Pair], message: str) -> None:
    with pytest.raises(DeltaError, match=message):
        Layout(pairs).deltas({"a": A, "b": B}, SPEC)


@pytest.mark.parametrize(
    "axes", [{"a_axes": "batch rank"}, {"b_axes": "batch out rank rank"}, {"a_axes": "batch rank in heads"},
             {"a_axes": "rank kh kw in"}, {"scale_axes": "out"}, {"groups": 0}],
)  # fmt: skip
def test_axes_that_cannot_be(axes: dict[str, Any]) -> None:
    with pytest.raises(DeltaError):
        Pair("a", "b", "q", **axes)
