"""3x3 convolutions as Winograd products: what ONNX Runtime's own convolution gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hywu_export.passes import check
from hywu_export.passes import winograd as module
from hywu_export.passes.layers import find_layers
from hywu_export.passes.winograd import is_winograd, matrices, winograd
from hywu_export.tracing import Axis, TensorSpec

Array = np.ndarray[Any, Any]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every convolution be replaced."""
    monkeypatch.setattr(module, "LEAST_GAIN", 0.0)


def convolution(
    inputs: int = 8,
    outputs: int = 8,
    bias: bool = True,
    kernel: int = 3,
    shape: Any = None,
    **attributes: Any,
) -> ir.Model:
    """``y = conv(x)``, under the names of a module ``conv``."""
    rng = np.random.default_rng(inputs + outputs)
    groups = attributes.get("group", 1)
    weight = rng.standard_normal((outputs, inputs // groups, kernel, kernel)) / (kernel * inputs**0.5)
    arrays = {"conv.weight": weight, "conv.bias": rng.standard_normal(outputs)}
    values = []
    for name, array in list(arrays.items())[: 1 + bias]:
        tensor = ir.tensor(array.astype(np.float32), name=name)
        values.append(ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype)))
        values[-1].shape = ir.Shape(array.shape)
    dims = ["batch", inputs, "height", "width"] if shape is None else shape
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))
    attributes = {"pads": [kernel // 2] * 4} | attributes
    node = ir.node("Conv", [x, *values], attributes, name="conv")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", x.type, ir.Shape([dims[0], outputs, *dims[2:]])
    graph = ir.Graph([x], [y], nodes=[node], initializers=values, opset_imports={"": 20}, name="graph")
    return ir.Model(graph, ir_version=10)


def apply(model: ir.Model, multiple: int = 1, most: int = 64) -> tuple[int, ir.Model]:
    """The pass on a copy, for heights and widths from ``multiple`` to ``most``."""
    copy = model.clone()
    side = Axis(multiple, most, multiple)
    axes = {"batch": Axis(1, 4), "height": side, "width": side}
    return len(winograd(copy, axes, {"batch": 1, "height": multiple, "width": multiple})), copy


def run(model: ir.Model, x: Array) -> Array:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    made: Array = session.run(None, {"x": x})[0]
    return made


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_the_matrices_make_a_correlation() -> None:
    d, g, a = matrices()
    assert (d.shape, g.shape, a.shape) == ((6, 6), (6, 3), (4, 6))
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(6), rng.standard_normal(3)
    np.testing.assert_allclose(a @ ((g @ w) * (d @ x)), np.correlate(x, w, "valid"), atol=1e-13)


@settings(max_examples=40, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)), bias=st.booleans(), batch=st.integers(1, 3),
    height=st.integers(1, 11), width=st.integers(1, 11),
)  # fmt: skip
def test_any_size(channels: tuple[int, int], bias: bool, batch: int, height: int, width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST_GAIN", 0.0)
        model = convolution(*channels, bias)
        count, fast = apply(model)
    assert count == 1
    x = np.random.default_rng(height).standard_normal((batch, channels[0], height, width)).astype(np.float32)
    np.testing.assert_allclose(run(fast, x), run(model, x), atol=5e-5)


def test_sizes_that_tiles_divide_need_no_cut(always: None) -> None:
    model = convolution()
    _, whole = apply(model, multiple=4)
    _, cut = apply(model, multiple=1)
    assert "Slice" not in operators(whole)
    assert "Slice" in operators(cut)
    for height, width in ((4, 4), (8, 20), (64, 12)):
        x = np.random.default_rng(1).standard_normal((2, 8, height, width)).astype(np.float32)
        np.testing.assert_allclose(run(whole, x), run(model, x), atol=5e-5)


def test_lengths_that_only_look_divided_are_cut(always: None) -> None:
    """After a convolution of stride 2, which rounds up: 4 of 7, but 36 of 71."""
    first = convolution()
    node = next(iter(first.graph))
    node.attributes["strides"] = ir.AttrInt64s("strides", [2, 2])
    middle, (y,) = node.outputs[0], first.graph.outputs
    second = ir.node("Conv", [middle, *node.inputs[1:]], {"pads": [1, 1, 1, 1]}, name="second")
    middle.name, middle.shape = "middle", None
    second.outputs[0].name, second.outputs[0].type = "y", y.type
    second.outputs[0].shape = ir.Shape(["batch", 8, "h", "w"])
    first.graph.append(second)
    first.graph.outputs[0] = second.outputs[0]
    side = Axis(7, 70, 7)
    axes = {"batch": Axis(1, 10), "height": side, "width": side}
    fast = first.clone()
    made = winograd(fast, axes, {"batch": 1, "height": 14, "width": 14})
    assert made == {"conv.weight/winograd": "conv.weight"}
    assert "Slice" in operators(fast)
    x = np.random.default_rng(2).standard_normal((1, 8, 21, 35)).astype(np.float32)
    np.testing.assert_allclose(run(fast, x), run(first, x), atol=5e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": [2, 2]},
        {"dilations": [2, 2]},
        {"group": 2},
        {"kernel": 1},
        {"kernel": 5},
        {"pads": [0] * 4},
    ],
    ids=str,
)
def test_other_convolutions_stay(always: None, options: dict[str, Any]) -> None:
    model = convolution(**options)
    count, same = apply(model)
    assert count == 0
    assert operators(same) == ["Conv"]
    assert not is_winograd(same)


def test_a_weight_that_is_computed_stays(always: None) -> None:
    model = convolution(bias=False)
    node = next(iter(model.graph))
    weight = node.inputs[1]
    assert weight is not None
    doubled = ir.node("Add", [weight, weight], name="double")
    doubled.outputs[0].name, doubled.outputs[0].type = "doubled", weight.type
    doubled.outputs[0].shape = weight.shape
    model.graph.insert_before(node, doubled)
    node.replace_input_with(1, doubled.outputs[0])
    assert apply(model)[0] == 0


@pytest.mark.parametrize(
    ("channels", "side", "expected"), [(320, 32, True), (640, 16, True), (1280, 8, False), (8, 8, False)]
)
def test_what_pays_is_replaced(channels: int, side: int, expected: bool) -> None:
    """Where pictures are small, weights alone take the time; where channels are few, moving numbers does."""
    model = convolution(1, 1)
    weight = model.graph.initializers["conv.weight"]
    weight.const_value, weight.shape = None, ir.Shape([channels, channels, 3, 3])
    (found,) = find_layers(model)
    assert module._fits(found)
    assert module._pays(found, (3, channels, side, side)) == expected


def test_another_axis_that_grows_as_much_proves_nothing(always: None) -> None:
    """Heights of 16, 22, 28, … 128: eight times as large at the end, as the batch, and not divided by 4."""
    model = convolution()
    axes = {"batch": Axis(1, 8), "height": Axis(16, 128, 2), "width": Axis(8, 8, 8)}
    fast = model.clone()
    assert len(winograd(fast, axes, {"batch": 1, "height": 16, "width": 8})) == 1
    assert "Slice" in operators(fast)
    x = np.random.default_rng(3).standard_normal((1, 8, 22, 8)).astype(np.float32)
    np.testing.assert_allclose(run(fast, x), run(model, x), atol=5e-5)


def test_the_graph_is_what_engines_and_lint_take(always: None) -> None:
    _, fast = apply(convolution())
    axes = {"batch": Axis(1, 4), "height": Axis(1, 64), "width": Axis(1, 64)}
    shape = ("batch", 8, "height", "width")
    check(fast, axes, [TensorSpec("x", "float32", shape)], [TensorSpec("y", "float32", shape)], "graph")
    assert is_winograd(fast)


def test_the_parameter_gives_way_to_its_transform(always: None) -> None:
    model = convolution(inputs=3, outputs=5)
    _, fast = apply(model)
    weight = model.graph.initializers["conv.weight"].const_value
    made = fast.graph.initializers["conv.weight/winograd"].const_value
    assert weight is not None
    assert made is not None
    assert "conv.weight" not in fast.graph.initializers
    _, g, _ = matrices()
    expected = np.einsum("ai,bj,ocij->aboc", g, g, weight.numpy())
    np.testing.assert_allclose(made.numpy(), expected.reshape(36, 1, 5, 3), atol=1e-6)
