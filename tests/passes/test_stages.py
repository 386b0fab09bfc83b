"""Graphs cut into stages: equal to the whole, in ONNX Runtime and to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from hywu_export.families.base import Limits
from hywu_export.passes import check
from hywu_export.passes.stages import Stage, cut
from hywu_export.stages import Cutter
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, TracedGraph, trace
from hywu_runtime.errors import UnsupportedError
from hywu_runtime.manifest import Term

AXES = {
    "batch": Axis(1, 8),
    "delta_batch": Axis(1, 8, one_or="batch"),
    "length": Axis(2, 64),
    "height": Axis(16, 256, multiple=8),
    "width": Axis(16, 256, multiple=8),
    "latent_height": Axis(of="height", divide=4),
    "latent_width": Axis(of="width", divide=4),
}
WIDTH = 16


class Block(nn.Module):
    """A transformer block whose projection takes a delta."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor, mask: Tensor, shift: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = self.norm(x) + shift
        scores = torch.where(mask, h @ h.transpose(1, 2), -1e4)
        h = self.project(h) + (h @ a.transpose(1, 2)) @ b.transpose(1, 2)
        x = x + scores.softmax(-1) @ h
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Text and picture tokens in one sequence, whose length is a sum; a mask and a table for all blocks."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4 * 4, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(WIDTH, 4 * 4)

    def forward(
        self, latents: Tensor, text: Tensor, timestep: Tensor, *deltas: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = latents.shape[2]
        tokens = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        x = torch.cat([text, self.embed(tokens.flatten(1, 2))], 1)
        places = torch.arange(x.shape[1])
        mask = (places.unsqueeze(0) <= places.unsqueeze(1)) | (places.unsqueeze(0) < text.shape[1])
        wave = torch.cos(places.unsqueeze(1) / (torch.arange(WIDTH) + 1))
        shift = self.time(timestep.reshape(1, 1)).unsqueeze(1) + wave
        for i, block in enumerate(self.blocks):
            x = block(x, mask, shift, deltas[2 * i], deltas[2 * i + 1])
        made = self.out(x[:, text.shape[1] :]).unflatten(1, (h // 2, -1)).unflatten(-1, (4, 2, 2))
        return made.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3), x[:, : text.shape[1]]


def transformer() -> tuple[GraphSpec, nn.Module]:
    torch.manual_seed(0)
    module = Transformer().eval()
    latents = ("batch", 4, "latent_height", "latent_width")
    inputs = [
        TensorSpec("latents", "float32", latents),
        TensorSpec("text", "float32", ("batch", "length", WIDTH)),
        TensorSpec("timestep", "float32", ()),
    ]
    for i in range(4):
        inputs.append(TensorSpec(f"blocks.{i}.lora_A", "float32", ("delta_batch", 2, WIDTH)))
        inputs.append(TensorSpec(f"blocks.{i}.lora_B", "float32", ("delta_batch", WIDTH, 2)))
    outputs = [
        TensorSpec("velocity", "float32", latents),
        TensorSpec("text.next", "float32", ("batch", "length", WIDTH)),
    ]
    return GraphSpec("step", module, inputs, outputs), module


def session(
    model: ir.Model, module: nn.Module | None, names: dict[str, str] | None = None
) -> ort.InferenceSession:
    model = model.clone()
    if module is not None:
        state = module.state_dict()
        for initializer, parameter in (names or {}).items():
            tensor = ir.tensor(state[parameter].numpy(), name=initializer)
            model.graph.initializers[initializer].const_value = tensor
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def run_stages(parts: list[ort.InferenceSession], inputs: dict[str, Any]) -> dict[str, Any]:
    """Every output of every stage; a stage sees what it declares and nothing else."""
    known = dict(inputs)
    for part in parts:
        names = [value.name for value in part.get_outputs()]
        read = {value.name: known[value.name] for value in part.get_inputs()}
        known |= dict(zip(names, part.run(None, read)))
    return known


@pytest.fixture(scope="module")
def traced() -> tuple[TracedGraph, nn.Module]:
    spec, module = transformer()
    return trace(spec, AXES), module


@pytest.mark.parametrize("stages", [2, 4])
def test_transformer(traced: tuple[TracedGraph, nn.Module], stages: int) -> None:
    graph, module = traced
    cutter = Cutter(stages, AXES)
    pieces = cutter.cut(graph)
    assert [piece.name for piece in pieces] == [f"step.stage{i}" for i in range(stages)]
    axes = {**AXES, **cutter.axes}
    for piece in pieces:
        check(piece.model, axes, piece.inputs, piece.outputs, piece.name)
    # The residual stream crosses, and the shift, which is made with weights; the mask does not.
    length = "height*width/64 + length"
    assert cutter.axes[length].sum == (Term(("height", "width"), 1, 64), Term(("length",)))
    crossing = {t.name: t.shape for t in pieces[-1].inputs if t.name not in {i.name for i in graph.inputs}}
    assert sorted(map(str, crossing.values())) == sorted(
        [f"('batch', '{length}', 16)", f"(1, '{length}', 16)"]
    )
    # Weights and deltas are cut without rest, by whole blocks.
    weights = [set(piece.initializers) for piece in pieces]
    assert set.union(*weights) == set(graph.initializers)
    assert sum(map(len, weights)) == len(graph.initializers)
    blocks = [{n.split(".")[1] for n in names if n.startswith("blocks.")} for names in weights]
    assert [sorted(b) for b in blocks] == [
        [str(i) for i in range(4) if i * stages // 4 == k] for k in range(stages)
    ]
    for piece, own in zip(pieces, blocks):
        assert {t.name.split(".")[1] for t in piece.inputs if ".lora_" in t.name} == own

    whole = session(graph.model, module, graph.initializers)
    parts = [session(piece.model, module, piece.initializers) for piece in pieces]
    rng = np.random.default_rng(0)
    for batch, deltas, height, width, text in ((1, 1, 16, 24, 5), (2, 2, 24, 16, 9), (3, 1, 32, 32, 2)):
        sizes = {"batch": batch, "delta_batch": deltas, "length": text}
        sizes |= {"latent_height": height // 4, "latent_width": width // 4}
        inputs = {
            t.name: rng.standard_normal([sizes.get(d, d) for d in t.shape]).astype(np.float32)
            for t in graph.inputs
        }
        got = run_stages(parts, inputs)
        for tensor, expected in zip(graph.outputs, whole.run(None, inputs)):
            np.testing.assert_array_equal(got[tensor.name], expected)


def test_a_second_graph_is_cut_where_the_first_was(traced: tuple[TracedGraph, nn.Module]) -> None:
    graph, _ = traced
    first, again = Cutter(2, AXES), Cutter(2, AXES)
    placed = {name: k for k, piece in enumerate(first.cut(graph)) for name in piece.initializers}
    # Where the fourth block is in a stage of its own, it stays there, although the cut is uneven.
    again._placed = {name: int("blocks.3" in name or name.startswith("out")) for name in placed}
    assert any("blocks.2" in name and stage == 1 for name, stage in placed.items())
    for stage, piece in enumerate(again.cut(graph)):
        assert all(again._placed[name] == stage for name in piece.initializers)


WEIGHTS = [f"a.{i}.w" for i in range(4)]


def skip_graph() -> ir.Model:
    """Four layers; the second stage or a later one reads a skip, a mask, and the size of an early tensor."""
    nodes = [
        ("MatMul", ["x", "a.0.w"], "h0"),
        ("Relu", ["h0"], "early"),
        ("Shape", ["h0"], "size"),
        ("MatMul", ["early", "a.1.w"], "h1"),
        ("Not", ["keep"], "masked"),
        ("MatMul", ["h1", "a.2.w"], "h2"),
        ("Where", ["masked", "h2", "h0"], "shown"),
        ("Reshape", ["shown", "size"], "again"),
        ("MatMul", ["again", "a.3.w"], "h3"),
        ("Add", ["h3", "early"], "y"),
    ]
    rng = np.random.default_rng(0)
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output], name=output) for op, inputs, output in nodes],
        "graph",
        [
            helper.make_tensor_value_info("x", floats, ["batch", 4]),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, [4]),
        ],
        [helper.make_tensor_value_info(name, floats, ["batch", 4]) for name in ("y", "early")],
        [onnx.numpy_helper.from_array(rng.standard_normal((4, 4)).astype(np.float32), n) for n in WEIGHTS],
    )
    return ir.from_proto(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]))


VALUES = {
    n: TensorSpec(n, "float32", ("batch", 4)) for n in ("h0", "early", "h1", "h2", "again", "h3", "shown")
}


def cut_skip(stages: int, **options: Any) -> list[Stage]:
    return cut(skip_graph(), stages, WEIGHTS, options.pop("values", VALUES), {"batch": 1}, "toy", **options)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_skips_masks_and_sizes(stages: int) -> None:
    parts = cut_skip(stages)
    whole, staged = session(skip_graph(), None), [session(part.model, None) for part in parts]
    inputs = {"x": np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)}
    inputs["keep"] = np.array([True, False, True, False])
    got = run_stages(staged, inputs)
    for name, expected in zip(("y", "early"), whole.run(None, inputs)):
        np.testing.assert_array_equal(got[name], expected)
    assert sorted(name for part in parts for name in part.weights) == WEIGHTS
    # A mask is made anew from the inputs, a size measured anew: neither is an input of a stage.
    for part in parts:
        for value in part.model.graph.inputs:
            assert value.name not in ("masked", "size")
    # A result of an early stage that a later one reads too is one tensor, not two.
    assert sum(value.name == "early" for part in parts for value in part.model.graph.outputs) == 1


def test_more_stages_than_layers() -> None:
    with pytest.raises(UnsupportedError) as caught:
        cut_skip(5)
    assert "4 layers with weights" in caught.value.wrong
    assert caught.value.expected == "Every stage has at least one layer"
    assert "--stages 4 or less" in str(caught.value)


def test_what_cannot_cross() -> None:
    with pytest.raises(UnsupportedError, match="cannot cross"):
        cut_skip(2, values={})
    # Where two of the three boundaries cannot be crossed, the third is taken.
    first, second = cut_skip(2, values={name: VALUES[name] for name in ("h0", "early")})
    assert sorted(first.weights) == WEIGHTS[:1]
    assert sorted(second.weights) == WEIGHTS[1:]


def test_cut_leaves_the_model_alone() -> None:
    model = skip_graph()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    parts = [cut(model, 2, WEIGHTS, VALUES, {"batch": 1}) for _ in range(2)]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    first, second = (
        [ir.to_proto(p.model).SerializeToString(deterministic=True) for p in cuts] for cuts in parts
    )
    assert first == second


def test_stages_must_be_positive() -> None:
    from hywu_export import ExportOptions
    from hywu_runtime.errors import InputError

    with pytest.raises(InputError, match="stages is 0"):
        ExportOptions(stages=0)
    assert Limits().max_batch == 8
