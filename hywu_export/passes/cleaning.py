"""Cleaning of a freshly traced model, without touching its parameters."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    cast_cast_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
)

FOLDED_BYTES = 16 * 2**20
"""A constant that is computed from constants is stored up to this size, and computed at run time above."""

MAX_ROUNDS = 8
"""A round of folding may uncover constants for the next; two or three suffice."""

_RULES = (
    cast_cast_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
)


def clean(model: ir.Model, parameters: Collection[str]) -> ir.Model:
    """Simplifies a model in place and returns it.

    Functions are inlined; what depends on constants alone is computed; identities, casts, expansions and
    transposes without effect go, as do common subexpressions and dead nodes; sequences become slices
    (TensorRT has none), an Einsum that only permutes becomes a Transpose; constants become initializers,
    equal ones become one.

    Initializers named in ``parameters`` lose their value: nothing is computed from them, and they keep
    their names.
    """
    graph = model.graph
    for name, value in graph.initializers.items():
        if name in parameters:
            value.const_value = None
    InlinePass()(model)
    IdentityEliminationPass()(model)
    _permute_by_transpose(graph)
    limit = FOLDED_BYTES // 4
    for _ in range(MAX_ROUNDS):
        folded = fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=limit,
            output_size_limit=limit,
            should_fold=lambda node: True if node.op_type == "ConstantOfShape" else None,
        )
        rewritten = RewritePass(_RULES)(model)
        RemoveUnusedNodesPass()(model)
        if not (folded.modified or rewritten.modified):
            break
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _merge_equal_constants(graph)
    _measure_after_cast(graph)
    CommonSubexpressionEliminationPass()(model)
    IdentityEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    return model


def _permute_by_transpose(graph: ir.Graph) -> None:
    """An Einsum of one tensor that names each of its axes once, before and after, is a Transpose."""
    for node in list(graph):
        if node.op_type != "Einsum" or len(node.inputs) != 1:
            continue
        before, arrow, after = node.attributes["equation"].as_string().replace(" ", "").partition("->")
        if not arrow or len(set(before)) < len(before) or sorted(before) != sorted(after):
            continue
        order = [before.index(axis) for axis in after]
        transpose = ir.node("Transpose", node.inputs, {"perm": order}, name=node.name)
        made, old = transpose.outputs[0], node.outputs[0]
        made.name, made.shape, made.type = old.name, old.shape, old.type
        transpose.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [transpose], [old], [made])


def _measure_after_cast(graph: ir.Graph) -> None:
    """Takes the size of a uint8 input from its Cast: TensorRT allows nothing but the Cast beside it."""
    for value in graph.inputs:
        casts = [node for node in value.consumers() if node.op_type == "Cast"]
        if value.dtype != ir.DataType.UINT8 or not casts:
            continue
        graph.remove(casts[0])
        graph.insert_before(graph[0], casts[0])
        for node in value.consumers():
            if node.op_type == "Shape":
                node.replace_input_with(0, casts[0].outputs[0])


def _merge_equal_constants(graph: ir.Graph) -> None:
    """One initializer for all constants of the same dtype, shape and bytes; parameters (without value)
    stay."""
    first: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_output():
            continue
        kept = first.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()), value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del graph.initializers[name]
