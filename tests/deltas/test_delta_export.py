"""An injected module as an ONNX graph: deltas and gate are inputs, batch, sizes and delta batch are free."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from hywu_export.deltas import DeltaSpec, inject

ROWS = 3


class Net(nn.Module):
    """Convolutions of every form, and linear layers over sequences and images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.reflected = nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")
        self.pointwise = nn.Conv2d(6, 5, 1, stride=2)
        self.channels = nn.Linear(5, 5)
        self.tokens = nn.Linear(5, 4)
        self.pooled = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.reflected(self.dilated(torch.tanh(self.strided(self.conv(x)))))
        x = self.channels(self.pointwise(x).permute(0, 2, 3, 1))
        tokens = self.tokens(x.flatten(1, 2))
        return tokens, self.pooled(tokens.mean(1))


class Injected(nn.Module):
    def __init__(self, net: nn.Module, spec: DeltaSpec):
        super().__init__()
        self.net = net
        self.injection = inject(net, spec)

    def forward(self, x: Tensor, gate: Tensor, deltas: dict[str, Tensor]) -> Any:
        with self.injection as injection:
            injection.set(deltas, gate, ROWS)
            return self.net(torch.cat([x, x + 0.5, x - 0.5]))


@pytest.fixture(scope="module")
def exported() -> tuple[Injected, DeltaSpec, onnx.ModelProto]:
    torch.manual_seed(0)
    net = Net().eval()
    spec = DeltaSpec.from_patterns(net, ["*"], 2)
    assert len(spec.targets) == 8
    injected = Injected(net, spec)
    batch, high, wide = (
        torch.export.Dim(name, min=low, max=64) for name, low in (("b", 1), ("h", 2), ("w", 2))
    )
    shapes = {"x": {0: batch, 2: 4 * high, 3: 4 * wide}, "gate": {0: batch}}
    program = torch.export.export(
        injected,
        (torch.randn(2, 3, 12, 8), torch.ones(2), deltas_of(spec, 1)),
        dynamic_shapes={**shapes, "deltas": {name: {} for name in spec.tensors()}},
        strict=False,
    )
    result = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    assert result is not None
    return injected, spec, result.model_proto


def deltas_of(spec: DeltaSpec, delta_batch: int) -> dict[str, Tensor]:
    torch.manual_seed(delta_batch)
    return {name: 0.3 * torch.randn(delta_batch, *shape) for name, shape in spec.tensors().items()}


def run(model: onnx.ModelProto, x: Tensor, gate: Tensor, deltas: dict[str, Tensor]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    values = [tensor.numpy() for tensor in (x, gate, *deltas.values())]
    assert len(names) == len(values)
    return list(session.run(None, dict(zip(names, values))))


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 12, 8), (5, 16, 27)])
def test_equals_torch_at_other_sizes(
    exported: tuple[Injected, DeltaSpec, onnx.ModelProto], batch: int, height: int, width: int
) -> None:
    injected, spec, model = exported
    x, gate = torch.randn(batch, 3, height, width), torch.linspace(-1, 2, batch)
    deltas = deltas_of(spec, 1)
    with torch.no_grad():
        expected = injected(x, gate, deltas)
    for actual, wanted in zip(run(model, x, gate, deltas), expected, strict=True):
        np.testing.assert_allclose(actual, wanted.numpy(), atol=2e-5, rtol=1e-5)


def test_gate_zero_is_exact_in_onnx_runtime(exported: tuple[Injected, DeltaSpec, onnx.ModelProto]) -> None:
    _, spec, model = exported
    x, gate = torch.randn(2, 3, 12, 8), torch.zeros(2)
    without = {name: torch.zeros_like(tensor) for name, tensor in deltas_of(spec, 1).items()}
    for off, base in zip(run(model, x, gate, deltas_of(spec, 1)), run(model, x, gate, without), strict=True):
        np.testing.assert_array_equal(off, base)


def test_a_graph_traced_with_one_set_takes_one_per_sample(
    exported: tuple[Injected, DeltaSpec, onnx.ModelProto],
) -> None:
    """The first axis of the delta inputs is renamed, and shapes inside the graph are forgotten."""
    injected, spec, traced = exported
    model = onnx.ModelProto()
    model.CopyFrom(traced)
    del model.graph.value_info[:]
    for value in model.graph.input[2:]:
        value.type.tensor_type.shape.dim[0].dim_param = "delta_batch"
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    deltas_only = {value.name for value in model.graph.input[2:]}
    for node in model.graph.node:
        if node.input and node.input[0] in deltas_only and set(node.input[1:]) <= constants.keys():
            deltas_only.update(node.output)
            if node.op_type == "Reshape":
                shape = constants[node.input[1]].copy()
                assert shape[0] == 1
                shape[0] = 0
                name = f"{node.output[0]}.shape"
                model.graph.initializer.append(onnx.numpy_helper.from_array(shape, name))
                node.input[1] = name
                del node.attribute[:]
    x, gate, deltas = torch.randn(3, 3, 8, 12), torch.tensor([1.0, 0.0, -1.0]), deltas_of(spec, 3)
    with torch.no_grad():
        expected = injected(x, gate, deltas)
    for actual, wanted in zip(run(model, x, gate, deltas), expected, strict=True):
        np.testing.assert_allclose(actual, wanted.numpy(), atol=2e-5, rtol=1e-5)


def test_the_form_is_small_and_constant(exported: tuple[Injected, DeltaSpec, onnx.ModelProto]) -> None:
    """One grouped convolution per k x k or strided target, no gathers, slices or tiles for them."""
    _, _, model = exported
    ops = Counter(node.op_type for node in model.graph.node)
    assert ops["Conv"] == 5 + 5  # of the base, and the constant ones
    assert ops["Pad"] == 2  # of the reflecting one and its delta; zero padding is done by the convolutions
    assert not {"Expand", "Tile", "ScatterND", "Loop", "If", "SequenceAt"} & ops.keys()
    constants = {tensor.name for tensor in model.graph.initializer}
    assert all(node.input[1] in constants for node in model.graph.node if node.op_type == "Conv")
