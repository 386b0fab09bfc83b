from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from tiny_models import AXES, CASES
from torch import nn

from hywu_export.engines import tensorrt as rtx
from hywu_export.passes import lint
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, TracedGraph, fake_module, trace
from hywu_runtime.errors import UnsupportedError

NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "step" else name for name in CASES]


def serialize(traced: TracedGraph, module: nn.Module | None = None) -> bytes:
    """The model's bytes; with the module's weights inside, or without any."""
    model = traced.model.clone()
    state = {} if module is None else module.state_dict()
    for initializer, parameter in traced.initializers.items():
        if module is not None:
            value = ir.tensor(state[parameter].numpy(), name=initializer)
            model.graph.initializers[initializer].const_value = value
    return ir.to_proto(model).SerializeToString(deterministic=True)


@cache
def traced_real(name: str) -> tuple[GraphSpec, TracedGraph, bytes]:
    torch.manual_seed(0)
    spec = CASES[name].spec(name, CASES[name].component())
    traced = trace(spec, AXES)
    return spec, traced, serialize(traced, spec.module)


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_equals_torch_at_other_sizes(name: str) -> None:
    spec, _, model = traced_real(name)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    for sizes in CASES[name].sizes:
        inputs = CASES[name].tensors(sizes)
        with torch.no_grad():
            expected = spec.module(*inputs)
        got = session.run(None, {t.name: value.numpy() for t, value in zip(spec.inputs, inputs)})
        for want, have in zip(expected, got):
            if want.dtype == torch.uint8:  # at most one level, where the last bit decides a rounding
                assert np.abs(want.numpy().astype(int) - have).max() <= 1
                assert np.mean(want.numpy() != have) < 1e-3
            else:
                np.testing.assert_allclose(have, want.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_fake_weights_give_the_same_graph(name: str) -> None:
    case = CASES[name]
    module = fake_module(case.component)
    assert all(p.is_meta for p in module.parameters())
    traced = trace(case.spec(name, module), AXES)
    assert all(p.is_meta for p in module.parameters())
    assert serialize(traced) == serialize(traced_real(name)[1])


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_names(name: str) -> None:
    spec, traced, _ = traced_real(name)
    graph = traced.model.graph
    assert lint(traced.model, AXES, spec.inputs, spec.outputs) == []
    used = {p for p in spec.module.state_dict() if p in traced.initializers}
    assert set(traced.initializers.values()) == used
    assert len(used) > 3
    assert all(not node.metadata_props for node in graph)
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)


def test_every_parameter_keeps_its_name() -> None:
    for name in ("text_encoder", "deltas"):
        spec, traced, _ = traced_real(name)
        assert set(traced.initializers) == {n for n, _ in spec.module.named_parameters()}


def test_nodes_are_named_by_module_path() -> None:
    names = [node.name for node in traced_real("image_encoder")[1].model.graph]
    assert "vae.encoder.conv_in/Conv" in names
    assert "vae.encoder.mid_block.attentions.0.to_q/MatMul" in names


@pytest.mark.rtx
@pytest.mark.parametrize("name", NAMES)
def test_tensorrt_rtx_parses(name: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert rtx.parser_errors(traced_real(name)[2]) == []


@pytest.mark.rtx
def test_tensorrt_rtx_builds_for_other_delta_batches() -> None:
    """Batch and number of delta sets are axes of their own: a profile may hold any pair of them."""
    trt = pytest.importorskip("tensorrt_rtx")
    spec, _, model = traced_real("deltas")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model)
    limits = {"batch": (1, 3, 4), "delta_batch": (1, 1, 4), "length": (1, 8, 16)}
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        shapes = zip(*(limits[d] if isinstance(d, str) else (d,) * 3 for d in tensor.shape))
        profile.set_shape(tensor.name, *shapes)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.rtx
def test_tensorrt_rtx_parser_reports_errors() -> None:
    pytest.importorskip("tensorrt_rtx")
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch"]))
    node = ir.node("NonZeroElements", [value])
    node.outputs[0].name = "y"
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    assert "NonZeroElements" in rtx.parser_errors(ir.to_proto(model).SerializeToString())[0]


def test_a_wrong_number_of_delta_sets_fails_in_the_graph() -> None:
    case = CASES["deltas"]
    session = ort.InferenceSession(traced_real("deltas")[2], providers=["CPUExecutionProvider"])
    inputs = case.tensors({"batch": 3, "delta_batch": 2, "length": 4})
    with pytest.raises(Exception, match=r"dimension|broadcast|Broadcast"):
        session.run(None, {t.name: value.numpy() for t, value in zip(case.inputs, inputs)})


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_process() -> None:
    code = (
        "import hashlib, onnx_ir as ir\n"
        "from tiny_models import AXES, CASES\n"
        "from hywu_export.tracing import fake_module, trace\n"
        "for name in ('step', 'deltas'):\n"
        "    traced = trace(CASES[name].spec(name, fake_module(CASES[name].component)), AXES)\n"
        "    data = ir.to_proto(traced.model).SerializeToString(deterministic=True)\n"
        "    print(hashlib.sha256(data).hexdigest())\n"
    )
    seen = set()
    for seed in ("1", "2"):
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        seen.add(run.stdout)
        assert len(run.stdout.split()) == 2
    assert len(seen) == 1


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(4.0) ** 2, persistent=False)
        self.register_buffer("running", torch.full((4,), 3.0))
        self.scale = torch.tensor([1.0, 0.5, 0.25, 0.125])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.table.sin() + self.running * self.scale


class Holder(nn.Module):
    def __init__(self, **components: nn.Module):
        super().__init__()
        for name, component in components.items():
            self.add_module(name, component)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for component in self.children():
            x = component(x)
        return (x,)


def graph_of(module: nn.Module, columns: int = 4, outputs: tuple[TensorSpec, ...] = ()) -> GraphSpec:
    tensor = TensorSpec("x", "float32", ("batch", columns))
    return GraphSpec("g", module, [tensor], outputs or [TensorSpec("y", "float32", ("batch", columns))])


def test_computed_buffers_are_constants_and_stored_ones_are_weights() -> None:
    traced = trace(graph_of(Holder(part=fake_module(Buffers))), AXES)
    assert set(traced.initializers) == {"part.weight", "part.running"}
    constants = [
        value.const_value.numpy()
        for name, value in traced.model.graph.initializers.items()
        if name not in traced.initializers and value.const_value is not None
    ]
    expected = np.sin(np.arange(4.0, dtype=np.float32) ** 2)
    assert any(c.shape == (4,) and np.allclose(c, expected, atol=1e-6) for c in constants)


def test_fake_module_makes_half_precision() -> None:
    module = fake_module(Buffers, torch.float16)
    assert module.weight.dtype == torch.float16
    assert torch.get_default_dtype() == torch.float32


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_tied_parameters_know_their_other_names() -> None:
    for part in (Tied(), fake_module(Tied)):
        traced = trace(graph_of(Holder(part=part)), AXES)
        names = {"part.first.weight", "part.second.weight"}
        assert set(traced.initializers) <= names
        for name in traced.initializers:
            assert {name, *traced.aliases[name]} == names


class Passthrough(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + 1
        return x, y, y


def test_outputs_that_are_inputs_or_equal() -> None:
    shape = ("batch", 4)
    outputs = tuple(TensorSpec(n, "float32", shape) for n in ("a", "b", "c"))
    traced = trace(graph_of(Passthrough(), outputs=outputs), AXES)
    session = ort.InferenceSession(serialize(traced), providers=["CPUExecutionProvider"])
    x = np.ones((3, 4), np.float32)
    a, b, c = session.run(None, {"x": x})
    assert (a == x).all()
    assert (b == x + 1).all()
    assert (c == x + 1).all()


class Frozen(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.cat([x.reshape(-1, 4)[i : i + 1] for i in range(int(x.shape[0]))]),)


class Even(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.reshape(x.shape[0] // 2, 2, 4).reshape(x.shape[0], 4),)


def test_a_frozen_axis_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="batch"):
        trace(graph_of(Frozen()), AXES)


def test_a_needed_multiple_is_refused_without_and_taken_with_it() -> None:
    with pytest.raises(UnsupportedError, match="cannot be traced with its axes free"):
        trace(graph_of(Even()), AXES)
    traced = trace(graph_of(Even()), {**AXES, "batch": Axis(2, 16, multiple=2)})
    session = ort.InferenceSession(serialize(traced), providers=["CPUExecutionProvider"])
    for batch in (2, 6):
        x = np.random.default_rng(0).random((batch, 4), np.float32)
        assert (session.run(None, {"x": x})[0] == x).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (("batch", 5), "float32", "has shape"),
        (("batch", "length"), "float32", "no input has|has shape|frozen"),
        ((2, 4), "float32", "has shape"),
        (("batch", 4), "float16", "is float32"),
    ],
)
def test_a_wrong_declaration_is_refused(shape: tuple[int | str, ...], dtype: str, message: str) -> None:
    outputs = (TensorSpec("y", dtype, shape),)
    with pytest.raises(UnsupportedError, match=message):
        trace(graph_of(Holder(part=nn.Linear(4, 4)), outputs=outputs), AXES)


def test_a_wrong_number_of_outputs_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="returns 3 tensors"):
        trace(graph_of(Passthrough()), AXES)


class Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + torch.linalg.svdvals(x).sum(),)


def test_an_operation_without_an_onnx_form_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="svd"):
        trace(graph_of(Spectrum()), AXES)


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (tensors[0] * 2,)


def test_a_decorated_forward_with_any_number_of_inputs() -> None:
    assert [node.op_type for node in trace(graph_of(Decorated()), AXES).model.graph] == ["Mul"]


class PicksOneSet(nn.Module):
    def forward(self, x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor]:
        return (x @ a[0],)


def test_picking_one_set_of_deltas_is_refused() -> None:
    inputs = [
        TensorSpec("x", "float32", ("batch", 3, 4)),
        TensorSpec("m.lora_A", "float32", ("delta_batch", 4, 4)),
    ]
    spec = GraphSpec("g", PicksOneSet(), inputs, [TensorSpec("y", "float32", ("batch", 3, 4))])
    with pytest.raises(UnsupportedError, match="loses the axis of delta sets"):
        trace(spec, AXES)


def test_axes_that_cannot_be() -> None:
    tensor = TensorSpec("x", "float32", ("odd", 4))
    spec = GraphSpec("g", nn.Identity(), [tensor], [tensor])
    with pytest.raises(UnsupportedError, match="not declared"):
        trace(spec, AXES)
    with pytest.raises(UnsupportedError, match="divisible by 3"):
        trace(spec, {"odd": Axis(of="h", divide=3), "h": Axis(8, 64, multiple=8)})
    with pytest.raises(UnsupportedError, match="defined by itself"):
        trace(spec, {"odd": Axis(of="h"), "h": Axis(of="odd")})
    with pytest.raises(UnsupportedError, match="one size only"):
        trace(spec, {"odd": Axis(4, 4)})
    with pytest.raises(UnsupportedError, match="bool"):
        TensorSpec("x", "bool", (1,))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_tells_about_the_machine(name: str) -> None:
    text = serialize(traced_real(name)[1])
    assert not re.search(rb"site-packages|\.py\b|/home/|/usr/|/tmp/", text)
    assert str(Path(__file__).parents[2]).encode() not in text
