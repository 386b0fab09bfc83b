"""What is observed in a graph: extremes, ranges, SQNR; constant activations, NaN, and jobs that go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hywu_calibration.histogram import Histogram
from hywu_calibration.int8 import (
    candidates,
    constant_layers,
    fewest_wide,
    plan,
    ranking,
    smoothing_factors,
    taps,
)
from hywu_calibration.observe import Tap, chunks, extremes, first_not_finite, observe
from hywu_calibration.records import Record
from hywu_calibration.sensitivity import layer_sqnr
from hywu_calibration.smoothing import factors
from hywu_export.passes.quantize import quantize_weight
from hywu_runtime.errors import BundleError

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 32] x, float[batch, 32] dead) => (float[batch, 32] y, float[batch, 32] z)
    <float[32, 32] first_weight, float[32, 32] second_weight, float[32, 32] third_weight> {
    a = MatMul(x, first_weight)
    b = Sqrt(a)
    c = Relu(a)
    y = MatMul(c, second_weight)
    d = Mul(dead, nothing)
    z = MatMul(d, third_weight)
}
"""


@pytest.fixture
def model() -> ir.Model:
    proto = onnx.parser.parse_model(TEXT)
    del proto.graph.value_info[:]
    del proto.graph.initializer[:]
    random = np.random.default_rng(0)
    for name in ("first", "second", "third"):
        weight = random.standard_normal((32, 32)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"{name}_weight"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "nothing"))
    result = ir.from_proto(proto)
    for name in ("first", "second", "third"):
        result.graph.initializers[f"{name}_weight"].name = f"{name}.weight"
    return result


def records(count: int = 6, scale: float = 1.0) -> Iterator[Record]:
    random = np.random.default_rng(5)
    for i in range(count):
        arrays = {
            name: random.standard_normal((2 + i % 2, 32)).astype(np.float32) * scale for name in ("x", "dead")
        }
        yield Record("graph", arrays)


def data() -> np.ndarray:
    return np.concatenate([record.inputs["x"] for record in records()])


def test_ranges_are_those_of_the_data(model: ir.Model) -> None:
    found = candidates({"graph": model})
    observed = observe(model, records(), taps(found.layers["graph"]), 6)
    first = model.graph.initializers["first.weight"].const_value.numpy()
    exact = {"x": data(), "c": np.maximum(data() @ first, 0)}
    for name, values in exact.items():
        one = observed[name]
        expected = Histogram()
        expected.add(values)
        assert one.histogram.largest == pytest.approx(expected.largest, rel=1e-5)
        assert one.histogram.total == values.size
        np.testing.assert_allclose(one.channels, np.abs(values).max(0), rtol=1e-4)
        assert not one.constant
    largest, sizes = extremes(model, records(), 6, ["x", "c"])
    assert largest["a"] == pytest.approx(np.abs(data() @ first).max(), rel=1e-5)
    assert largest["b"] > 0  # its NaN is not counted as a number
    assert sizes == {"x": 3 * 32, "c": 3 * 32}


def test_constant_activations_are_named_and_stay_wide(
    model: ir.Model, caplog: pytest.LogCaptureFixture
) -> None:
    found = candidates({"graph": model})
    observed = {"graph": observe(model, records(), taps(found.layers["graph"]), 6)}
    (wide,) = constant_layers(found.layers, observed)
    assert wide.name == "third"
    assert "third" in caplog.text
    smoothing = smoothing_factors(found.layers, observed, 0.8)
    assert all(np.isfinite(f).all() and (f > 0).all() for f in smoothing["graph"].values())
    planned = plan(found.layers, observed, "entropy", 99.9, smoothing, [wide])
    assert list(planned["graph"]) == ["first", "second"]
    assert all(np.isfinite(q.scale) and q.scale > 0 for q in planned["graph"].values())


def test_sqnr_is_that_of_the_formula(model: ir.Model) -> None:
    found = candidates({"graph": model})
    observed = {"graph": observe(model, records(), taps(found.layers["graph"]), 6)}
    planned = plan(found.layers, observed, "minmax", 0, {}, constant_layers(found.layers, observed))
    sqnr = layer_sqnr(model, planned["graph"], records(), 6)
    first = model.graph.initializers["first.weight"].const_value.numpy()
    integers, scales = quantize_weight(first, 1)
    step = planned["graph"]["first"].scale
    ratios = []
    for record in records():
        exact = record.inputs["x"] @ first
        rounded = np.clip(np.rint(record.inputs["x"] / step), -128, 127) * step @ (integers * scales)
        ratios.append(np.square(exact - rounded).sum() / np.square(exact).sum())
    assert sqnr["first"] == pytest.approx(-10 * np.log10(np.mean(ratios)), abs=0.1)
    assert 30 < sqnr["first"] < 60


def test_one_run_that_is_small_beside_another_counts_as_much(model: ir.Model) -> None:
    """Ranges from values a thousand times as large: their own SQNR is good, and hides nothing."""
    both = [*records(3), *records(3, 1000.0)]
    found = candidates({"graph": model})
    observed = {"graph": observe(model, both, taps(found.layers["graph"]), 6)}
    planned = plan(found.layers, observed, "minmax", 0, {}, constant_layers(found.layers, observed))
    assert layer_sqnr(model, planned["graph"], records(3, 1000.0), 3)["first"] > 30
    assert layer_sqnr(model, planned["graph"], both, 6)["first"] < 6
    assert ranking({"g": {"a": 9.0, "b": 3.0}, "h": {"a": 1.0}}) == [("a", 1.0), ("b", 3.0)]


def test_chunks_change_nothing(model: ir.Model) -> None:
    all_taps = [Tap("x", -1), Tap("c", -1), Tap("d", -1)]
    sizes = {"x": 96, "c": 96, "d": 96}
    assert [len(group) for group in chunks(all_taps, sizes, 800)] == [2, 1]
    assert [len(group) for group in chunks(all_taps, sizes, 1)] == [1, 1, 1]
    together = observe(model, records(), all_taps, 6)
    for tap in all_taps:
        alone = observe(model, records(), [tap], 6)[tap.value]
        assert alone.histogram == together[tap.value].histogram


def test_goes_on_where_it_was(model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hywu_calibration.observe.SAVE_SECONDS", 0.0)
    some = [Tap("x", -1), Tap("c", -1, np.full(32, 2.0, np.float32))]
    state = tmp_path / "state.safetensors"
    whole = observe(model, records(), some, 6)

    def killed() -> Iterator[Record]:
        for i, record in enumerate(records()):
            if i == 4:
                raise KeyboardInterrupt
            yield record

    with pytest.raises(KeyboardInterrupt):
        observe(model, killed(), some, 6, state)
    seen = []
    again = observe(model, records(), some, 6, state, lambda done, total: seen.append(done))
    assert seen == [4, 5]
    for name, one in whole.items():
        assert again[name].histogram == one.histogram
        np.testing.assert_array_equal(again[name].channels, one.channels)
        assert (again[name].low, again[name].high) == (one.low, one.high)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_node_that_spoils_a_value_is_named(model: ir.Model, value: float) -> None:
    weight = model.graph.initializers["first.weight"]
    spoiled = weight.const_value.numpy().copy()
    spoiled[3, 4] = value
    weight.const_value = ir.Tensor(spoiled, name="first.weight")
    node = next(node for node in model.graph if node.outputs[0].name == "a")
    node.name = "first/MatMul"
    with pytest.raises(BundleError, match="Node 'first/MatMul' of graph graph") as caught:
        observe(model, records(), [Tap("c", -1)], 6)
    assert caught.value.exit_code == 2
    assert first_not_finite(model, next(records()), ["z"]) is None


def test_smoothing_is_smoothquant() -> None:
    activation, weight = np.array([1.0, 100.0, 0.0], np.float32), np.array([0.5, 0.1, 0.2], np.float32)
    found = factors(activation, [weight, weight / 2], 0.8)
    expected = activation[:2] ** 0.8 / weight[:2] ** 0.2
    assert found[1] / found[0] == pytest.approx(expected[1] / expected[0], rel=1e-5)
    assert found[2] == 1
    assert found[0] * found[1] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("needed", [0, 1, 5, 10, 11, None])
def test_as_few_wide_layers_as_needed(needed: int | None) -> None:
    asked: list[int] = []

    def good(count: int) -> bool:
        asked.append(count)
        return needed is not None and count >= needed

    found = fewest_wide(10, good)
    assert found == ((needed, True) if needed is not None and needed <= 10 else (10, False))
    assert len(asked) == len(set(asked)) <= 6
