"""What a graph must not contain, so that ONNX Runtime and every TensorRT from 10.3 on take it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from hywu_export.passes.half import value_types
from hywu_export.passes.quiet import quiet
from hywu_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from hywu_export.tracing.spec import TensorSpec

MAX_OPSET = 20
MAX_NAME_BYTES = 4096
MAX_INT64_WEIGHT = 4096
"""Elements of an int64 initializer: shapes and indices are small, and int64 arithmetic is slow on devices."""

OPERATORS = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "Cast",
        "Clip",
        "Concat",
        "ConstantOfShape",
        "Conv",
        "Cos",
        "DepthToSpace",
        "DequantizeLinear",
        "Div",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Floor",
        "Gather",
        "GatherElements",
        "Gelu",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "InstanceNormalization",
        "IsNaN",
        "LayerNormalization",
        "Less",
        "LessOrEqual",
        "Log",
        "MatMul",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pad",
        "Pow",
        "QuantizeLinear",
        "Range",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Relu",
        "Reshape",
        "Resize",
        "Round",
        "ScatterElements",
        "Shape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "TopK",
        "Transpose",
        "Unsqueeze",
        "Where",
    ]
)
"""Operators that graphs may use: what editors need, each parsed by TensorRT-RTX in the tests."""

MORE_OPERATORS = OPERATORS | frozenset(
    """
    Acos Acosh ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu ConvTranspose Cosh
    CumSum DepthToSpace Einsum Elu GatherND GlobalAveragePool GlobalMaxPool GridSample
    GroupNormalization HardSigmoid HardSwish IsInf LeakyRelu LogSoftmax MaxPool Mean Mish Mod OneHot PRelu
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMin ReduceProd ReduceSumSquare
    ScatterND Selu Sign Sinh Size Softplus Softsign SpaceToDepth Sum Tan ThresholdedRelu Tile TopK Trilu Xor
    """.split()  # noqa: SIM905
)
"""Operators of any module: those of the standard that TensorRT's parser knows (its docs/operators.md)."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_OWN_TYPES = ("DequantizeLinear", "QuantizeLinear", "Resize")
"""Operators whose floating-point inputs may differ."""
_MACHINE_PATH = re.compile(r"""(?:^|[\s'"(=,:])(?:/[\w.+-]+/[\w.+-]|~/|[A-Za-z]:[\\/]|file:)""")


@dataclass(frozen=True)
class Finding:
    """One violation: the rule, the thing, and what is wrong with it."""

    rule: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.rule}]"


def lint(
    model: ir.Model,
    axes: Collection[str],
    inputs: Sequence[TensorSpec] | None = None,
    outputs: Sequence[TensorSpec] | None = None,
    operators: Collection[str] = OPERATORS,
) -> list[Finding]:
    """All violations of the rules for graphs; the model is not changed.

    Args:
        axes: names of the axes that the manifest declares.
        inputs, outputs: the declared signature, which the model must have. None: it is not compared.
        operators: those that the graph may use.
    """
    with quiet():
        findings = [
            *_opsets(model),
            *_operators(model, operators),
            *_names(model.graph),
            *_texts(model),
            *_external(model.graph),
            *_unused(model.graph),
            *_axes(model.graph, axes),
        ]
        if inputs is not None:
            findings += _signature("input", model.graph.inputs, inputs)
        if outputs is not None:
            findings += _signature("output", model.graph.outputs, outputs)
        if not any(f.rule in ("opset", "operator") for f in findings):  # inference needs known operators
            inferred = _infer(model)
            findings += _frozen(model.graph, inferred.graph)
            findings += _types(inferred.graph)
            findings += _precision(model.graph)
            findings += _quantization(model.graph)
    return findings


def check(
    model: ir.Model,
    axes: Collection[str],
    inputs: Sequence[TensorSpec] | None = None,
    outputs: Sequence[TensorSpec] | None = None,
    name: str = "graph",
    operators: Collection[str] = OPERATORS,
) -> None:
    """Raises an error that lists the findings of :func:`lint`, if there are any.

    Raises:
        UnsupportedError: the graph breaks a rule.
    """
    findings = lint(model, axes, inputs, outputs, operators)
    if findings:
        shown = "; ".join(str(finding) for finding in findings[:5])
        more = f" (and {len(findings) - 5} more)" if len(findings) > 5 else ""
        raise UnsupportedError(
            f"Graph {name!r} breaks the rules for graphs: {shown}{more}",
            "Graphs use the operators and forms that ONNX Runtime and TensorRT share",
            "Change the module that was traced, or extend the cleaning passes",
        )


def _opsets(model: ir.Model) -> Iterator[Finding]:
    for domain, version in model.opset_imports.items():
        if domain != "":
            yield Finding("opset", domain, "only the standard domain is allowed")
        elif version > MAX_OPSET:
            yield Finding("opset", "model", f"opset {version} is above {MAX_OPSET}")
    for function in model.functions.values():
        yield Finding("opset", function.name, "functions must be inlined")


def _operators(model: ir.Model, allowed: Collection[str]) -> Iterator[Finding]:
    for node in model.graph:
        if node.domain != "" or node.op_type not in allowed:
            operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            yield Finding("operator", node.name or "a node", f"operator {operator} is not on the list")


def _names(graph: ir.Graph) -> Iterator[Finding]:
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        if not value.name:
            yield Finding("name", "graph", "an input, output or initializer has no name")
        elif len(value.name.encode()) > MAX_NAME_BYTES:
            yield Finding("name", value.name[:64] + "…", f"the name is longer than {MAX_NAME_BYTES} bytes")


def _texts(model: ir.Model) -> Iterator[Finding]:
    """Names, documentation and metadata must not tell about the machine that made the file."""
    graph = model.graph
    owners = [model, graph, *graph, *graph.inputs, *graph.initializers.values()]
    owners += [output for node in graph for output in node.outputs]
    for owner in owners:
        name = getattr(owner, "name", None) or "model"
        texts = (name, owner.doc_string or "", *owner.metadata_props.values())
        if any(_MACHINE_PATH.search(text) for text in texts):
            yield Finding(
                "machine path", str(name), "a name, a doc string or metadata holds an absolute path"
            )


def _external(graph: ir.Graph) -> Iterator[Finding]:
    for name, value in graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            place = str(value.const_value.location).replace("\\", "/")
            if place.startswith("/") or ":" in place or ".." in place.split("/"):
                yield Finding("external data", name, f"{place!r} leads out of the bundle")


def _unused(graph: ir.Graph) -> Iterator[Finding]:
    for value in graph.inputs:
        if not value.uses() and not value.is_graph_output():
            yield Finding("unused", str(value.name), "nothing reads this input; TensorRT would drop it")


def _axes(graph: ir.Graph, axes: Collection[str]) -> Iterator[Finding]:
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is None:
            yield Finding("axis", str(value.name), "the shape is unknown")
            continue
        for dimension in value.shape:
            if isinstance(dimension, ir.SymbolicDim) and dimension.value not in axes:
                yield Finding("axis", str(value.name), f"dimension {dimension.value!r} is no declared axis")


def _signature(kind: str, values: Sequence[ir.Value], tensors: Sequence[TensorSpec]) -> Iterator[Finding]:
    found = [value.name for value in values]
    declared = [tensor.name for tensor in tensors]
    if found != declared:
        yield Finding("signature", "graph", f"{kind}s are {found}, declared {declared}")
        return
    for value, tensor in zip(values, tensors):
        shape = (
            None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
        )
        if shape != tuple(tensor.shape):
            yield Finding("signature", tensor.name, f"the shape is {shape}, declared {tuple(tensor.shape)}")
        if value.dtype is None or value.dtype.numpy().name != tensor.dtype:
            yield Finding("signature", tensor.name, f"the dtype is {value.dtype}, declared {tensor.dtype}")


def _infer(model: ir.Model) -> ir.Model:
    """A copy with the shapes and types that follow from the inputs alone."""
    copy = model.clone()
    for node in copy.graph:
        for output in node.outputs:
            output.shape = None
    ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(copy)
    return copy


def _frozen(declared: ir.Graph, inferred: ir.Graph) -> Iterator[Finding]:
    for before, after in zip(declared.outputs, inferred.outputs):
        for axis, size in zip(before.shape or (), after.shape or ()):
            if isinstance(axis, ir.SymbolicDim) and isinstance(size, int):
                yield Finding("axis", str(before.name), f"axis {axis.value!r} is frozen at {size}")


def _types(graph: ir.Graph) -> Iterator[Finding]:
    for name, value in graph.initializers.items():
        size = 1
        for dimension in value.shape or ():
            size *= dimension if isinstance(dimension, int) else 1
        if value.dtype == ir.DataType.INT64 and size > MAX_INT64_WEIGHT:
            yield Finding("int64", name, f"an int64 initializer of {size} elements")
    for value in (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)):
        if value.dtype == ir.DataType.DOUBLE:
            yield Finding("float64", str(value.name), "TensorRT has no float64")
        if value.dtype == ir.DataType.UINT8 and not _beside_cast(value):
            yield Finding(
                "uint8", str(value.name), "uint8 is allowed only between a Cast and an input or output"
            )


def _precision(graph: ir.Graph) -> Iterator[Finding]:
    """A node computes in one floating-point type: strongly typed engines convert nothing by themselves."""
    known = value_types(graph)
    for node in graph:
        if node.op_type in _OWN_TYPES:
            continue
        types = {known.get(v) for v in node.inputs if v is not None} & set(_FLOATS)
        if len(types) > 1:
            names = ", ".join(sorted(str(t) for t in types))
            yield Finding("precision", node.name or node.op_type, f"{node.op_type} reads {names}")


def _quantization(graph: ir.Graph) -> Iterator[Finding]:
    """Q and DQ in the one form that TensorRT from 10.3 on fuses (passes.quantize)."""
    known = value_types(graph)
    for node in graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        where, quantizes = node.name or node.op_type, node.op_type == "QuantizeLinear"
        readers = [use.node for use in node.outputs[0].uses()]
        allowed = ("DequantizeLinear",) if quantizes else ("Conv", "Gemm", "MatMul")
        for reader in readers:
            if reader.op_type not in allowed:
                yield Finding("quantization", where, f"{reader.op_type} {reader.name!r} stands behind it")
        scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        if scale is None or scale.const_value is None:
            yield Finding("quantization", where, "its scale is no constant")
        elif not (scale.const_value.numpy() > 0).all():
            yield Finding("quantization", where, "a scale is not positive")
        elif quantizes and node.inputs[0] is not None and known.get(node.inputs[0]) != scale.dtype:
            yield Finding("quantization", where, f"its scale is {scale.dtype}, what it reads is not")
        if zero is not None and (
            zero.dtype != ir.DataType.INT8 or zero.const_value is None or zero.const_value.numpy().any()
        ):
            yield Finding("quantization", where, "its zero point is not INT8 zero")


def _beside_cast(value: ir.Value) -> bool:
    if value.is_graph_input():
        return all(node.op_type == "Cast" for node in value.consumers()) and not value.is_graph_output()
    producer = value.producer()
    casted = producer is not None and producer.op_type == "Cast"
    return value.is_graph_output() and casted and not value.uses()
