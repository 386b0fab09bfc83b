"""What the values of a graph are during real edits: extremes of all of them, histograms of the ones to
quantize.

Extremes are reduced inside the graph. For histograms, tensors leave it as extra outputs, so many at a time
as fit into ``CHUNK_BYTES``; a histogram has a fixed size. So memory grows neither with the samples nor
with the layers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hywu_calibration.histogram import Histogram
from hywu_calibration.records import Record
from hywu_export.bundle.sessions import load_model
from hywu_runtime.codec import show
from hywu_runtime.errors import BundleError
from hywu_runtime.files import write_atomically

if TYPE_CHECKING:
    import onnx_ir as ir

Array = npt.NDArray[Any]
Progress = Callable[[int, int], object]

CHUNK_BYTES = 256 * 2**20
SAVE_SECONDS = 20.0
_NODES_AT_ONCE = 64
_EXTREME, _SIZE = "hywu.extreme/", "hywu.size/"


@dataclass
class Observed:
    """What one tensor was.

    Attributes:
        histogram: of its absolute values.
        channels: the largest absolute value of each channel, ``[K]``.
        low, high: the smallest and the largest value.
    """

    histogram: Histogram = field(default_factory=Histogram)
    channels: npt.NDArray[np.float32] | None = None
    low: float = np.inf
    high: float = -np.inf

    @property
    def constant(self) -> bool:
        """Whether all values were one number."""
        return self.low == self.high

    def add(self, values: Array, axis: int) -> None:
        """Takes an array in; ``axis`` is that of its channels. Raises ValueError if it is not finite."""
        self.histogram.add(values)
        self.low = min(self.low, float(values.min(initial=np.inf)))
        self.high = max(self.high, float(values.max(initial=-np.inf)))
        others = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
        largest = np.maximum(values.max(axis=others), -values.min(axis=others)).astype(np.float32)
        self.channels = largest if self.channels is None else np.maximum(self.channels, largest)


@dataclass(frozen=True)
class Tap:
    """A tensor to observe. ``axis`` is that of its channels; ``divisor`` ``[K]`` divides them first."""

    value: str
    axis: int
    divisor: npt.NDArray[np.float32] | None = None


def extremes(
    model: ir.Model,
    records: Iterable[Record],
    count: int,
    sizes_of: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[dict[str, float], dict[str, int]]:
    """The largest absolute value of every floating-point value of a graph, infinite where one was NaN or
    infinite.

    Args:
        model: in FP32.
        records: ``count`` of them, of this graph.
        sizes_of: values whose largest number of elements is wanted too.
    Returns:
        by value name: the extremes, the sizes.
    """
    import onnx_ir as ir

    instrumented = typed(model)
    graph = instrumented.graph
    floats = [value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    floats += [value for value in graph.inputs if value.dtype == ir.DataType.FLOAT]
    for value in floats:
        absolute = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", absolute.outputs, {"keepdims": 0})
        _add_output(graph, largest, f"{_EXTREME}{value.name}", ir.DataType.FLOAT, [absolute])
    by_name = {value.name: value for value in (*graph.inputs, *(v for n in graph for v in n.outputs))}
    for name in dict.fromkeys(sizes_of):
        _add_output(graph, ir.node("Size", [by_name[name]]), f"{_SIZE}{name}", ir.DataType.INT64)
    session = load_model(instrumented)
    found: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for done, record in enumerate(records):
        if progress is not None:
            progress(done, count)
        for name, array in session.run(record.inputs).items():
            if name.startswith(_EXTREME):
                extreme = float(array)
                key = name.removeprefix(_EXTREME)
                found[key] = max(found.get(key, 0.0), extreme if np.isfinite(extreme) else np.inf)
            elif name.startswith(_SIZE):
                key = name.removeprefix(_SIZE)
                sizes[key] = max(sizes.get(key, 0), int(array))
    return found, sizes


def chunks(taps: Sequence[Tap], sizes: Mapping[str, int], limit: int = CHUNK_BYTES) -> list[list[Tap]]:
    """Taps in groups whose tensors take at most ``limit`` bytes together, one at least."""
    groups: list[list[Tap]] = []
    room = 0
    for tap in taps:
        size = 4 * sizes[tap.value]
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(tap)
        room -= size
    return groups


def observe(
    model: ir.Model,
    records: Iterable[Record],
    taps: Sequence[Tap],
    count: int,
    state: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Observed]:
    """Histograms of some values of a graph, by name.

    Args:
        model: in FP32.
        records: ``count`` of them, of this graph; the same ones in the same order when a job goes on.
        taps: what to observe, at once.
        state: a file that keeps what has been counted; a job that was killed goes on from there.
    Raises:
        BundleError: a value is NaN or infinite; the first node that made one is named.
        InputError: the state file cannot be written.
    """
    observed = {tap.value: Observed() for tap in taps}
    start = _read_state(state, observed) if state is not None else 0
    if start >= count:
        return observed
    instrumented = model.clone()
    values = _values(instrumented.graph)
    own = {value.name for value in instrumented.graph.outputs}
    inputs = {value.name for value in instrumented.graph.inputs}
    for tap in taps:
        if tap.value not in own | inputs:
            instrumented.graph.outputs.append(_typed_float(values[tap.value]))
    session = load_model(instrumented)
    saved = time.monotonic()
    for done, record in enumerate(records):
        if done < start:
            continue
        if progress is not None:
            progress(done, count)
        outputs = {**record.inputs, **session.run(record.inputs)}
        for tap in taps:
            array = outputs[tap.value]
            if tap.divisor is not None:
                shape = [1] * array.ndim
                shape[tap.axis] = -1
                array = array * (1 / tap.divisor).astype(np.float32).reshape(shape)
            try:
                observed[tap.value].add(array, tap.axis)
            except ValueError:
                raise _not_finite(model, record, tap.value) from None
        if state is not None and (time.monotonic() - saved > SAVE_SECONDS or done == count - 1):
            _write_state(state, observed, done + 1)
            saved = time.monotonic()
    return observed


def typed(model: ir.Model) -> ir.Model:
    """A clone in which every value has its dtype."""
    from onnx_ir.passes.common import ShapeInferencePass

    return ShapeInferencePass()(model.clone()).model


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    return {value.name or "": value for node in graph for value in node.outputs}


def _typed_float(value: ir.Value) -> ir.Value:
    import onnx_ir as ir

    value.dtype = ir.DataType.FLOAT
    return value


def _add_output(
    graph: ir.Graph, node: ir.Node, name: str, dtype: ir.DataType, before: Sequence[ir.Node] = ()
) -> None:
    graph.extend([*before, node])
    output = node.outputs[0]
    output.name, output.dtype = name, dtype
    graph.outputs.append(output)


def _read_state(file: Path, observed: Mapping[str, Observed]) -> int:
    """Fills in what a state file holds; how many records it has seen."""
    from safetensors import safe_open

    if not file.exists():
        return 0
    with safe_open(file, "numpy") as tensors:
        order = json.loads(tensors.metadata()["values"])
        if order != list(observed):
            return 0
        for i, one in enumerate(observed.values()):
            one.histogram = Histogram.from_array(tensors.get_tensor(f"{i}.histogram"))
            one.channels = tensors.get_tensor(f"{i}.channels")
            one.low, one.high = tensors.get_tensor(f"{i}.limits")
        return int(tensors.metadata()["seen"])


def _write_state(file: Path, observed: Mapping[str, Observed], seen: int) -> None:
    from safetensors.numpy import save

    tensors: dict[str, Array] = {}
    for i, one in enumerate(observed.values()):
        assert one.channels is not None
        tensors[f"{i}.histogram"] = one.histogram.to_array()
        tensors[f"{i}.channels"] = one.channels
        tensors[f"{i}.limits"] = np.array([one.low, one.high], np.float64)
    content = save(tensors, {"values": json.dumps(list(observed)), "seen": str(seen)})
    write_atomically(file, lambda stream: stream.write(content))


def first_not_finite(model: ir.Model, record: Record, values: Sequence[str]) -> str | None:
    """The first node of the graph that makes NaN or infinity, for some values, out of finite inputs."""
    import onnx_ir as ir

    found = typed(model)
    graph = found.graph
    made = _values(graph)
    needed: set[ir.Node] = set()
    todo = [made[value] for value in values if value in made]
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in needed:
            needed.add(node)
            todo += [v for v in node.inputs if v is not None]
    nodes = [node for node in graph if node in needed]
    kept = list(graph.outputs)
    floats = [v for n in nodes for v in n.outputs if v.dtype == ir.DataType.FLOAT]
    bad = {name for name, array in record.inputs.items() if not np.isfinite(array).all()}
    for start in range(0, max(len(floats), 1), _NODES_AT_ONCE):
        part = [v for v in floats[start : start + _NODES_AT_ONCE] if v not in kept]
        graph.outputs[:] = [*kept, *part]
        for name, array in load_model(found).run(record.inputs).items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                bad.add(name)
    for node in nodes:
        sound = all(v is None or v.name not in bad for v in node.inputs)
        if sound and any(v.name in bad for v in node.outputs):
            return node.name
    return None


def blame(model: ir.Model, record: Record) -> None:
    """Looks for the node of a graph that spoils its outputs.

    Raises:
        BundleError: there is one; node and graph are named.
    """
    node = first_not_finite(model, record, [value.name or "" for value in model.graph.outputs])
    if node is not None:
        raise _damaged(node, record.graph)


def _not_finite(model: ir.Model, record: Record, value: str) -> BundleError:
    return _damaged(first_not_finite(model, record, [value]) or value, record.graph)


def _damaged(node: str, graph: str) -> BundleError:
    return BundleError(
        f"Node {show(node, 200)} of graph {graph} makes values that are not finite (NaN or infinity) in FP32",
        "Expected finite numbers to take ranges from",
        "Check the weights of the checkpoint, and export the bundle again; `hywu edit` shows the same fault",
    )
