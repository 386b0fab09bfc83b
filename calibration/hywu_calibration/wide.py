"""Which nodes FP16 cannot hold, by what their values were during real edits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

MARGIN = 4.0
"""How much larger than all that was seen a value may become."""


def wide_nodes(model: ir.Model, extremes: Mapping[str, float]) -> dict[str, str]:
    """Nodes that stay in FP32, beside those that the structure keeps there: name to reason.

    Both what makes a value that FP16 does not hold, and what reads it: a product that overflows is no use
    to a reader that cannot take its result. Numbers that are all below FP16's smallest normal one lose
    digits.

    Args:
        extremes: the largest absolute value of each value of the graph, by name; others are taken for
        harmless.
    """
    from hywu_export.passes.half import LARGEST_FP16, LEAST_FP16

    limit = LARGEST_FP16 / MARGIN
    reasons: dict[str, str] = {}
    for node in model.graph:
        if node.op_type in ("Cast", "Shape"):
            continue
        for value in (*node.outputs, *node.inputs):
            largest = extremes.get(value.name or "", 1.0) if value is not None else 1.0
            if largest > limit:
                reasons[node.name or ""] = f"values up to {largest:.3g} overflow in FP16 (margin {MARGIN:g})"
            elif 0 < largest < LEAST_FP16:
                reasons[node.name or ""] = f"values of at most {largest:.3g} lose digits in FP16"
    return reasons
