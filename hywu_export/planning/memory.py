"""Where memory goes: weights, what lies between the graphs, and the largest working set."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hywu_export.planning.case import Case
from hywu_export.planning.shapes import DTYPES, ITEM_BITS

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Weights:
    """Bytes of a graph's initializers, by where they are stored: (file, offset), or (graph file, name)."""

    places: Mapping[tuple[str, str], int]

    @property
    def bytes(self) -> int:
        return sum(self.places.values())


def weights_of(model: onnx.ModelProto, file: str, half: str | None = None) -> Weights:
    """The weights of a graph, from its initializers' shapes.

    Args:
        file: of the graph, as the manifest calls it.
        half: the precision of a variant that is not made yet, see `costs.as_if`.
    """
    import onnx

    products = {n.input[1] for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Conv")}
    turned = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type in ("Transpose", "Cast")}
    matrices = products | {turned[name] for name in products if name in turned}
    places: dict[tuple[str, str], int] = {}
    for tensor in model.graph.initializer:
        elements, dtype = math.prod(tensor.dims), DTYPES.get(tensor.data_type, "")
        bits = ITEM_BITS.get(dtype, 32)
        if half is not None and dtype in ("float32", "float16", "bfloat16"):
            eight = half.startswith("int8") and tensor.name in matrices and len(tensor.dims) > 1
            bits = 8 if eight else 16
        place = (file, tensor.name)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            place = (where.get("location", file), where.get("offset", "0"))
        places[place] = math.ceil(elements * bits / 8)
    return Weights(places)


def stored(weights: Collection[Weights]) -> int:
    """Bytes of the weights of several graphs, those that they share once."""
    return sum({place: size for one in weights for place, size in one.places.items()}.values())


def between(case: Case) -> dict[str, int]:
    """Bytes of the tensors between graphs.

    ``deltas``; ``states``, carried from step to step, twice: one is read while the next is written;
    ``caches``, which the steps read again and again (keys and values, embeddings); ``other`` (photos, noise).
    """
    manifest, tensors = case.manifest, case.tensors
    deltas = set(manifest.results.deltas)
    deltas |= set(manifest.deltas.tensors if manifest.deltas is not None else ())
    states = {s.tensor for s in manifest.state} | {s.next for s in manifest.state}
    made = {n for call in case.calls for n in manifest.writes(call).values()}
    steps = {n for call in case.calls if call.phase == "step" for n in manifest.reads(call).values()}
    found = dict.fromkeys(("deltas", "states", "caches", "other"), 0)
    for name, size in tensors.items():
        if name in deltas:
            found["deltas"] += size
        elif name in states:
            found["states"] += size
        elif name in made and name in steps:
            found["caches"] += size
        else:
            found["other"] += size
    return found


def residents(case: Case) -> list[tuple[str, ...]]:
    """The graphs that are in memory together with ``low_memory``: each alone, but those of the steps."""
    step = {call.graph for call in case.calls if call.phase == "step"}
    sets = [(graph,) for graph in case.graphs if graph not in step]
    return sets + ([tuple(g for g in case.graphs if g in step)] if step else [])
