"""INT8: from what was observed to scales and smoothing factors, and which layers stay wide."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hywu_calibration.methods import Method, threshold
from hywu_calibration.observe import Observed, Tap
from hywu_calibration.report import Wide
from hywu_calibration.smoothing import factors, input_channel_maxima
from hywu_export.passes.layers import Layer
from hywu_export.passes.quantize import Quantized, half_scale

if TYPE_CHECKING:
    import onnx_ir as ir

_log = logging.getLogger(__name__)
Layers = Mapping[str, Sequence[Layer]]  # by graph
Plan = dict[str, dict[str, Quantized]]  # by graph and layer


@dataclass
class Candidates:
    """The layers of a bundle that may be quantized, by graph, and those that are left alone by rule."""

    layers: dict[str, list[Layer]]
    excluded: list[Wide] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Every layer once: a module may be in several graphs."""
        return list(dict.fromkeys(layer.name for layers in self.layers.values() for layer in layers))


def candidates(models: Mapping[str, ir.Model], convolutions: bool = True) -> Candidates:
    """The layers of some graphs that INT8 is for.

    Args:
        convolutions: whether convolutions are among them.
    """
    from hywu_export.passes.layers import LEAST_DIMENSION, find_layers

    found = Candidates({})
    for graph, model in models.items():
        found.layers[graph] = []
        for layer in find_layers(model):
            if layer.small:
                reason = f"a dimension below {LEAST_DIMENSION}: {layer.reduction} by {layer.outputs}"
            elif layer.op == "Conv" and not convolutions:
                reason = "ONNX Runtime has no INT8 convolution with a result in floating point on the CPU"
            else:
                found.layers[graph].append(layer)
                continue
            found.excluded.append(Wide(graph, layer.name, layer.op, reason))
    return found


def taps(layers: Sequence[Layer], divisors: Mapping[str, npt.NDArray[np.float32]] | None = None) -> list[Tap]:
    """What is observed for a graph's layers: every activation once.

    Args:
        divisors: by value name, the smoothing factors; only these are observed then.
    """
    found: dict[str, Tap] = {}
    for layer in layers:
        name = layer.data.name or ""
        if divisors is None or name in divisors:
            axis = 1 if layer.op == "Conv" else -1
            found.setdefault(name, Tap(name, axis, None if divisors is None else divisors[name]))
    return list(found.values())


def constant_layers(layers: Layers, observed: Mapping[str, Mapping[str, Observed]]) -> list[Wide]:
    """Layers whose activation never changed during calibration; each is warned of by name."""
    found = []
    for graph, some in layers.items():
        for layer in some:
            one = observed[graph].get(layer.data.name or "")
            if one is not None and one.constant:
                found.append(
                    Wide(
                        graph,
                        layer.name,
                        layer.op,
                        f"its activation was {one.low:g} throughout the calibration",
                    )
                )
                _log.warning(
                    "Layer %s of graph %s is not quantized: its activation was %g throughout the calibration",
                    layer.name, graph, one.low,
                )  # fmt: skip
    return found


def smoothing_factors(
    layers: Layers, observed: Mapping[str, Mapping[str, Observed]], alpha: float
) -> dict[str, dict[str, npt.NDArray[np.float32]]]:
    """Smoothing factors by graph and activation.

    Layers that read one activation share its factors. A layer that is in several graphs gets the same
    factors in all, from the largest values of all, so that its weight is stored once.
    """
    channels: dict[str, npt.NDArray[np.float32]] = {}  # by layer, over all graphs
    for graph, some in layers.items():
        for layer in some:
            here = observed[graph][layer.data.name or ""].channels
            assert here is not None
            channels[layer.name] = np.maximum(here, channels.get(layer.name, np.float32(0)))
    result: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    maxima: dict[str, npt.NDArray[np.float32]] = {}  # by layer: reading a large weight is what takes time
    for graph, some in layers.items():
        groups: dict[str, list[Layer]] = {}
        for layer in some:
            groups.setdefault(layer.data.name or "", []).append(layer)
        result[graph] = {}
        for value, group in groups.items():
            if any(layer.op == "Conv" and _groups(layer) != 1 for layer in group):
                continue  # the weight of a grouped convolution has no axis for all input channels
            for layer in group:
                if layer.name not in maxima:
                    assert layer.weight.const_value is not None
                    weight = layer.weight.const_value.numpy().astype(np.float32, copy=False)
                    maxima[layer.name] = input_channel_maxima(weight, layer.output_axis)
            activation = np.max([channels[layer.name] for layer in group], axis=0)
            result[graph][value] = factors(activation, [maxima[layer.name] for layer in group], alpha)
    return result


def plan(
    layers: Layers,
    observed: Mapping[str, Mapping[str, Observed]],
    method: Method,
    percentile: float,
    smoothing: Mapping[str, Mapping[str, npt.NDArray[np.float32]]],
    skip: Iterable[Wide] = (),
) -> Plan:
    """How every layer is quantized.

    Args:
        observed: by graph and activation; where it is smoothed, of the smoothed activation.
        smoothing: factors by graph and activation.
        skip: layers that are not quantized.
    """
    skipped = {(wide.graph, wide.name) for wide in skip}
    result: Plan = {}
    for graph, some in layers.items():
        scales: dict[str, float] = {}
        result[graph] = {}
        for layer in some:
            value = layer.data.name or ""
            if (graph, layer.name) in skipped:
                continue
            if value not in scales:
                scales[value] = half_scale(threshold(observed[graph][value].histogram, method, percentile))
            result[graph][layer.name] = Quantized(scales[value], smoothing.get(graph, {}).get(value))
    return result


def without(plan: Plan, names: Iterable[str]) -> Plan:
    """A plan in which some layers are not quantized, in any graph."""
    dropped = set(names)
    return {
        graph: {name: quantized for name, quantized in layers.items() if name not in dropped}
        for graph, layers in plan.items()
    }


def ranking(sqnr: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float]]:
    """Layers, the worst first, with their lowest SQNR in any graph.

    Args:
        sqnr: by graph and layer, in dB.
    """
    worst: dict[str, float] = {}
    for layers in sqnr.values():
        for name, value in layers.items():
            worst[name] = min(value, worst.get(name, math.inf))
    return sorted(worst.items(), key=lambda item: (item[1], item[0]))


def fewest_wide(budget: int, good: Callable[[int], bool]) -> tuple[int, bool]:
    """The smallest number of wide layers, of the worst ones, that is good; and whether any within the
    budget is.

    More wide layers are taken to be no worse, so it is found by bisection; the whole budget is tried last
    but never twice.
    """
    if good(0):
        return 0, True
    if budget == 0 or not good(budget):
        return budget, False
    low, high = 0, budget  # low is not good, high is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high, True


def _groups(layer: Layer) -> int:
    attribute = layer.node.attributes.get("group")
    return 1 if attribute is None else attribute.as_int()
