"""Random inputs of a graph, at several sizes of its axes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hywu_runtime.bundle import Bundle
from hywu_runtime.manifest import ProvidedTensor

if TYPE_CHECKING:
    from hywu_export.tracing import Axis, GraphSpec

Array = npt.NDArray[Any]

PROMPTS = ("make it look like an old photograph", "a red car in the snow")
SEED = 0


def sizes_to_try(graph: GraphSpec, axes: Mapping[str, Axis]) -> Iterator[dict[str, int]]:
    """Sizes of the graph's axes to try: one sample and two, several sizes, shared deltas and own ones."""
    used = {d for t in (*graph.inputs, *graph.outputs) for d in t.shape if isinstance(d, str)}
    tried: list[dict[str, int]] = []
    for batch, shared, units in ((1, True, (2, 3)), (2, True, (4, 2)), (2, False, (3, 4))):
        roots: dict[str, int] = {}
        free = 0  # free axes take different sizes, so that one is not taken for another
        for name, axis in axes.items():
            if axis.of is not None or axis.one_or is not None:
                continue
            if name == "batch":
                roots[name] = min(max(batch, axis.min), axis.max)
                continue
            least = -(-axis.min // axis.multiple)
            size = max(least, units[free % 2]) * axis.multiple
            roots[name] = min(size, axis.max // axis.multiple * axis.multiple)
            free += 1
        for name, axis in axes.items():
            if axis.one_or is not None:
                roots[name] = 1 if shared else roots[axis.one_or]
        sizes = {name: _size(name, axes, roots) for name in axes}
        chosen = {name: size for name, size in sizes.items() if name in used}
        if chosen not in tried:
            tried.append(chosen)
            yield chosen


def _size(name: str, axes: Mapping[str, Axis], roots: Mapping[str, int]) -> int:
    axis = axes[name]
    return roots[name] if axis.of is None else _size(axis.of, axes, roots) // axis.divide


class RandomInputs:
    """Random inputs of a graph, of the kind that a request has: token ids are those of prompts.

    ``parts`` are the bundle's graphs that it was parted into, if it was.
    """

    def __init__(self, bundle: Bundle, graph: GraphSpec, parts: Collection[str] = ()):
        self._bundle, self._graph = bundle, graph
        self._random = np.random.default_rng(SEED)
        provided = bundle.manifest.tensors
        self._provided: dict[str, ProvidedTensor] = {}
        for call in bundle.manifest.program:
            if call.graph in (parts or (graph.name,)):
                for name, tensor in bundle.manifest.reads(call).items():
                    if tensor in provided:
                        self._provided.setdefault(name, provided[tensor])

    def draw(self, sizes: Mapping[str, int]) -> dict[str, Array]:
        """Arrays by input name."""
        return {
            tensor.name: self._one(
                tensor.name,
                np.dtype(tensor.dtype),
                tuple(sizes[d] if isinstance(d, str) else d for d in tensor.shape),
            )
            for tensor in self._graph.inputs
        }

    def _one(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        return np.asarray(self._values(name, dtype, shape), dtype)

    def _values(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
        provided = self._provided.get(name)
        if provided is not None and provided.source in ("text", "mask"):
            return self._text(provided, shape[0])
        if provided is not None and provided.column is not None:
            return self._row(provided.column)
        if provided is not None and provided.source in ("gate", "guidance"):
            return self._random.uniform(0.5, 2.0, shape)
        if dtype == np.uint8:
            return self._random.integers(0, 256, shape, np.uint8)
        if dtype.kind == "i":
            return self._random.integers(*self._graph.integers.get(name, (0, 2)), shape)
        # The deltas of a trained generator are small beside the weights.
        scale = 0.1 if name.endswith((".lora_A", ".lora_B")) else 1.0
        return self._random.standard_normal(shape) * scale

    def _text(self, provided: ProvidedTensor, batch: int) -> Array:
        from hywu_runtime.text import PromptEncoder

        manifest = self._bundle.manifest
        text = manifest.tensors[provided.of] if provided.of is not None else provided
        entry = manifest.tokenizers[text.tokenizer or ""]
        ids, mask = PromptEncoder(self._bundle.file(entry.file), entry).encode(PROMPTS[:batch])
        return mask if provided.source == "mask" else ids

    def _row(self, column: str) -> Array:
        """A value that the schedule holds: of the row in its middle."""
        from hywu_runtime.schedule import Schedule

        section = self._bundle.manifest.schedules
        assert section is not None  # the manifest's reader has checked it
        rows = Schedule(self._bundle.file(section.file), section).rows()
        values: Array = np.asarray(getattr(rows, column))
        return values[len(rows) // 2] if column in ("timesteps", "coefficients") else values
