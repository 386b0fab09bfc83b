"""Parameters that are traced as one and stored apart."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from hywu_export.passes import check
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, fake_module, trace
from hywu_export.tracing.stacks import Stack, traced_whole


class Heads(Stack):
    """Linear layers side by side; the same module is in two places."""

    def __init__(self) -> None:
        super().__init__([nn.Linear(4, 3) for _ in range(5)])
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.stacked("weight"), self.stacked("bias")
        return self.norm(x).unsqueeze(1) @ weight.transpose(1, 2) + bias.unsqueeze(1)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads()
        self.again = self.heads
        self.others = nn.ModuleList([Heads()])

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.heads(x) * self.again(-x) + self.others[0](x),)


AXES = {"batch": Axis(1, 4), "n": Axis(2, 9)}
SPEC = [TensorSpec("x", "float32", ("batch", "n", 4))], [TensorSpec("y", "float32", ("batch", 5, "n", 3))]


def test_a_stack_is_stored_apart_and_computes_the_same() -> None:
    torch.manual_seed(0)
    network = Network().requires_grad_(False)
    traced = trace(GraphSpec("network", network, *SPEC), AXES)
    check(traced.model, AXES, traced.inputs, traced.outputs)
    state = network.state_dict()
    both = {name for tied in traced.aliases.items() for name in (tied[0], *tied[1])}
    assert both | set(traced.initializers) == set(state)
    assert len(traced.initializers) == 2 * (5 * 2 + 2)
    nodes = [node.name for node in traced.model.graph if node.op_type == "Concat"]
    # Of weights and of biases, in the module that reads them.
    assert {"others.0/Concat", "others.0/Concat_2"} < set(nodes)
    assert len(nodes) == 4
    for name in traced.initializers:
        value = traced.model.graph.initializers[name]
        value.const_value = ir.tensor(state[name].numpy(), name=name)
    session = ort.InferenceSession(ir.to_proto(traced.model).SerializeToString())
    x = np.random.default_rng(0).standard_normal((2, 6, 4)).astype(np.float32)
    found = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(found, network(torch.from_numpy(x))[0], rtol=0, atol=1e-5)


def test_modules_without_data_give_the_same_graph() -> None:
    torch.manual_seed(0)
    graphs = [
        trace(GraphSpec("network", module, *SPEC), AXES)
        for module in (Network().requires_grad_(False), fake_module(Network))
    ]
    first, second = ([(n.name, n.op_type) for n in graph.model.graph] for graph in graphs)
    assert first == second
    assert list(graphs[0].initializers) == list(graphs[1].initializers)
    assert graphs[0].aliases == graphs[1].aliases
    assert {"heads.0.weight", "again.0.weight"} in [{a, *b} for a, b in graphs[0].aliases.items()]


def test_the_parts_come_back() -> None:
    network = Network()
    names = list(network.state_dict())
    with contextlib.suppress(ValueError), traced_whole(network) as stacks:
        parameters = dict(network.named_parameters(remove_duplicate=False))
        assert set(stacks) == {name for name in parameters if "norm" not in name}
        assert parameters["heads.stacked_weight"].shape == (5, 3, 4)
        assert stacks["others.0.stacked_bias"] == tuple(f"others.0.{i}.bias" for i in range(5))
        raise ValueError
    assert list(network.state_dict()) == names
