from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from hywu_export.bundle.stored_dtype import cast_weights
from hywu_export.engines import tensorrt as rtx
from hywu_export.passes import check, clean, lint
from hywu_export.passes.linting import OPERATORS
from hywu_export.tracing import TensorSpec
from hywu_runtime.errors import UnsupportedError

AXES = ("batch", "length")


def model_of(text: str, opset: int = 20, header: str = "") -> ir.Model:
    """A model in the text syntax of ONNX: a graph, with ``float[batch, 4] x`` and the like."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}{header}]>\n{text}')
    return ir.from_proto(proto)


def rules(model: ir.Model, **signature: list[TensorSpec]) -> set[str]:
    return {finding.rule for finding in lint(model, AXES, **signature)}


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


GOOD = "g (float[batch, 4] x) => (float[batch, 4] y) { y = Sigmoid(x) }"


def test_lint_takes_a_good_model() -> None:
    x, y = (TensorSpec(name, "float32", ("batch", 4)) for name in "xy")
    assert lint(model_of(GOOD), AXES, [x], [y]) == []
    check(model_of(GOOD), AXES, [x], [y])


@pytest.mark.parametrize(
    ("rule", "graph", "opset", "header"),
    [
        ("operator", "g (float[batch, 4] x) => (int64[2, batch] y) { y = NonZero(x) }", 20, ""),
        (
            "operator",
            "g (float[batch, 4] x) => (float[batch, 4] y) { y = custom.Op(x) }",
            20,
            ', "custom": 1',
        ),
        ("opset", "g (float[batch, 4] x) => (float[batch, 4] y) { y = Sigmoid(x) }", 21, ""),
        ("opset", "g (float[batch, 4] x) => (float[batch, 4] y) { y = Sigmoid(x) }", 20, ', "custom": 1'),
        ("axis", "g (float[rows, 4] x) => (float[rows, 4] y) { y = Sigmoid(x) }", 20, ""),
        (
            "axis",  # says "batch", is always 2
            "g (float[batch, 4] x) => (float[batch, 4] y) <int64[2] s = {2, 4}> { y = Reshape(x, s) }",
            20,
            "",
        ),
        ("uint8", "g (uint8[batch, 4] x) => (uint8[4, batch] y) { y = Transpose(x) }", 20, ""),
        (
            "uint8",
            "g (uint8[batch, 4] x) => (float[4, batch] y) { t = Transpose(x) y = Cast<to = 1>(t) }",
            20,
            "",
        ),
        ("float64", "g (float[batch, 4] x) => (double[batch, 4] y) { y = Cast<to = 11>(x) }", 20, ""),
        (
            "float64",
            "g (float[batch, 4] x) => (float[batch, 4] y)"
            " { a = Cast<to = 11>(x) b = Sigmoid(a) y = Cast<to = 1>(b) }",
            20,
            "",
        ),
        ("unused", "g (float[batch, 4] x, float[batch] z) => (float[batch, 4] y) { y = Sigmoid(x) }", 20, ""),
    ],
)
def test_lint_finds(rule: str, graph: str, opset: int, header: str) -> None:
    model = model_of(graph, opset, header)
    assert rule in rules(model)
    with pytest.raises(UnsupportedError, match=rule):
        check(model, AXES)


def test_lint_finds_uint8_only_where_it_is_wrong() -> None:
    model = model_of(
        "g (uint8[batch, 4] x) => (uint8[4, batch] y)"
        " { a = Cast<to = 1>(x) b = Transpose(a) y = Cast<to = 2>(b) }"
    )
    assert lint(model, AXES) == []


def test_lint_compares_the_signature() -> None:
    x = TensorSpec("x", "float32", ("batch", 4))
    assert rules(model_of(GOOD), inputs=[x]) == set()
    for wrong in (
        TensorSpec("z", "float32", ("batch", 4)),
        TensorSpec("x", "float16", ("batch", 4)),
        TensorSpec("x", "float32", ("length", 4)),
        TensorSpec("x", "float32", (2, 4)),
    ):
        assert rules(model_of(GOOD), inputs=[wrong]) == {"signature"}
    assert rules(model_of(GOOD), outputs=[]) == {"signature"}


def test_lint_finds_names_texts_and_files() -> None:
    model = model_of(GOOD)
    model.graph.inputs[0].name = "x" * 4097
    assert rules(model) == {"name"}

    for text in ('File "/opt/place/model.py", line 3', "C:\\models\\unet", "/data/models", "file:///x"):
        model = model_of(GOOD)
        model.graph[0].metadata_props["trace"] = text
        assert rules(model) == {"machine path"}
        model = model_of(GOOD)
        model.graph[0].doc_string = text
        assert rules(model) == {"machine path"}
    model = model_of(GOOD)
    model.graph[0].metadata_props["scope"] = "unet.down_blocks.0/Conv"
    assert rules(model) == set()

    for place in ("../weights.bin", "/weights.bin", "a/../../b", "C:/w", "..\\w"):
        model = model_of("g (float[batch, 4] x) => (float[batch, 4] y) <float[4] w> { y = Add(x, w) }")
        value = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
        value.const_value = ir.ExternalTensor(place, 0, 16, ir.DataType.FLOAT, shape=ir.Shape([4]), name="w")
        model.graph[0].replace_input_with(1, value)
        model.graph.initializers.clear()
        model.graph.register_initializer(value)
        assert rules(model) == {"external data"}, place


def test_lint_finds_large_int64_weights() -> None:
    model = model_of(GOOD)
    value = ir.Value(name="w", const_value=ir.tensor(np.zeros(5000, np.int64), name="w"))
    value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([5000])
    model.graph.register_initializer(value)
    assert rules(model) == {"int64"}


def test_clean_rewrites_sequences_into_splits() -> None:
    model = model_of(
        "g (float[batch, 6] x) => (float[batch, 3] y) {"
        " n = Constant<value = int64 {3}>()"
        " one = Constant<value = int64 {1}>() zero = Constant<value = int64 {0}>()"
        " s = SplitToSequence<axis = 1>(x, n) a = SequenceAt(s, zero) b = SequenceAt(s, one) y = Sub(a, b) }"
    )
    clean(model, ())
    assert sorted(node.op_type for node in model.graph) == ["Split", "Sub"]
    x = np.random.default_rng(0).random((2, 6), np.float32)
    np.testing.assert_array_equal(run(model, x=x)[0], x[:, :3] - x[:, 3:])


@pytest.mark.parametrize("equation", ["nhwpqc->nchpwq", "abcdef->abcdef", "n h w p q c -> c q p w h n"])
def test_clean_permutes_by_transpose(equation: str) -> None:
    graph = (
        "g (float[batch, 2, 3, 4, 5, 6] x) => (float[batch, a, b, c, d, e] y)"
        f' {{ t = Einsum<equation = "{equation}">(x) y = Neg(t) }}'
    )
    model = model_of(graph)
    x = np.random.default_rng(0).standard_normal((2, 2, 3, 4, 5, 6)).astype(np.float32)
    clean(model, ())
    assert {node.op_type for node in model.graph} <= {"Neg", "Transpose"}
    if "->c" not in equation:
        np.testing.assert_array_equal(run(model, x=x)[0], -np.einsum(equation.replace(" ", ""), x))


def test_clean_leaves_an_einsum_that_adds() -> None:
    model = model_of('g (float[batch, 4] x) => (float[batch] y) { y = Einsum<equation = "bc->b">(x) }')
    clean(model, ())
    assert [node.op_type for node in model.graph] == ["Einsum"]


def test_clean_folds_constants_but_no_parameters() -> None:
    model = model_of(
        "g (float[batch, 2] x) => (float[batch, 2] y) <float[2,2] w = {1,2,3,4}, float[2] c = {4, 9}> {"
        " t = Transpose(w) a = MatMul(x, t) r = Sqrt(c) i = Identity(a) k = Cast<to = 1>(i) y = Add(k, r) }"
    )
    clean(model, ["w"])
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "Add"]
    assert model.graph.initializers["w"].const_value is None
    (folded,) = (v.const_value for v in model.graph.initializers.values() if v.const_value is not None)
    np.testing.assert_array_equal(folded.numpy(), [2, 3])


def test_clean_merges_equal_constants_and_expressions() -> None:
    model = model_of(
        "g (float[batch, 2] x) => (float[batch, 2] y) {"
        " a = Constant<value = float[2] {1, 2}>() b = Constant<value = float[2] {1, 2}>()"
        " p = Add(x, a) q = Add(x, b) y = Mul(p, q) }"
    )
    clean(model, ())
    assert [node.op_type for node in model.graph] == ["Add", "Mul"]
    assert len(model.graph.initializers) == 1


def test_cast_weights_keeps_the_result() -> None:
    weights = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float16)
    model = model_of(
        f"g (float[batch, 4] x) => (float[batch, 3] y) <float[4, 3] w = {{{','.join('0' * 12)}}}>"
        " { a = MatMul(x, w) b = Sigmoid(a) y = Mul(b, a) }"
    )
    (value,) = model.graph.initializers.values()
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    value.const_value = ir.tensor(weights.astype(np.float32), name="w")
    expected = run(model, x=x)[0]

    cast_weights(model, {"w": ir.DataType.FLOAT16})
    assert [node.op_type for node in model.graph] == ["Cast", "MatMul", "Sigmoid", "Mul"]
    value.const_value = ir.tensor(weights, name="w")
    np.testing.assert_array_equal(run(model, x=x)[0], expected)
    cast_weights(model, {"w": ir.DataType.FLOAT16})  # again: nothing left to do
    assert len(model.graph) == 4


def test_cast_weights_puts_together_what_is_stored_alike() -> None:
    model = model_of(
        "g (float[batch, 4] x) => (float[batch, 2] y)"
        " <float[2, 2] a = {0,0,0,0}, float[2, 2] b = {0,0,0,0}, float[2, 2] c = {0,0,0,0}>"
        " { w = Concat<axis = 0>(a, b) p = MatMul(x, w) v = Concat<axis = 0>(b, c) q = MatMul(x, v)"
        " y = Add(p, q) }"
    )
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((2, 2)).astype(np.float16) for name in "abc"}
    x = rng.standard_normal((3, 4)).astype(np.float32)

    def fill(dtype: type) -> None:
        for name, value in weights.items():
            model.graph.initializers[name].const_value = ir.tensor(value.astype(dtype), name=name)

    two = model.clone()
    cast_weights(two, dict.fromkeys("abc", ir.DataType.FLOAT16))  # b is read twice: each for itself
    assert [node.op_type for node in two.graph][:3] == ["Cast"] * 3
    model.graph[2].replace_input_with(0, model.graph.initializers["c"])
    fill(np.float32)
    expected = run(model, x=x)[0]
    cast_weights(model, dict.fromkeys("abc", ir.DataType.FLOAT16))
    product = ["Concat", "Cast", "MatMul"]
    assert [node.op_type for node in model.graph] == [*product, *product, "Add"]
    fill(np.float16)
    np.testing.assert_array_equal(run(model, x=x)[0], expected)


def _operator_model(operator: str) -> bytes:
    """The smallest model with an operator, in a form that editors use."""
    floats, ints, bools = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
    x, y = ("x", floats, ["batch", 3, 8, 8]), ("x2", floats, ["batch", 3, 8, 8])
    constants: dict[str, np.ndarray] = {}
    attributes: dict[str, object] = {}
    inputs, types, names = [x], [floats], ["out"]
    arguments = ["x"]
    casts: list[onnx.NodeProto] = []
    if operator in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "MatMul"):
        inputs, arguments = [x, y], ["x", "x2"]
    elif operator in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        inputs, arguments, types = [x, y], ["x", "x2"], [bools]
    elif operator in ("And", "Or"):
        casts = [helper.make_node("Cast", [a], [f"{a}b"], to=bools) for a in ("x", "x2")]
        inputs, arguments, types = [x, y], ["xb", "x2b"], [bools]
    elif operator == "Not":
        casts = [helper.make_node("Cast", ["x"], ["xb"], to=bools)]
        arguments, types = ["xb"], [bools]
    elif operator == "Where":
        casts = [helper.make_node("Cast", ["x"], ["xb"], to=bools)]
        inputs, arguments = [x, y], ["xb", "x", "x2"]
    elif operator == "IsNaN":
        types = [bools]
    elif operator == "Cast":
        attributes, types = {"to": TensorProto.FLOAT16}, [TensorProto.FLOAT16]
    elif operator == "ArgMax":
        attributes, types = {"axis": 1}, [ints]
    elif operator == "Shape":
        types = [ints]
    elif operator == "Clip":
        constants = {"low": np.float32(0), "high": np.float32(1)}
    elif operator == "Concat":
        inputs, arguments, attributes = [x, y], ["x", "x2"], {"axis": 1}
    elif operator == "DepthToSpace":
        attributes = {"blocksize": 2, "mode": "CRD"}
    elif operator == "Conv":
        constants = {"w": np.ones((4, 3, 3, 3), np.float32)}
    elif operator == "ConstantOfShape":
        casts = [helper.make_node("Shape", ["x"], ["s"])]
        arguments = ["s"]
    elif operator == "Expand":
        constants = {"s": np.array([1, 3, 8, 8])}
    elif operator == "Gather":
        constants = {"i": np.array([0, 2])}
        attributes = {"axis": 1}
    elif operator == "GatherElements":
        constants, attributes = {"i": np.zeros((1, 2, 8, 8), np.int64)}, {"axis": 1}
    elif operator == "ScatterElements":
        attributes = {"axis": 1}
        constants = {"i": np.array([[[[2]]]]), "u": np.ones((1, 1, 1, 1), np.float32)}
    elif operator == "Gemm":
        inputs, constants = [("x", floats, ["batch", 8])], {"w": np.ones((8, 4), np.float32)}
    elif operator == "InstanceNormalization":
        constants = {"s": np.ones(3, np.float32), "b": np.zeros(3, np.float32)}
    elif operator == "LayerNormalization":
        constants = {"s": np.ones(8, np.float32), "b": np.zeros(8, np.float32)}
    elif operator == "Pad":
        constants = {"p": np.array([0, 0, 0, 0, 0, 0, 1, 1])}
    elif operator == "QuantizeLinear":
        constants, types = {"s": np.float32(0.1), "z": np.int8(0)}, [TensorProto.INT8]
        names = ["q"]
    elif operator == "DequantizeLinear":
        constants = {"s": np.float32(0.1), "z": np.int8(0)}
        casts = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
        arguments = ["q"]
    elif operator == "Range":
        casts = [
            helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
            helper.make_node("Squeeze", ["s"], ["n"]),
        ]
        arguments, types = ["zero", "n", "one"], [ints]
    elif operator in ("ReduceMax", "ReduceMean", "ReduceSum"):
        constants = {"a": np.array([1])}
    elif operator == "Reshape":
        constants = {"s": np.array([0, -1])}
    elif operator == "Resize":
        constants, arguments = {"s": np.array([1, 1, 2, 2], np.float32)}, ["x", ""]
        attributes = {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
    elif operator == "Slice":
        constants = {"b": np.array([0]), "e": np.array([2]), "a": np.array([1])}
    elif operator == "Split":
        constants, attributes, names, types = {"n": np.array([1, 2])}, {"axis": 1}, ["a", "b"], [floats] * 2
    elif operator == "Squeeze":
        inputs, constants = [("x", floats, ["batch", 1, 8])], {"a": np.array([1])}
    elif operator == "TopK":
        constants, names, types = {"k": np.array([2])}, ["values", "indices"], [floats, ints]
    elif operator == "Unsqueeze":
        constants = {"a": np.array([1])}
    extra = {"zero": np.int64(0), "one": np.int64(1)} if operator == "Range" else {}
    node = helper.make_node(operator, [*arguments, *constants], names, **attributes)
    nodes = [*casts, node]
    if operator == "QuantizeLinear":  # alone, a quantization means nothing
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["out"]))
        names, types = ["out"], [floats]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*entry) for entry in inputs],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, types)],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in {**constants, **extra}.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])  # it is a valid model
    return model.SerializeToString()


@pytest.mark.rtx
@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_tensorrt_rtx_parses_every_allowed_operator(operator: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert rtx.parser_errors(_operator_model(operator)) == []


QUANTIZED = """g (float[batch, 4] x) => (float[batch, 2] y)
    <float s = {0.1}, int8 z = {0}, int8[4, 2] w = {1,2,3,4,5,6,7,8}, float[2] ws = {0.1,0.1}>
    { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
      v = DequantizeLinear<axis=1>(w, ws) y = MatMul(d, v) }"""


def test_lint_takes_quantization_in_its_form() -> None:
    assert rules(model_of(QUANTIZED)) == set()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("y = MatMul(d, v)", "t = Identity(v) y = MatMul(d, t)", "Identity"),
        ("d = DequantizeLinear(q, s, z)", "r = Identity(q) d = DequantizeLinear(r, s, z)", "Identity"),
        ("int8 z = {0}", "int8 z = {1}", "zero point"),
        ("float s = {0.1}", "float s = {0}", "positive"),
        ("q = QuantizeLinear(x, s, z)", "k = Neg(s) q = QuantizeLinear(x, k, z)", "no constant"),
    ],
)
def test_lint_finds_quantization_in_another_form(old: str, new: str, message: str) -> None:
    assert old in QUANTIZED
    findings = lint(model_of(QUANTIZED.replace(old, new)), AXES)
    assert {f.rule for f in findings} == {"quantization"}
    assert all(message in f.message for f in findings)


def test_lint_finds_mixed_precision() -> None:
    mixed = """g (float[batch, 4] x) => (float[batch, 4] y)
        { h = Cast<to=10>(x) m = Add(h, x) y = Cast<to=1>(m) }"""
    assert "precision" in rules(model_of(mixed))
