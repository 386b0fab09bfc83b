"""FP16 and BF16 as a property of the graph: explicit casts around the nodes that stay in FP32.

Strongly typed engines take the precision from the graph, so every node computes in exactly one
floating-point type here. Inputs and outputs of the graph keep theirs. What is wide by structure:

- the *rim*: arithmetic on what enters the graph before the first product (MatMul, Gemm, Conv), and
  everything after the last one: pixel normalisation, the embedding of the timestep, guidance, the sampler's
  update, the cutting of tokens into deltas;
- reductions, norms and functions that lose range or digits (``WIDE_OPERATORS``), and the arithmetic that
  only feeds them, such as the square of an RMS norm;
- nodes with a constant that the narrow type does not hold.

What is wide by measurement is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Half = Literal["fp16", "bf16"]
Types: TypeAlias = dict[ir.Value, ir.DataType | None]

DTYPES: dict[Half, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LARGEST_FP16 = 65504.0
LEAST_FP16 = 2.0**-14
"""The smallest FP16 number with all its digits."""

PRODUCTS = frozenset(["MatMul", "Gemm", "Conv"])
WIDE_OPERATORS = frozenset(
    [
        "Cos", "Erf", "Exp", "InstanceNormalization", "LayerNormalization", "Log", "Pow", "Range",
        "Reciprocal", "ReduceMax", "ReduceMean", "ReduceSum", "Sin", "Softmax", "Sqrt",
    ]
)  # fmt: skip
QUANTIZERS = frozenset(["DequantizeLinear", "QuantizeLinear"])
MOVEMENTS = frozenset(
    [
        "Concat", "Expand", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
        "Unsqueeze", "Where",
    ]
)  # fmt: skip
"""Operators that move numbers without computing."""

_SUFFIXES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_TABLE_BYTES = 64 * 2**10
_FIXED_INPUTS = {"Resize": (0,)}
"""Operators whose other floating-point inputs have a type of their own."""


def to_half(model: ir.Model, dtype: Half, wide: Collection[str] = ()) -> ir.Model:
    """Lets a model in FP32 compute in ``dtype``, in place, and returns it; the signature stays.

    Weights become ``dtype`` when they are read (memory does not grow with the model); linked ones stay as
    they are, with a Cast.

    Args:
        wide: names of nodes that stay in FP32, beside those of :func:`structure`.
    """
    graph = model.graph
    narrow = DTYPES[dtype]
    kept = {*wide, *structure(model, dtype)}
    for node in graph:  # a DequantizeLinear computes as its product does: nothing stands between
        if node.op_type == "DequantizeLinear" and all(
            use.node.name in kept for use in node.outputs[0].uses()
        ):
            kept.add(node.name or "")
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    types: Types = {v: v.dtype for v in (*graph.inputs, *graph.initializers.values())}

    def cast(value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in casts:
            casts[value, to] = _cast(graph, value, to)
            types[casts[value, to]] = to
        return casts[value, to]

    outputs = {value.name: value.dtype for value in graph.outputs}
    for node in list(graph):
        to = ir.DataType.FLOAT if node.name in kept or not _floating(node, types) else narrow
        for index in _floating_inputs(node, types):
            value = node.inputs[index]
            assert value is not None
            if types[value] != to and node.op_type not in ("Cast", "Shape"):
                node.replace_input_with(index, cast(value, to))
        for index, output in enumerate(node.outputs):
            types[output] = _output_type(node, types, index)
            if not output.is_graph_output() and _is_floating(output.dtype):
                output.type = ir.TensorType(to)
    for index, output in enumerate(graph.outputs):
        declared = outputs[output.name]
        if declared is not None and types.get(output, declared) != declared:
            _cast_output(graph, index, declared, types[output])
    _clean(model)
    return model


def emulate(model: ir.Model) -> ir.Model:
    """What a model of :func:`to_half` computes, in FP32 with a rounding after every narrow node; a new model.

    ONNX Runtime's CPU has no BF16 products, and for FP16 it leaves the roundings between nodes out: what a
    GPU gives is seen by rounding each result, as products are summed up in FP32 there too.
    """
    copy = model.clone()
    graph = copy.graph
    types = value_types(graph)
    narrow = set(DTYPES.values())
    for value in list(graph.initializers.values()):
        if types[value] in narrow and value.const_value is not None:
            wide = _stored(graph, value, ir.DataType.FLOAT, "emulated")
            value.replace_all_uses_with(wide)
    for node in list(graph):
        if node.op_type == "Cast" and types.get(node.outputs[0]) == ir.DataType.FLOAT:
            if node.inputs[0] is not None and types.get(node.inputs[0]) in narrow:
                _replace_by_identity(graph, node)
            continue
        for output in node.outputs:
            to = types.get(output)
            if to not in narrow or to is None:
                continue
            output.type = ir.TensorType(to if node.op_type == "Cast" else ir.DataType.FLOAT)
            if node.op_type not in MOVEMENTS:
                _round_after(graph, node, output, to)
    _remove_unused(copy)
    return copy


def round_product(graph: ir.Graph, node: ir.Node, dtype: Half) -> None:
    """Lets a product in FP32 read its operands rounded, and what reads it its rounded result."""
    to = DTYPES[dtype]
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        narrow = ir.node("Cast", [value], {"to": to}, name=f"{node.name}/{index}/rounded")
        wide = ir.node("Cast", narrow.outputs, {"to": ir.DataType.FLOAT}, name=f"{node.name}/{index}/widened")
        for cast in (narrow, wide):
            cast.outputs[0].name = cast.name
        graph.insert_before(node, [narrow, wide])
        node.replace_input_with(index, wide.outputs[0])
    output = node.outputs[0]
    name = output.name
    output.name = f"{name}/exact"
    narrow = ir.node("Cast", [output], {"to": to}, name=f"{name}/rounded")
    wide = ir.node("Cast", narrow.outputs, {"to": ir.DataType.FLOAT}, name=f"{name}/widened")
    narrow.outputs[0].name, wide.outputs[0].name = narrow.name, name
    ir.convenience.replace_all_uses_with(output, wide.outputs[0], replace_graph_outputs=True)
    narrow.replace_input_with(0, output)
    graph.insert_after(node, [narrow, wide])


def _round_after(graph: ir.Graph, node: ir.Node, value: ir.Value, to: ir.DataType) -> None:
    """Lets what reads ``value`` read it rounded to ``to``, as FP32."""
    uses = list(value.uses())
    rounded = value
    made = []
    for dtype, suffix in ((to, "rounded"), (ir.DataType.FLOAT, "widened")):
        if node.op_type == "Cast" and dtype == to:
            continue
        cast = ir.node("Cast", [rounded], {"to": dtype}, name=f"{value.name}/{suffix}")
        rounded = cast.outputs[0]
        rounded.name, rounded.shape, rounded.type = cast.name, value.shape, ir.TensorType(dtype)
        made.append(cast)
    graph.insert_after(node, made)
    for use in uses:
        use.node.replace_input_with(use.idx, rounded)


def _replace_by_identity(graph: ir.Graph, node: ir.Node) -> None:
    output = node.outputs[0]
    identity = ir.node("Identity", node.inputs, name=node.name)
    identity.outputs[0].name, identity.outputs[0].shape = output.name, output.shape
    identity.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(node, identity)
    ir.convenience.replace_all_uses_with(output, identity.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def structure(model: ir.Model, dtype: Half) -> dict[str, str]:
    """The nodes that stay in FP32 whatever the numbers are: name to reason."""
    graph = model.graph
    types = value_types(graph)
    reasons: dict[ir.Node, str] = {}
    before, after = _rim(graph, types)
    for node in graph:
        if not _floating(node, types):
            continue
        if node.op_type in QUANTIZERS:
            continue  # as their product does: nothing stands between
        if node.op_type in WIDE_OPERATORS:
            reasons[node] = f"{node.op_type} needs range and digits"
        elif node in after or (node in before and node.op_type not in MOVEMENTS):
            reasons[node] = "at the graph's rim"
        elif dtype == "bf16" and node.op_type == "Resize":
            reasons[node] = "Resize in BF16 is not supported everywhere"
        elif dtype == "fp16" and (constant := _unheld_constant(node)) is not None:
            reasons[node] = f"constant {constant} is beyond FP16"
    for node in reversed(list(graph)):  # what only feeds wide nodes is not rounded in between
        if node in reasons or node.op_type in PRODUCTS or not _floating(node, types):
            continue
        readers = [use.node for output in node.outputs for use in output.uses()]
        numeric = [reader for reader in readers if reader.op_type != "Shape"]
        arithmetic = node.op_type not in MOVEMENTS
        made_wide = all(
            v.producer() is None or v.producer() in reasons for v in _floating_values(node, types)
        )
        if (
            numeric
            and all(reader in reasons for reader in numeric)
            and (arithmetic or (made_wide and not _reads_table(node)))
        ):
            reasons[node] = "only what stays in FP32 reads it"
    return {node.name or "": reason for node, reason in reasons.items()}


def _rim(graph: ir.Graph, types: Types) -> tuple[set[ir.Node], set[ir.Node]]:
    """The nodes before any product, and those after the last one."""
    behind: set[ir.Value] = set()  # values with a product behind them
    for node in graph:
        if node.op_type in PRODUCTS or any(v in behind for v in _floating_values(node, types)):
            behind.update(node.outputs)
    ahead: set[ir.Value] = set()  # values that a product ahead of them reads
    for node in reversed(list(graph)):
        if node.op_type in PRODUCTS or any(v in ahead for v in node.outputs):
            ahead.update(v for v in node.inputs if v is not None)
    others = [node for node in graph if node.op_type not in PRODUCTS]
    return (
        {node for node in others if not any(v in behind for v in node.outputs)},
        {node for node in others if not any(v in ahead for v in node.outputs)},
    )


def value_types(graph: ir.Graph) -> Types:
    """The type of every value, as far as it matters which floating-point one it is."""
    types: Types = {v: v.dtype for v in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        for index, output in enumerate(node.outputs):
            types[output] = _output_type(node, types, index)
    return types


def _output_type(node: ir.Node, types: Types, index: int) -> ir.DataType | None:
    """The type of one of a node's outputs from those of its inputs."""
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in ("Shape", "ArgMax") or (node.op_type == "TopK" and index == 1):
        return ir.DataType.INT64
    if node.op_type in (
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "IsNaN",
        "Not",
        "And",
        "Or",
    ):
        return ir.DataType.BOOL
    if node.op_type == "QuantizeLinear":
        return ir.DataType.INT8
    if node.op_type == "ConstantOfShape":
        attribute = node.attributes.get("value")
        return ir.DataType.FLOAT if attribute is None else attribute.as_tensor().dtype
    first = {"DequantizeLinear": 1, "Where": 1}.get(node.op_type, 0)
    value = node.inputs[first]
    return None if value is None else types.get(value)


def _is_floating(dtype: ir.DataType | None) -> bool:
    return dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _floating_inputs(node: ir.Node, types: Types) -> list[int]:
    """The inputs that have the type in which the node computes."""
    indices = _FIXED_INPUTS.get(node.op_type, range(len(node.inputs)))
    return [i for i in indices if (value := node.inputs[i]) is not None and _is_floating(types.get(value))]


def _floating_values(node: ir.Node, types: Types) -> list[ir.Value]:
    return [value for i in _floating_inputs(node, types) if (value := node.inputs[i]) is not None]


def _floating(node: ir.Node, types: Types) -> bool:
    """Whether a node computes with floating-point numbers; casts and shapes do not."""
    return node.op_type not in ("Cast", "Shape") and bool(_floating_inputs(node, types))


def _reads_table(node: ir.Node) -> bool:
    """Whether a node looks up rows of a large constant, which is stored narrow like a weight."""
    data = node.inputs[0]
    tensor = None if data is None else data.const_value
    return node.op_type == "Gather" and tensor is not None and tensor.nbytes > _TABLE_BYTES


def _unheld_constant(node: ir.Node) -> str | None:
    """A constant that FP16 does not hold: one beyond its range, or all so small that digits are lost."""
    for value in node.inputs:
        tensor = None if value is None else value.const_value
        if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        largest = float(np.abs(tensor.numpy()).max(initial=0))
        if largest > LARGEST_FP16 or 0 < largest < LEAST_FP16:
            return value.name
    return None


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType) -> ir.Value:
    """``value`` as ``to``: the same weight stored narrow, what a Cast was made from, or a Cast after it."""
    suffix = _SUFFIXES[to]
    if value.is_initializer() and value.const_value is not None and not hasattr(value.const_value, "link"):
        return _stored(graph, value, to, suffix)
    maker = value.producer()
    if (
        maker is not None
        and maker.op_type == "Cast"
        and maker.inputs[0] is not None
        and maker.inputs[0].dtype == to
    ):
        return maker.inputs[0]  # a weight that is linked in this type already
    node = ir.node("Cast", [value], {"to": to}, name=f"{value.name}/{suffix}")
    result = node.outputs[0]
    result.name, result.shape, result.type = node.name, value.shape, ir.TensorType(to)
    graph.insert_before(graph[0], node) if maker is None else graph.insert_after(maker, node)
    return result


def _stored(graph: ir.Graph, value: ir.Value, to: ir.DataType, suffix: str) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None
    name = f"{value.name}/{suffix}"
    shape = ir.Shape(tensor.shape.numpy())
    result = ir.Value(name=name, shape=shape, type=ir.TensorType(to))
    result.const_value = ir.LazyTensor(
        lambda: ir.Tensor(_round(tensor.numpy(), to), dtype=to, name=name), to, shape, name=name
    )
    graph.register_initializer(result)
    return result


def _round(values: npt.NDArray[Any], to: ir.DataType) -> npt.NDArray[Any]:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(values.astype(to.numpy()))


def _cast_output(graph: ir.Graph, index: int, declared: ir.DataType, narrow: ir.DataType | None) -> None:
    """A graph output in its declared type, under its own name."""
    value = graph.outputs[index]
    value.type = None if narrow is None else ir.TensorType(narrow)
    node = ir.node("Cast", [value], {"to": declared}, name=f"{value.name}/output")
    result = node.outputs[0]
    result.name, value.name = value.name, f"{value.name}/narrow"
    result.shape, result.type = value.shape, ir.TensorType(declared)
    graph.outputs[index] = result
    graph.append(node)


def _clean(model: ir.Model) -> None:
    """Drops weights that only their narrow copies stand for, which take the names; and casts without use."""
    _remove_unused(model)
    initializers = model.graph.initializers
    for name in list(initializers):
        original, slash, suffix = name.rpartition("/")
        if slash and suffix in ("fp16", "bf16") and original not in initializers:
            value = initializers[name]
            value.name = original


def _remove_unused(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
