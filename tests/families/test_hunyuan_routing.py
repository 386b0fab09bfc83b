"""Experts gathered by token: the same as every expert on every token, in torch and in ONNX Runtime."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families.hunyuan.experts import Experts, Router
from hywu_export.families.hunyuan.routing import BLOCK, PIECES, block_size, group
from hywu_export.passes import check
from hywu_export.passes.half import Half, emulate, to_half
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, trace

EXPERTS, TOP, HIDDEN, WIDTH, RANK = 6, 2, 16, 24, 2


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 400),
    st.integers(1, 12),
    st.integers(1, 40),
    st.booleans(),
    st.randoms(use_true_random=False),
    st.data(),
)
def test_every_pair_has_a_slot_of_its_expert(
    batch: int, n: int, experts: int, block: int, crowded: bool, random: object, data: st.DataObject
) -> None:
    """For routers that spread the tokens, and for those that send all to the same experts."""
    k = data.draw(st.integers(1, experts))
    seed = data.draw(st.integers(0, 2**32 - 1))
    scores = np.random.default_rng(seed).random((batch, 1 if crowded else n, experts))
    chosen = np.broadcast_to(scores.argsort(-1)[..., :k], (batch, n, k))
    groups = group(torch.tensor(chosen), experts, block)
    expert = groups.expert.flatten(1).numpy()
    slot = groups.slot.numpy()
    assert groups.token.shape[1] == expert.shape[1] * block
    assert expert.shape[1] <= n * k // block + experts + 2 * PIECES
    for sample in range(batch):
        taken = slot[sample].flatten()
        assert len(set(taken)) == n * k
        np.testing.assert_array_equal(groups.token[sample, taken], np.arange(n).repeat(k))
        np.testing.assert_array_equal(expert[sample, taken // block], chosen[sample].flatten())


def test_the_form_follows_from_the_sizes() -> None:
    assert block_size(64, 8, 64 * 64) == BLOCK  # the published model, at its usual size
    assert block_size(64, 8, 16 * 16) == 0  # few tokens
    assert block_size(8, 4, 64 * 64) == 0  # half of the experts are chosen anyway


class Layer(nn.Module):
    """Router and experts with deltas, on the tokens of a picture and one more, in two guidance rows."""

    def __init__(self, block: int):
        super().__init__()
        torch.manual_seed(0)
        self.router = Router(HIDDEN, EXPERTS, TOP)
        self.experts = Experts(EXPERTS, HIDDEN, WIDTH, block).requires_grad_(False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.spec = DeltaSpec.from_patterns(self.experts, ["w1", "w2", "w3"], RANK)
        self.injection = inject(self.experts, self.spec)

    def forward(self, picture: Tensor, gate: Tensor, *deltas: Tensor) -> tuple[Tensor]:
        tokens = picture.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens[:, :1] * 2, tokens], dim=1)
        tokens = torch.cat([tokens, -tokens])
        with self.injection as injection:
            injection.set(dict(zip(self.spec.tensors(), deltas)), gate, rows=2)
            out = self.experts(tokens, *self.router(tokens))
        rows = out[:, 1:].unflatten(0, (2, -1))
        return ((rows[0] - 0.5 * rows[1]).transpose(1, 2).unflatten(2, picture.shape[2:]),)


AXES = {
    "batch": Axis(1, 4),
    "delta_batch": Axis(1, 4, one_or="batch"),
    "height": Axis(2, 64),
    "width": Axis(2, 64),
}


def exported(layer: Layer) -> bytes:
    """The layer as an ONNX model with its weights."""
    picture = TensorSpec("picture", "float32", ("batch", HIDDEN, "height", "width"))
    inputs = [picture, TensorSpec("gate", "float32", ("batch",))]
    shapes = layer.spec.tensors().items()
    inputs += [TensorSpec(name, "float32", ("delta_batch", *shape)) for name, shape in shapes]
    outputs = [TensorSpec("out", "float32", picture.shape)]
    traced = trace(GraphSpec("experts", layer, inputs, outputs), AXES)
    check(traced.model, AXES, inputs, outputs)
    state = layer.state_dict()
    assert {name for name in traced.initializers if "proj" in name} == {n for n in state if "proj" in n}
    for name in traced.initializers:
        value = traced.model.graph.initializers[name]
        value.const_value = ir.tensor(state[name].numpy(), name=name)
    model: bytes = ir.to_proto(traced.model).SerializeToString()
    return model


@pytest.fixture(scope="module")
def gathered() -> tuple[Layer, bytes]:
    layer = Layer(8)
    return layer, exported(layer)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
def test_exported_experts(dense: bool, gathered: tuple[Layer, bytes]) -> None:
    """Batches and sizes stay free, and every sample may have deltas of its own; against one sample and
    expert at a time."""
    layer, model = (layer := Layer(0), exported(layer)) if dense else gathered
    shapes = layer.spec.tensors()
    session = ort.InferenceSession(model)
    rng = np.random.default_rng(0)
    for batch, sets, height, width in ((1, 1, 2, 2), (2, 1, 5, 7), (3, 3, 12, 20), (1, 1, 40, 33)):
        feed = {"picture": rng.standard_normal((batch, HIDDEN, height, width)).astype(np.float32)}
        feed["gate"] = rng.random(batch).astype(np.float32)
        for name, shape in shapes.items():
            feed[name] = 0.3 * rng.standard_normal((sets, *shape)).astype(np.float32)
        found = session.run(None, feed)[0]
        for sample in range(batch):
            np.testing.assert_allclose(found[sample], _one(layer, feed, sample), rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_routing_is_exact_in_half_precision(
    kind: Half, tolerance: float, gathered: tuple[Layer, bytes]
) -> None:
    """With more tokens than these types count. Rounded scores choose another expert for a few of them."""
    layer, model = gathered
    rng = np.random.default_rng(0)
    feed = {"picture": rng.standard_normal((1, HIDDEN, 64, 64)).astype(np.float32)}
    feed["gate"] = np.ones(1, np.float32)
    for name, shape in layer.spec.tensors().items():
        feed[name] = 0.1 * rng.standard_normal((1, *shape)).astype(np.float32)
    narrow = emulate(to_half(ir.from_proto(onnx.load_model_from_string(model)), kind))
    expected, found = (
        ort.InferenceSession(data).run(None, feed)[0]
        for data in (model, ir.to_proto(narrow).SerializeToString())
    )
    apart = np.abs(found - expected) / np.abs(expected).max()
    assert np.quantile(apart, 0.95) < tolerance


@pytest.mark.slow
@pytest.mark.rtx
def test_tensorrt_rtx_compiles_gathered_experts(gathered: tuple[Layer, bytes]) -> None:
    """All shapes, those of the blocks too, follow from the sizes of the inputs."""
    pytest.importorskip("tensorrt_rtx")
    from hywu_export.engines.tensorrt import Settings, TensorRT

    layer, model = gathered
    profile = {"picture": [(1, HIDDEN, 2, 2), (1, HIDDEN, 16, 16), (4, HIDDEN, 64, 64)]}
    profile["gate"] = [(1,), (1,), (4,)]
    profile |= {name: [(1, *s), (1, *s), (4, *s)] for name, s in layer.spec.tensors().items()}
    with open(os.devnull, "w") as log:
        tensorrt = TensorRT("tensorrt-rtx", log)
        plan = tensorrt.compile(tensorrt.parse(model), profile, Settings(compute_capabilities=("8.9",)))
    assert len(plan) > 10_000


def _one(layer: Layer, feed: dict[str, np.ndarray], sample: int) -> np.ndarray:
    """Of one sample, token by token, with deltas merged into the weights of the experts."""
    merged: dict[str, Tensor] = {}
    for name in ("w1", "w2", "w3"):
        a, b = (torch.tensor(feed[f"{name}.lora_{kind}"]) for kind in "AB")
        merged[name] = torch.tensor(feed["gate"][sample]) * (b @ a)[sample % len(a)]
    picture = torch.tensor(feed["picture"][sample])
    tokens = picture.flatten(1).T
    results = []
    for row in (tokens, -tokens):
        chosen, shares = layer.router(row)
        outs = torch.zeros_like(row)
        for token in range(len(row)):
            for number, share in zip(chosen[token].tolist(), shares[token]):
                up, gate = layer.experts.get_parameter(f"{number}.gate_and_up_proj.weight").chunk(2)
                down = layer.experts.get_parameter(f"{number}.down_proj.weight")
                x = row[token]
                hidden = (up + merged["w3"][number]) @ x
                hidden = hidden * torch.nn.functional.silu((gate + merged["w1"][number]) @ x)
                outs[token] += share * ((down + merged["w2"][number]) @ hidden)
        results.append(outs)
    return (results[0] - 0.5 * results[1]).T.unflatten(1, picture.shape[1:]).detach().numpy()
