"""Names that say where a node comes from, and nothing about the machine that traced it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_by_scope(model: ir.Model, parameters: Collection[str]) -> ir.Model:
    """Names nodes, values and constants by module path, drops all metadata and intermediate shapes, in place.

    A node is ``<module path>/<operator>``, with a number from the second on; its outputs take its name. A
    constant is ``constant/<number>`` in the order of use. Inputs, outputs and ``parameters`` keep their
    names.
    """
    graph = model.graph
    kept = {value.name for value in (*graph.inputs, *graph.outputs)} | set(parameters)
    used: Counter[str] = Counter()
    scopes: dict[ir.Node, str] = {}
    constants: list[ir.Value] = []
    for node in graph:
        scope = scopes[node] = _scope(node, scopes)
        stem = f"{scope}/{node.op_type}" if scope else node.op_type
        used[stem] += 1
        node.name = stem if used[stem] == 1 else f"{stem}_{used[stem]}"
        for index, output in enumerate(node.outputs):
            if output.name not in kept:
                output.name = node.name if index == 0 else f"{node.name}.{index}"
        constants += [v for v in node.inputs if v is not None and v.is_initializer() and v.name not in kept]
        node.metadata_props.clear()
        node.doc_string = None
    for number, value in enumerate(dict.fromkeys(constants)):
        _rename_initializer(graph, value, f"constant/{number}")
    order_initializers(graph)
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in graph:
        for output in node.outputs:
            output.metadata_props.clear()
            if not output.is_graph_output():
                output.shape = None
                output.type = None
    for owner in (model, graph):
        owner.metadata_props.clear()
        owner.doc_string = None
    graph.name = "graph"
    model.producer_name, model.producer_version, model.domain = "hywu-export", None, None
    model.model_version = None
    return model


def _scope(node: ir.Node, known: dict[ir.Node, str]) -> str:
    """Module path of a node; a node that a pass made is placed with the producer of its first input."""
    if _SCOPES in node.metadata_props:
        scopes = ast.literal_eval(node.metadata_props[_SCOPES])
        if len(scopes) >= 2 and not scopes[-2].startswith("_empty_nn_module"):
            return str(scopes[-2])
        return ""
    producers = (v.producer() for v in node.inputs if v is not None)
    return next((known[p] for p in producers if p is not None and p in known), "")


def _rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.name == name:
        return
    if value.name is not None:
        graph.initializers.pop(value.name)
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    graph.initializers[name] = value


def order_initializers(graph: ir.Graph) -> None:
    """Parameters and constants in the order of first use; unused ones go."""
    order = dict.fromkeys(v for node in graph for v in node.inputs if v is not None and v.is_initializer())
    order.update(dict.fromkeys(v for v in graph.outputs if v.is_initializer()))
    for name in list(graph.initializers):
        del graph.initializers[name]
    for value in order:
        graph.register_initializer(value) if value.const_value is not None else graph.initializers.add(value)
