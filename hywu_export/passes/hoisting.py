"""Takes out of a step what does not change between steps, into a graph of its own that runs once per request.

What a value costs decides, not what it is called: the products that depend on neither latents nor timestep
move (text keys and values with their deltas, weights merged with deltas), if they save enough arithmetic for
every byte that the step then reads instead. Mere views, transposes or concatenations of inputs stay: moving
them would only copy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import extract
from onnx_ir.passes.common import RemoveUnusedNodesPass

from hywu_export.passes.inference import Known, infer

Dimension = int | str


@dataclass(frozen=True)
class Limits:
    """What moves.

    Attributes:
        flops_per_byte: least arithmetic that a moved value saves in each step, over the bytes that each step
            reads in its place.
        bytes: memory for all moved values at the sizes of the first probe; the least useful ones stay.
    """

    flops_per_byte: float
    bytes: float


USEFUL = Limits(8.0, 2**29)
"""A CPU core does about ten operations in the time in which it reads a byte, a GPU a hundred."""
ANY_PRODUCT = Limits(0.1, math.inf)
"""Also weights merged with deltas of small rank r, which save r / 2 a byte: they were asked for."""


_PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Moved:
    """A value that the step now reads.

    Attributes:
        name: of the tensor: the value's own name in the step, after the prefix.
        shape: sizes and axes. Where the value's first dimension is a multiple of an axis, such as guidance
            rows of the batch, the multiple is a dimension of its own in front.
        factored: whether the first dimension is such a multiple.
        flops: multiplications and additions that it took, at the sizes of the first probe.
        bytes: its size there.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtype: ir.DataType
    factored: bool
    flops: float
    bytes: int


def hoist(
    model: ir.Model,
    varying: Collection[str],
    probes: Sequence[Mapping[str, int]],
    prefix: str,
    limits: Limits = USEFUL,
) -> tuple[ir.Model, list[Moved]] | None:
    """Moves work that depends on no input in ``varying`` out of ``model``, in place.

    ``probes`` are sizes of all axes, at least three, which vary independently: shapes are inferred for each,
    and a dimension is accepted as an axis, or a multiple of one, if all of them agree. The step's inputs that
    nothing reads any more go.

    Returns:
        A model that makes the moved values from the inputs it needs, and these values in order; or None if
        nothing is worth moving.
    """
    graph = model.graph
    _measure_elsewhere(graph, varying)  # the size of latents does not vary
    changing = _downstream(graph, varying)
    computed = _downstream(graph, [str(value.name) for value in graph.inputs])  # the rest, when it is loaded
    known = [infer(model, sizes) for sizes in probes]
    candidates = []
    for node in graph:
        for value in node.outputs:
            if (
                value in changing
                or value not in computed
                or not any(user.outputs[0] in changing for user in value.consumers())
            ):
                continue
            moved = _weigh(value, known, probes, prefix)
            if moved is not None and moved.flops >= limits.flops_per_byte * moved.bytes:
                candidates.append((value, moved))
    chosen = _afford(candidates, limits.bytes)
    if not chosen:
        return None
    used = [v for v in graph.inputs if v.uses()]
    made = _split_off(model, chosen)
    for value, moved in chosen:
        _read_instead(graph, value, moved)
    RemoveUnusedNodesPass()(model)
    read = {v for v in graph.inputs if any(user.op_type != "Shape" for user in v.consumers())}
    _measure_elsewhere(graph, [str(v.name) for v in graph.inputs if v not in read])
    for value in [v for v in used if not v.uses()]:
        graph.inputs.remove(value)
    return made, [moved for _, moved in chosen]


def _measure_elsewhere(graph: ir.Graph, avoided: Collection[str]) -> None:
    """Takes sizes from other inputs than the ``avoided``, where one has the same axes."""
    staying = [value for value in graph.inputs if value.name not in avoided and value.shape is not None]
    for value in [v for v in graph.inputs if v.name in avoided and v.shape is not None]:
        assert value.shape is not None
        for node in [n for n in value.consumers() if n.op_type == "Shape"]:
            ends = node.attributes.get("start"), node.attributes.get("end")
            wanted = list(value.shape.dims[slice(*(None if a is None else a.as_int() for a in ends))])
            for other in staying:
                dims = list(other.shape.dims) if other.shape is not None else []
                at = next((i for i in range(len(dims)) if dims[i : i + len(wanted)] == wanted), None)
                if at is not None:
                    node.replace_input_with(0, other)
                    node.attributes["start"] = ir.AttrInt64("start", at)
                    node.attributes["end"] = ir.AttrInt64("end", at + len(wanted))
                    break


def _downstream(graph: ir.Graph, names: Collection[str]) -> set[ir.Value]:
    """The inputs called ``names``, and all that is computed from them."""
    found = {value for value in graph.inputs if value.name in names}
    for node in graph:
        if any(value in found for value in node.inputs if value is not None):
            found.update(node.outputs)
    return found


def _weigh(
    value: ir.Value,
    known: Sequence[Mapping[str, Known]],
    probes: Sequence[Mapping[str, int]],
    prefix: str,
) -> Moved | None:
    """``value`` as a tensor between graphs; None if its shape has no name."""
    name = str(value.name)
    if any(name not in values for values in known):
        return None
    found = [values[name].shape for values in known]
    dtype = known[0][name].type.dtype
    shape = _name_dimensions(found, probes)
    flops = _flops(value, known[0])
    size = math.prod(found[0]) * int(dtype.itemsize)
    if shape is None:
        return None
    return Moved(f"{prefix}{name}", shape, dtype, len(shape) > len(found[0]), flops, size)


def _name_dimensions(
    found: Sequence[tuple[int, ...]], probes: Sequence[Mapping[str, int]]
) -> tuple[Dimension, ...] | None:
    named: list[Dimension] = []
    for position, sizes in enumerate(zip(*found)):
        if len(set(sizes)) == 1:
            named.append(sizes[0])
            continue
        axis, factor = next(
            (
                (axis, sizes[0] // probes[0][axis])
                for axis in probes[0]
                if all(size % probe[axis] == 0 for size, probe in zip(sizes, probes))
                and len({size // probe[axis] for size, probe in zip(sizes, probes)}) == 1
            ),
            (None, 0),
        )
        if axis is None or (factor > 1 and position > 0):
            return None
        named += [axis] if factor == 1 else [factor, axis]
    return tuple(named)


def _flops(value: ir.Value, known: Mapping[str, Known]) -> float:
    """Two per multiplication of every product that ``value`` is made of."""
    total, waiting, seen = 0.0, [value], set[ir.Node]()
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [v for v in node.inputs if v is not None]
        out = known.get(str(node.outputs[0].name))
        if node.op_type in _PRODUCTS and out is not None:
            total += 2.0 * math.prod(out.shape) * _reduction(node, known)
    return total


def _reduction(node: ir.Node, known: Mapping[str, Known]) -> int:
    """How many products every number of a product's output is the sum of."""
    operand = node.inputs[1] if node.op_type == "Conv" else node.inputs[0]
    assert operand is not None
    if str(operand.name) in known:
        shape = known[str(operand.name)].shape
    else:  # an initializer
        assert operand.shape is not None
        shape = tuple(int(d) for d in operand.shape.numpy())
    if node.op_type == "Conv":
        return math.prod(shape[1:])
    turned = node.op_type == "Gemm" and "transA" in node.attributes and node.attributes["transA"].as_int()
    return shape[0] if turned else shape[-1]


def _afford(candidates: Sequence[tuple[ir.Value, Moved]], most_bytes: float) -> list[tuple[ir.Value, Moved]]:
    """The candidates that save most for their size, in the order of the graph."""
    left, kept = most_bytes, set[str]()
    for _, moved in sorted(candidates, key=lambda c: -c[1].flops / c[1].bytes):
        if moved.bytes <= left:
            left -= moved.bytes
            kept.add(moved.name)
    return [(value, moved) for value, moved in candidates if moved.name in kept]


def _split_off(model: ir.Model, chosen: Sequence[tuple[ir.Value, Moved]]) -> ir.Model:
    """A model that makes the chosen values, under their new names."""
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    made = [values[str(value.name)] for value, _ in chosen]
    needed = _upstream(made)
    inputs = [v for v in copy.graph.inputs if v in needed]
    graph = extract(copy.graph, [str(v.name) for v in inputs], [str(v.name) for v in made])
    for position, (_, moved) in enumerate(chosen):
        output = graph.outputs[position]
        if moved.factored:
            output = _part_rows(graph, output, moved)
            graph.outputs[position] = output
        output.name = moved.name
        output.type, output.shape = ir.TensorType(moved.dtype), ir.Shape(list(moved.shape))
    graph.name = model.graph.name
    _order_initializers(graph)  # extract has them in a set
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name, functions=())


def _order_initializers(graph: ir.Graph) -> None:
    """By first use, so that the same model gives the same bytes."""
    used = [value.name for node in graph for value in node.inputs if value is not None]
    place = {name: index for index, name in reversed(list(enumerate(used)))}
    values = sorted(graph.initializers.values(), key=lambda value: place.get(value.name, len(used)))
    graph.initializers.clear()
    for value in values:
        graph.initializers.add(value)


def _upstream(values: Sequence[ir.Value]) -> set[ir.Value]:
    found: set[ir.Value] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value in found:
            continue
        found.add(value)
        node = value.producer()
        if node is not None:
            waiting += [v for v in node.inputs if v is not None]
    return found


def _read_instead(graph: ir.Graph, value: ir.Value, moved: Moved) -> None:
    """Lets an input stand for ``value``."""
    given = ir.Value(name=moved.name, type=ir.TensorType(moved.dtype), shape=ir.Shape(list(moved.shape)))
    graph.inputs.append(given)
    stand_in = given
    if moved.factored:
        stand_in = _join_rows(graph, given, value.name or "", moved)
    value.replace_all_uses_with(stand_in)


def _part_rows(graph: ir.Graph, value: ir.Value, moved: Moved) -> ir.Value:
    """``[rows * n, ...]`` as ``[rows, n, ...]``, at the end of ``graph``."""
    name, rest = value.name, [0] * (len(moved.shape) - 2)  # 0 keeps a size
    padded = _node(graph, "Unsqueeze", value, [0], f"{name}/rows")
    parted = _node(graph, "Reshape", padded.outputs[0], [int(moved.shape[0]), -1, *rest], f"{name}/parted")
    graph.extend([padded, parted])
    return parted.outputs[0]


def _join_rows(graph: ir.Graph, value: ir.Value, name: str, moved: Moved) -> ir.Value:
    """``[rows, n, ...]`` as ``[rows * n, ...]``, at the start of ``graph``."""
    rest = [0] * (len(moved.shape) - 2)
    joined = _node(graph, "Reshape", value, [1, -1, *rest], f"{name}/joined")
    bare = _node(graph, "Squeeze", joined.outputs[0], [0], f"{name}/given")
    graph.insert_before(graph[0], [joined, bare])
    return bare.outputs[0]


def _node(graph: ir.Graph, kind: str, value: ir.Value, sizes: Sequence[int], name: str) -> ir.Node:
    tensor = ir.tensor(np.array(sizes, np.int64), name=f"constant/{name}")
    constant = ir.Value(name=tensor.name, const_value=tensor)
    constant.type, constant.shape = ir.TensorType(tensor.dtype), ir.Shape([len(sizes)])
    graph.register_initializer(constant)
    node = ir.node(kind, [value, constant], name=name)
    node.outputs[0].name, node.outputs[0].type = name, value.type
    return node
