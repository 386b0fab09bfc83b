"""torch → ONNX for one graph."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import sympy
import torch
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

from hywu_export.passes.cleaning import clean
from hywu_export.passes.delta_axis import free_delta_axis
from hywu_export.passes.naming import name_by_scope
from hywu_export.passes.quiet import quiet
from hywu_export.passes.stacks import unstack
from hywu_export.tracing.fake import traceable
from hywu_export.tracing.sizes import Sizes
from hywu_export.tracing.spec import (
    DTYPES,
    TILE,
    Axis,
    GraphSpec,
    Inferred,
    TensorSpec,
    Transform,
    resolve_axis,
)
from hywu_export.tracing.stacks import traced_whole
from hywu_runtime.errors import UnsupportedError

OPSET = 20
_SIGNATURE_TYPES = {ir.DataType.from_numpy(np.dtype(name)).name: name for name in DTYPES}
IR_VERSION = 10


@dataclass
class TracedGraph:
    """A graph without its weights.

    A parameter stands in the graph as it is, or as what its transform makes of it.

    Attributes:
        name: the graph's name in the bundle.
        model: an onnx-ir model; initializers listed in ``initializers`` have a type and a shape, no value.
        initializers: initializer name → parameter name (``<component>.<name in the checkpoint>``).
        inputs, outputs: the declared signature, which the model has.
        transforms: initializer name → what makes it of its parameter, where it is not the parameter itself.
        aliases: parameter name → the other names of the same tensor, where parameters are tied.
        values: name → dtype and shape of the values between nodes that could be inputs and outputs.
        axes: the axes of these shapes that nothing declares, by name.
        stage, stage_of: as in the manifest.
    """

    name: str
    model: ir.Model
    initializers: dict[str, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    transforms: dict[str, Transform] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    values: dict[str, TensorSpec] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    stage: int = 0
    stage_of: str | None = None

    def signature(self) -> dict[str, object]:
        """Inputs and outputs as the manifest writes them, and the stage."""
        signature: dict[str, object] = {
            "inputs": [tensor.to_dict() for tensor in self.inputs],
            "outputs": [tensor.to_dict() for tensor in self.outputs],
        }
        if self.stage_of is not None:
            signature |= {"stage": self.stage, "stage_of": self.stage_of}
        return signature


def trace(spec: GraphSpec, axes: Mapping[str, Axis]) -> TracedGraph:
    """Traces a module to ONNX (opset 20, IR 10, standard operators only).

    Parameters may be real or without data (:func:`~hywu_export.tracing.fake.fake_module`): the graph is the
    same, to the byte. Every axis named in a shape is free in the graph, and carries its name. An axis with
    ``one_or`` is traced with size 1, where every operation broadcasts it, and freed afterwards:
    torch.export would tie it to the batch.

    Raises:
        UnsupportedError: the module fixes an axis that is declared free, returns other shapes or dtypes than
            declared, or uses something that has no form in the allowed operators.
    """
    with quiet():
        return _trace(spec, _Sizes(spec, axes), axes)


def _trace(spec: GraphSpec, sizes: _Sizes, axes: Mapping[str, Axis]) -> TracedGraph:
    # Of NumPy, whose zeros take no memory until they are touched: the deltas of a large model are gigabytes.
    arguments = tuple(torch.from_numpy(np.zeros(sizes.example(t), t.dtype)) for t in spec.inputs)
    with traced_whole(spec.module) as stacks, traceable(spec.module), torch.no_grad():
        try:
            program = torch.export.export(
                spec.module, arguments, dynamic_shapes=sizes.dynamic_shapes(), strict=False
            )
        except (UserError, ConstraintViolationError, GuardOnDataDependentSymNode) as error:
            raise UnsupportedError(
                f"Graph {spec.name!r} cannot be traced with its axes free: {_excerpt(error)}",
                f"The module must work for every size of {', '.join(sizes.named_axes())}",
                "Correct the limits or the multiple of the axis, or the module's use of its size",
            ) from error
        symbols, outputs, units, same = _check_program(spec, sizes, program)
        try:
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
            )
        except torch.onnx.OnnxExporterError as error:
            raise UnsupportedError(
                f"Graph {spec.name!r} has no ONNX form: {_excerpt(error.__cause__ or error)}",
                f"Its operations must exist in opset {OPSET}",
                "Write the module with other operations",
            ) from error
    assert exported is not None  # with dynamo, a program is returned or an error raised
    model = exported.model
    model.ir_version = IR_VERSION
    signature = program.graph_signature
    parameters = {*signature.parameters, *(set(signature.buffers) - set(signature.non_persistent_buffers))}
    _declare(model, spec.inputs, outputs, symbols)
    clean(model, parameters)
    names = Sizes(axes, units, same)
    shapes = {value: value.shape for node in model.graph for value in node.outputs if value.shape is not None}
    if sizes.shared_axes:
        free_delta_axis(model, sizes.shared_axes, spec.name)
        shapes = {  # of what the sets of deltas are in, the shape with their axis
            value: shape if value.shape is None or not _has(value.shape, sizes.shared_axes) else value.shape
            for value, shape in shapes.items()
        }
    types = {value: value.dtype for value in shapes}
    unstack(model, stacks)
    parameters = parameters - set(stacks) | {part for parts in stacks.values() for part in parts}
    name_by_scope(model, parameters)
    if spec.tile is not None:
        model.metadata_props[TILE] = str(spec.tile)
    _sign(
        model.graph, spec.inputs, outputs
    )  # passes may have merged the shape of an output with what they inferred
    used = [name for name in model.graph.initializers if name in parameters]
    return TracedGraph(
        name=spec.name,
        model=model,
        initializers={name: name for name in used},
        inputs=tuple(spec.inputs),
        outputs=outputs,
        aliases=_aliases(spec.module, used),
        values=_values_between(model.graph, shapes, types, names),
        axes=names.made,
    )


class _Sizes:
    """Sizes and torch dimensions of a graph's axes: each is a whole multiple of one unit per root axis."""

    def __init__(self, spec: GraphSpec, axes: Mapping[str, Axis]):
        self._spec = spec
        self.shared_axes = tuple(
            name for name in self.named_axes() if axes.get(name, Axis()).one_or is not None
        )
        self.factors: dict[str, int] = {}
        self._roots: dict[str, str] = {}
        for name in self.named_axes():
            if name in self.shared_axes:
                continue
            root, divisor = resolve_axis(name, axes)
            self._roots[name] = root
            self.factors[name] = axes[root].multiple // divisor
        self._dims: dict[str, Any] = {}
        self._units: dict[str, int] = {}
        for root in dict.fromkeys(self._roots.values()):
            axis = axes[root]
            low, high = math.ceil(axis.min / axis.multiple), axis.max // axis.multiple
            if high <= max(low, 1):
                raise UnsupportedError(
                    f"Axis {root!r} has one size only: {axis.min} to {axis.max} in steps of {axis.multiple}",
                    "A free axis has at least two",
                    "Raise its maximum, or write the size into the shape",
                )
            self._dims[root] = Dim(f"unit_{root}", min=max(low, 1), max=high)
            # Different sizes per axis, none of them 1: an equality by accident would not be noticed.
            self._units[root] = min(max(low, 2) + len(self._units), high)
        for name, size in spec.example_sizes.items():
            if name in self._roots:
                self._units[self._roots[name]] = size // self.factors[name]

    def named_axes(self) -> list[str]:
        dimensions = (d for t in (*self._spec.inputs, *self._spec.outputs) for d in t.shape)
        return list(dict.fromkeys(d for d in dimensions if isinstance(d, str)))

    def example(self, tensor: TensorSpec) -> tuple[int, ...]:
        """Shape of a tensor at the traced sizes."""
        return tuple(self._size(d) if isinstance(d, str) else d for d in tensor.shape)

    def _size(self, name: str) -> int:
        return 1 if name in self.shared_axes else self.factors[name] * self._units[self._roots[name]]

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """What ``torch.export.export`` takes; ``*args`` of a forward count as one argument, a tuple."""
        per_input = tuple(
            {
                i: self._dim(d)
                for i, d in enumerate(t.shape)
                if isinstance(d, str) and d not in self.shared_axes
            }
            for t in self._spec.inputs
        )
        kinds = [p.kind for p in inspect.signature(self._spec.module.forward).parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            return per_input
        named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        return (*per_input[:named], per_input[named:])

    def _dim(self, name: str) -> Any:
        dim, factor = self._dims[self._roots[name]], self.factors[name]
        return dim if factor == 1 else factor * dim

    def unit_key(self, name: str) -> tuple[str, int]:
        """Root and factor: two axes have the same size exactly if these are equal."""
        return self._roots[name], self.factors[name]


def _check_program(
    spec: GraphSpec, sizes: _Sizes, program: ExportedProgram
) -> tuple[dict[str, str], tuple[TensorSpec, ...], dict[str, sympy.Expr], dict[sympy.Expr, sympy.Expr]]:
    """Compares the exported signature with the declared one.

    Returns torch's size expression → axis name; the outputs; root axis → torch's symbol for its unit; and
    what other symbols of torch's are in these.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs = [values[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    outputs = [
        values[name] if isinstance(name, str) else name for name in program.graph_signature.user_outputs
    ]
    if len(outputs) != len(spec.outputs):
        raise UnsupportedError(
            f"Graph {spec.name!r} returns {len(outputs)} tensors", f"It declares {len(spec.outputs)} outputs"
        )
    units: dict[str, sympy.Expr] = {}  # root axis → its unit, in torch's symbols
    names: dict[str, str] = {}
    same: dict[sympy.Expr, sympy.Expr] = {}  # torch may have a symbol per input for one axis
    for tensor, value in zip(spec.inputs, inputs):
        for declared, actual in zip(tensor.shape, value.shape):
            if not isinstance(declared, str) or declared in sizes.shared_axes:
                continue
            if isinstance(actual, int):
                raise _frozen(spec, tensor, declared, actual)
            root, factor = sizes.unit_key(declared)
            unit = units.setdefault(root, actual.node.expr / factor)
            if actual.node.expr.is_Symbol and unit != actual.node.expr / factor:
                same[actual.node.expr] = unit * factor
            names.setdefault(str(actual), declared)
    found: list[TensorSpec] = []
    for tensor, value in zip(spec.outputs, outputs):
        if not isinstance(value, torch.Tensor):
            raise UnsupportedError(
                f"Output {tensor.name!r} of graph {spec.name!r} is {value!r}", "Outputs are tensors"
            )
        if isinstance(tensor, Inferred):
            found.append(_found(spec, tensor.name, value, names))
            continue
        found.append(tensor)
        expected = [_expression(d, sizes, units) for d in tensor.shape]
        actual = [d if isinstance(d, int) else d.node.expr.subs(same) for d in value.shape]
        dtype = str(value.dtype).removeprefix("torch.")
        if len(expected) != len(actual) or any(sympy.simplify(e - a) != 0 for e, a in zip(expected, actual)):
            for declared, size in zip(tensor.shape, actual):
                if isinstance(declared, str) and declared not in sizes.shared_axes and isinstance(size, int):
                    raise _frozen(spec, tensor, declared, size)
            raise UnsupportedError(
                f"Output {tensor.name!r} of graph {spec.name!r} has shape {[str(d) for d in actual]}",
                f"It is declared as {list(tensor.shape)}, that is {[str(d) for d in expected]}",
                "Correct the declaration or the module",
            )
        if dtype != tensor.dtype:
            raise UnsupportedError(
                f"Output {tensor.name!r} of graph {spec.name!r} is {dtype}",
                f"It is declared as {tensor.dtype}",
            )
    return names, tuple(found), units, same


def _found(spec: GraphSpec, name: str, value: torch.Tensor, names: Mapping[str, str]) -> TensorSpec:
    """An output as it is in the exported program."""
    sizes: list[Any] = list(value.shape)
    shape = [size if isinstance(size, int) else names.get(str(size), "") for size in sizes]
    if "" in shape:
        raise UnsupportedError(
            f"Output {name!r} of graph {spec.name!r} has a size of {sizes[shape.index('')]}",
            f"A free size is that of an axis of the inputs: {', '.join(names.values()) or 'none'}",
            "Reshape the output in the module, or give its inputs an axis of that size",
        )
    return TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(shape))


def _expression(dimension: int | str, sizes: _Sizes, units: Mapping[str, sympy.Expr]) -> Any:
    if isinstance(dimension, int):
        return dimension
    if dimension in sizes.shared_axes:
        return 1
    root, factor = sizes.unit_key(dimension)
    if root not in units:
        raise UnsupportedError(
            f"Axis {dimension!r} of an output comes from {root!r}, which no input has",
            "The size of an output follows from the inputs",
        )
    return factor * units[root]


def _frozen(spec: GraphSpec, tensor: TensorSpec, axis: str, size: int) -> UnsupportedError:
    return UnsupportedError(
        f"Axis {axis!r} of tensor {tensor.name!r} in graph {spec.name!r} is frozen at {size}",
        "A declared axis must stay free",
        "Look for a size that the module turns into a number (chunk, int(), a Python loop over it)",
    )


def _declare(
    model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], symbols: Mapping[str, str]
) -> None:
    """Gives inputs, outputs and axes their declared names."""
    graph = model.graph
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else symbols.get(str(d), str(d)) for d in value.shape.dims]
            )
    # An output that is an input or another output has the same value in torch; in ONNX it needs its own.
    for index, output in enumerate(list(graph.outputs)):
        seen = {id(value) for value in graph.outputs[:index]}
        if id(output) in seen or output.is_graph_input() or output.is_initializer():
            node = ir.node("Identity", [output])
            node.outputs[0].type = output.type
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
    _sign(graph, inputs, outputs)


def _sign(graph: ir.Graph, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Writes the signature, which :func:`_check_program` found to be true, onto inputs and outputs."""
    for values, tensors in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, tensor in zip(values, tensors):
            value.name = tensor.name
            value.shape = ir.Shape(list(tensor.shape))
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(tensor.dtype)))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _aliases(module: torch.nn.Module, used: Collection[str]) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(other for other in group if other != name)
        for group in names.values()
        if len(group) > 1
        for name in group
        if name in used
    }


def _has(shape: ir.Shape, axes: Collection[str]) -> bool:
    return any(isinstance(d, ir.SymbolicDim) and d.value in axes for d in shape)


def _values_between(
    graph: ir.Graph,
    shapes: Mapping[ir.Value, ir.Shape],
    types: Mapping[ir.Value, ir.DataType | None],
    names: Sizes,
) -> dict[str, TensorSpec]:
    """Values between nodes whose dtype a signature may have, and whose sizes follow from axes."""
    found = {}
    for value in (value for node in graph for value in node.outputs):
        dtype = types.get(value)
        if value not in shapes or value.name is None or dtype is None or dtype.name not in _SIGNATURE_TYPES:
            continue
        dimensions = [names.name(d if isinstance(d, int) else d.value) for d in shapes[value]]
        if None not in dimensions:
            shape = tuple(d for d in dimensions if d is not None)
            found[value.name] = TensorSpec(value.name, _SIGNATURE_TYPES[dtype.name], shape)
    return found


def _excerpt(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " …"
