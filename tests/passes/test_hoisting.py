"""What no step changes, moved into a graph of its own: the same numbers, and no work in the wrong place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, inject
from hywu_export.deltas.merging import MOST_BYTES, choose, merged_bytes
from hywu_export.families.base import Plan
from hywu_export.invariants import split
from hywu_export.passes import check
from hywu_export.passes.hoisting import ANY_PRODUCT, hoist
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, TracedGraph, trace
from hywu_runtime.manifest import Call, ProvidedTensor, State

AXES = {
    "batch": Axis(1, 8),
    "delta_batch": Axis(1, 8, one_or="batch"),
    "length": Axis(2, 64),
    "height": Axis(16, 256, multiple=8),
    "latent_height": Axis(of="height", divide=8),
}
WIDTH, TEXT, ROWS, RANK = 16, 24, 2, 4


class Denoiser(nn.Module):
    """Attention of latents to the text, with deltas on all four projections, for two guidance rows."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.to_k, self.to_v = (nn.Linear(TEXT, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        scores = self.to_q(x) @ self.to_k(text).transpose(1, 2)
        return x + self.to_out((scores / 4).softmax(-1) @ self.to_v(text))


class Step(nn.Module):
    def __init__(self, spec: DeltaSpec, unet: Denoiser):
        super().__init__()
        self.unet, self.names = unet, list(spec.tensors())
        self.injection = inject(unet, spec)

    def forward(
        self, latents: Tensor, text: Tensor, empty: Tensor, sigma: Tensor, gate: Tensor, *deltas: Tensor
    ) -> tuple[Tensor]:
        rows = torch.cat([text, empty.expand(text.shape[0], -1, -1)])
        with self.injection as injection:
            injection.set(dict(zip(self.names, deltas)), gate, rows=ROWS)
            made = self.unet(torch.cat([latents, latents]) * sigma, rows)
        first, second = made.reshape(ROWS, *latents.shape).unbind()
        return (second + 3 * (first - second),)


def _step(merged: bool, patterns: tuple[str, ...] = ("to_*",)) -> tuple[GraphSpec, Plan, DeltaSpec]:
    torch.manual_seed(0)
    unet = Denoiser()
    spec = choose(
        DeltaSpec.from_patterns(unet, patterns, RANK), "merged" if merged else "low-rank", steps=1, tokens=1
    )
    deltas = [TensorSpec(name, "float32", ("delta_batch", *s)) for name, s in spec.tensors().items()]
    graph = GraphSpec(
        "step",
        Step(spec, unet),
        [
            TensorSpec("latents", "float32", ("batch", "latent_height", WIDTH)),
            TensorSpec("text", "float32", ("batch", "length", TEXT)),
            TensorSpec("empty", "float32", (1, "length", TEXT)),
            TensorSpec("sigma", "float32", ()),
            TensorSpec("gate", "float32", ("batch",)),
            *deltas,
        ],
        [TensorSpec("denoised", "float32", ("batch", "latent_height", WIDTH))],
    )
    plan = Plan(
        [graph],
        AXES,
        tensors={"sigma": ProvidedTensor("float32", (), "schedule", column="sigma")},
        program=[Call("step", "step", {}, {"denoised": "next"})],
        state=[State("latents", "noise", "next")],
    )
    return graph, plan, spec


@pytest.fixture(scope="module", params=[False, True], ids=["low-rank", "merged"])
def parts(request: pytest.FixtureRequest) -> tuple[list[TracedGraph], GraphSpec, Plan, DeltaSpec]:
    """The parts of the step, in order, and what they were made from."""
    graph, plan, spec = _step(request.param)
    made = split(trace(graph, AXES), plan, request.param)
    for part in made:
        check(part.model, AXES, part.inputs, part.outputs, part.name)
    return made, graph, plan, spec


def _session(graph: TracedGraph, module: nn.Module) -> ort.InferenceSession:
    model = graph.model.clone()
    weights = dict(module.named_parameters())
    for name, parameter in graph.initializers.items():
        model.graph.initializers[name].const_value = ir.tensor(weights[parameter].detach().numpy())
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions(parts: Any) -> list[ort.InferenceSession]:
    made, graph, _, _ = parts
    return [_session(part, graph.module) for part in made]


@settings(max_examples=25)
@given(batch=st.integers(1, 3), length=st.integers(2, 9), height=st.integers(2, 5), shared=st.booleans())
def test_the_parts_are_the_whole(
    parts: Any, sessions: Any, batch: int, length: int, height: int, shared: bool
) -> None:
    made, graph, _, _ = parts
    sizes = {"batch": batch, "length": length, "latent_height": height}
    sizes["delta_batch"] = 1 if shared else batch
    rng = np.random.default_rng(length)
    shapes = {t.name: [sizes[d] if isinstance(d, str) else d for d in t.shape] for t in graph.inputs}
    arrays = {name: np.asarray(0.3 * rng.standard_normal(shape), "f4") for name, shape in shapes.items()}
    with torch.no_grad():
        expected = graph.module(*(torch.from_numpy(arrays[t.name]) for t in graph.inputs))[0]
    got = dict(arrays)
    for part, session in zip(made, sessions):
        results = session.run(None, {t.name: got[t.name] for t in part.inputs})
        got |= dict(zip([t.name for t in part.outputs], results))
    np.testing.assert_allclose(got["denoised"], expected.numpy(), rtol=1e-4, atol=2e-5)


def test_what_moves(parts: Any) -> None:
    (prepare, step), _, plan, spec = parts
    merged = any(target.merged for target in spec.targets)
    # Keys and values of both guidance rows, and the weights of what latents go through.
    rows = [t.shape for t in prepare.outputs if t.shape[0] == ROWS]
    assert set(rows) == {(ROWS, "batch", "length", WIDTH), (ROWS, "batch", WIDTH, "length")}
    assert [t.shape for t in prepare.outputs if t.shape not in rows] == [("batch", WIDTH, WIDTH)] * 2 * merged
    products = [node for node in step.model.graph if node.op_type == "MatMul"]
    assert len(products) == (2 + 2 if merged else 2 + 2 + 4)
    assert [call.graph for call in plan.program] == ["prepare_step", "step"]
    assert [call.phase for call in plan.program] == ["request", "step"]
    read = {t.name for t in step.inputs}
    assert {"text", "empty"}.isdisjoint(read)
    assert ("gate" in read) != merged
    assert {t.name for t in prepare.outputs} <= read


def test_what_depends_on_no_input_stays() -> None:
    """It is computed once when the graph is loaded, not in every request."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        graph (float[n, 48] latents, float[n, 48] text) => (float[n, 48] next)
        <float[48, 48] a = {%s}, float[48, 48] b = {%s}> {
            constant = MatMul(a, b)
            words = MatMul(text, constant)
            moved = MatMul(latents, constant)
            next = Add(moved, words)
        }"""
        % ((", ".join(["0.5"] * 48**2),) * 2)
    )
    result = hoist(model, ["latents"], [{"n": size} for size in (2, 3, 5)], "step/", ANY_PRODUCT)
    assert result is not None
    assert [moved.name for moved in result[1]] == ["step/words"]
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "Add"]


def test_nothing_moves_from_a_graph_that_runs_once() -> None:
    graph, plan, _ = _step(merged=False)
    plan.program[0] = Call("step", "request", {}, {})
    traced = trace(graph, AXES)
    before = len(list(traced.model.graph))
    assert split(traced, plan) == [traced]
    assert len(list(traced.model.graph)) == before


def test_auto_merges_what_pays() -> None:
    spec = DeltaSpec.from_patterns(Denoiser(), ["to_*"], RANK)
    assert merged_bytes(choose(spec, "low-rank", 50, 4096)) == 0
    assert merged_bytes(choose(spec, "auto", 50, 4096)) == 4 * 2 * (WIDTH * WIDTH + WIDTH * TEXT)
    assert merged_bytes(choose(spec, "auto", 1, 1)) == 0
    large = DeltaSpec.from_patterns(
        nn.ModuleList(nn.Linear(8192, 8192, device="meta") for _ in range(12)), ["*"], RANK
    )
    assert 0 < merged_bytes(choose(large, "auto", 50, 4096)) <= MOST_BYTES
    assert merged_bytes(choose(large, "merged", 1, 1)) == 12 * 4 * 8192 * 8192


def test_only_linear_layers_are_merged() -> None:
    spec = DeltaSpec.from_patterns(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 8, 3)), ["*"], 2)
    assert [t.merged for t in choose(spec, "merged", 1, 1).targets] == [True, False]
    assert choose(spec, "merged", 1, 1) == spec  # no matter of what deltas it takes
