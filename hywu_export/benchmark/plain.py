"""What the deltas cost in a step: its graph beside the same graph without them, run in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hywu_export.benchmark.stages import makers_from_deltas
from hywu_runtime.backends import Backend, Binding
from hywu_runtime.bundle import Bundle, Weight
from hywu_runtime.errors import UnsupportedError
from hywu_runtime.program import resolve_shape

if TYPE_CHECKING:
    import onnx

_THROUGH = ("Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze")
_PRODUCTS = ("MatMul", "Gemm")


def without_deltas(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with the sum of every delta branch replaced by the layer's own output.

    Its delta inputs, and its gate if nothing else reads it, are gone.

    Raises:
        UnsupportedError: a branch has another form, so that deltas would stay.
    """
    import onnx

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    passed: dict[str, str] = {}  # output of a sum → what stands for it
    for value in graph.input:
        if value.name.endswith(".lora_B"):
            passed |= _sums(value.name, readers)

    def resolved(name: str) -> str:
        while name in passed:
            name = passed[name]
        return name

    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = resolved(name)
    for output in graph.output:
        if resolved(output.name) != output.name:
            graph.node.append(onnx.helper.make_node("Identity", [resolved(output.name)], [output.name]))
    for i in reversed(range(len(graph.node))):
        if any(name in passed for name in graph.node[i].output) and graph.node[i].op_type == "Add":
            del graph.node[i]
    _remove_unused(graph)
    left = [value.name for value in graph.input if value.name.endswith((".lora_A", ".lora_B"))]
    if left:
        raise UnsupportedError(
            f"The branch of {left[0]!r} cannot be taken out of the graph",
            "Expected products with A and B, and a sum",
        )
    return plain


def with_constants(model: onnx.ModelProto, maker: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with what ``maker`` makes of nothing but weights computed inside: weights without deltas."""
    import onnx

    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    graph, makers = whole.graph, {name: node for node in maker.graph.node for name in node.output}
    weights = {initializer.name: initializer for initializer in maker.graph.initializer}
    present = {initializer.name for initializer in graph.initializer}
    present |= {name for node in graph.node for name in node.output}
    first: list[onnx.NodeProto] = []
    for i in reversed(range(len(graph.input))):
        nodes = _constant(graph.input[i].name, makers, weights)
        if nodes is None:
            continue
        del graph.input[i]
        for node in nodes:
            for name in node.input:
                if name in weights and name not in present:
                    graph.initializer.append(weights[name])
                    present.add(name)
            if not present & set(node.output):
                first.append(node)
                present |= set(node.output)
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*first, *kept])
    return whole


def _constant(
    name: str, makers: Mapping[str, onnx.NodeProto], weights: Mapping[str, Any]
) -> list[onnx.NodeProto] | None:
    """The nodes that make ``name`` of weights alone, makers first; None if it needs more."""
    if name in weights:
        return []
    if name not in makers:
        return None
    found: list[onnx.NodeProto] = []
    for other in makers[name].input:
        nodes = _constant(other, makers, weights) if other else []
        if nodes is None:
            return None
        found += nodes
    return [*found, makers[name]]


def _sums(name: str, readers: Mapping[str, list[onnx.NodeProto]]) -> dict[str, str]:
    """The sums in which the branch of the B ``name`` ends, with the other operand."""
    sums: dict[str, str] = {}
    waiting, product = [(name, False)], False
    while waiting:
        current, product = waiting.pop()
        for node in readers.get(current, []):
            if node.op_type == "Add" and product:
                sums[node.output[0]] = node.input[1] if node.input[0] == current else node.input[0]
            elif node.op_type in _PRODUCTS and not product:
                waiting.append((node.output[0], True))
            elif (node.op_type in _THROUGH and node.input[0] == current) or (
                node.op_type == "Mul" and product  # the gate of a merged delta
            ):
                waiting.append((node.output[0], product))
    return sums


def _remove_unused(graph: onnx.GraphProto) -> None:
    used = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):  # makers come before readers
        if used & set(node.output):
            used |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for values in (graph.input, graph.initializer):
        for i in reversed(range(len(values))):
            if values[i].name not in used:
                del values[i]


def step_overhead(
    bundle: Bundle, backend: Backend, graph: str, variant: str | None, axes: Mapping[str, int], seconds: float
) -> tuple[list[float], list[float]]:
    """Times of a graph, and of the same without deltas, in pairs: one after the other, in turn first.

    What merged weights are without deltas are the base's, constants of the graph as in any other.

    Inputs are random numbers of the shapes that ``axes`` give.

    Raises:
        UnsupportedError: onnx is not installed, or a branch cannot be taken out.
        HywuError: the graph cannot be run.
    """
    try:
        import onnx
    except ImportError as error:
        raise UnsupportedError(
            "The package onnx is not installed", "Expected it, to take the deltas out of a graph"
        ) from error
    file = bundle.graph_file(graph, variant)
    path = bundle.file(file)
    model = onnx.load(path, load_external_data=False)
    plain = without_deltas(model)
    weights = {**_mapped(model, path), **bundle.initializers(file)}
    for maker in makers_from_deltas(bundle.manifest, graph):
        other = bundle.graph_file(maker, variant)
        made = onnx.load(bundle.file(other), load_external_data=False)
        plain = with_constants(plain, without_deltas(made))
        weights = {**_mapped(made, bundle.file(other)), **bundle.initializers(other), **weights}
    names = {initializer.name for initializer in plain.graph.initializer}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / path.name
        target.write_bytes(plain.SerializeToString())
        backend.enter()
        full = backend.load(path, bundle.initializers(file))
        small = backend.load(target, {name: w for name, w in weights.items() if name in names})
    call = next(c for c in bundle.manifest.program if c.graph == graph)
    signature = bundle.manifest.graphs[graph]
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for value in (*signature.inputs, *signature.outputs):
        tensor = call.inputs.get(value.name, value.name)
        if value in signature.outputs:
            tensor = call.outputs.get(value.name, value.name)
        shape = resolve_shape(bundle.manifest, tensor, axes)
        tensors[value.name] = backend.allocate(shape, value.dtype)
        if value in signature.inputs and value.dtype.startswith("float"):
            tensors[value.name].write((0.1 * rng.standard_normal(shape)).astype(value.dtype))
    outputs = {value.name: tensors[value.name] for value in signature.outputs}
    inputs = {value.name: tensors[value.name] for value in signature.inputs}
    left = {value.name for value in plain.graph.input}
    pair = (
        full.bind(inputs, outputs),
        small.bind({name: t for name, t in inputs.items() if name in left}, outputs),
    )
    return _in_turn(backend, pair, seconds)


def _in_turn(
    backend: Backend, pair: tuple[Binding, Binding], seconds: float
) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for binding in pair * 2:  # what is done once is done here
        binding.run()
    backend.wait()
    end = time.perf_counter() + seconds
    round_ = 0
    while round_ < 4 or time.perf_counter() < end:
        for side in (0, 1) if round_ % 2 == 0 else (1, 0):
            start = backend.mark()
            pair[side].run()
            mark = backend.mark()
            backend.wait()
            times[side].append(mark.since(start))
        round_ += 1
    return times


def _mapped(model: onnx.ModelProto, path: Path) -> dict[str, Weight]:
    """The weights of a graph that lie in files beside it, mapped."""
    import onnx

    names = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}
    names |= {11: "float64", 16: "bfloat16"}
    found: dict[str, Weight] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        file = path.parent / where["location"]
        if not file.is_file() or tensor.data_type not in names:
            continue
        data = np.memmap(
            file, np.uint8, "r", offset=int(where.get("offset", 0)), shape=(int(where["length"]),)
        )
        found[tensor.name] = Weight(np.asarray(data), names[tensor.data_type], tuple(tensor.dims))
    return found
