"""What became of a graph: layers, precisions, where the deltas went, memory, time.

``docs/engines.md`` has the schema.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hywu_export.engines import layers as engine_layers
from hywu_export.engines.branches import Fused, find_branches, locate
from hywu_export.engines.layers import Layer

if TYPE_CHECKING:
    import onnx


def graph_report(
    model: onnx.ModelProto, log: Path | None, inspection: str | None, plan_bytes: int, **measured: Any
) -> dict[str, Any]:
    """The report of one graph, plain JSON values.

    Args:
        model: the graph without its weights.
        log: the builder's log.
        inspection: what the engine inspector says; where it is there, it is believed rather than the log.
        measured: what else is known: ``seconds``, ``cpu_seconds``, ``peak_bytes``, ``network_layers``.
    """
    found = engine_layers.from_inspector(inspection) if inspection is not None else None
    origin = "engine inspector" if found else None
    if not found and log is not None:
        found = engine_layers.from_log(log)
        origin = "builder log" if found else None
    report: dict[str, Any] = {"plan_bytes": plan_bytes, **measured}
    report["memory"] = engine_layers.memory_from_log(log) if log is not None else {}
    report["layers_from"] = origin
    if not found:
        return report
    branches = locate(find_branches(model), found)
    report["precisions"] = _counts(layer.precision for layer in found)
    report["products"] = _counts(layer.precision for layer in found if layer.is_product)
    if branches:
        report["deltas"] = _deltas(branches)
    report["layers"] = [_layer(layer) for layer in found]
    return report


def summary_rows(graphs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row for a graph: name, layers, matrix products by precision, deltas."""
    return [
        (
            name,
            str(len(report["layers"])) if report["layers_from"] else "not listed by this version",
            _count_text(report.get("products", {})) or "–",
            _delta_text(report.get("deltas")),
        )
        for name, report in graphs.items()
    ]


def _deltas(branches: Sequence[Fused]) -> dict[str, Any]:
    """Which layers the branches became part of.

    ``sum`` is where a branch is added to the layer's own output: ``in the product with B`` or ``in the
    layer's own product`` (nothing more is launched), ``with other work`` (in generated code that does more),
    ``alone``, or ``unknown`` where no layer names the node.
    """
    products = [layer for fused in branches for layer in (fused.down, fused.up) if layer is not None]
    down = [fused.down.name for fused in branches if fused.down is not None]
    return {
        "targets": len(branches),
        "products": _counts(layer.precision for layer in products),
        "layers_for_a": len(set(down)),
        "sum": _counts(_sum_place(fused) for fused in branches),
        "branches": [
            {
                "module": fused.branch.module,
                **{part: _place(layer) for part, layer in fused.parts.items() if layer is not None},
            }
            for fused in branches
        ],
    }


def _place(layer: Layer) -> dict[str, str]:
    return {"layer": layer.name, "kind": layer.kind, "precision": layer.precision}


def _sum_place(fused: Fused) -> str:
    if fused.add is None:
        return "unknown"
    if fused.up is not None and fused.add.name == fused.up.name:
        return "in the product with B"
    if fused.base is not None and fused.add.name == fused.base.name:
        return "in the layer's own product"
    return "with other work" if len(fused.add.nodes) > 1 else "alone"


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "precision": layer.precision,
        "inputs": list(layer.inputs),
        "constants": list(layer.constants),
        "outputs": list(layer.outputs),
        "nodes": list(layer.nodes),
    }


def _counts(values: Any) -> dict[str, int]:
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _count_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _delta_text(deltas: Mapping[str, Any] | None) -> str:
    if deltas is None:
        return "–"
    sums = "; ".join(f"{count} added {place}" for place, count in deltas["sum"].items())
    return f"{_count_text(deltas['products'])} products; {sums}"
