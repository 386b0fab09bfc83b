"""From the values of a tensor to the threshold of its INT8 range: what lies beyond is clipped.

All ranges are symmetric: a threshold t gives the scale t / 127 and the integers -127 … 127. Every method
reads a :class:`Histogram`, and never gives less than a bin's width or more than the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from hywu_calibration.histogram import BINS, Histogram

Method: TypeAlias = Literal["minmax", "percentile", "entropy", "mse"]
LEVELS = 127
PERCENTILE = 99.99
_QUANTIZED = 128  # levels of the KL divergence: 0 … 127
_ENTROPY_STEP = 8  # bins between two candidates; a hundredth of an INT8 level's worth of clipping
_CANDIDATES = 256  # of the MSE search


def threshold(histogram: Histogram, method: Method, percentile: float = PERCENTILE) -> float:
    """The threshold by a method, 0 for a tensor that was zero throughout.

    Args:
        histogram: the tensor's absolute values.
        method: ``minmax``: the largest value. ``percentile``: so many percent of the values lie below.
            ``entropy``: the smallest Kullback-Leibler divergence between the values and the quantized ones
            (Migacz, "8-bit inference with TensorRT", GTC 2017). ``mse``: the smallest mean squared error.
        percentile: of method ``percentile``, 0 to 100.
    """
    if histogram.exponent is None:
        return 0.0
    found = _METHODS[method](histogram, percentile)
    return float(min(max(found, histogram.width), histogram.largest))


def _minmax(histogram: Histogram, _: float) -> float:
    return histogram.largest


def _percentile(histogram: Histogram, percentile: float) -> float:
    cumulative = np.cumsum(histogram.counts)
    index = int(np.searchsorted(cumulative, percentile / 100 * cumulative[-1]))
    return (index + 1) * histogram.width


def _entropy(histogram: Histogram, _: float) -> float:
    counts = histogram.counts.astype(np.float64)
    used = int(np.flatnonzero(counts)[-1]) + 1
    if used <= _QUANTIZED:
        return histogram.largest
    # Exact zeros (of ReLU, of padding) are represented exactly whatever the scale: as pytorch-quantization
    # does, their spike is not allowed to decide.
    counts[0] = counts[1]
    best = (np.inf, used)
    for end in range(used, _QUANTIZED - 1, -_ENTROPY_STEP):
        reference = counts[:end].copy()
        reference[-1] += counts[end:].sum()
        divergence = _divergence(reference, _requantized(counts[:end]))
        if divergence < best[0]:  # the larger threshold wins a tie
            best = (divergence, end)
    return best[1] * histogram.width


def _requantized(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The distribution after quantization: a level's count, spread over its bins that are not empty."""
    level = np.minimum(np.arange(counts.size) * _QUANTIZED // counts.size, _QUANTIZED - 1)
    occupied = counts > 0
    sums = np.bincount(level, counts, _QUANTIZED)
    bins = np.bincount(level, occupied, _QUANTIZED)
    return np.where(occupied, (sums / np.maximum(bins, 1))[level], 0.0)


def _divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """KL(p ‖ q) of two unnormalised distributions; infinite where q has nothing and p has something."""
    here = p > 0
    if q.sum() == 0 or (q[here] == 0).any():
        return np.inf
    p, q = p[here] / p.sum(), q[here] / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _mse(histogram: Histogram, _: float) -> float:
    used = np.flatnonzero(histogram.counts)
    counts, values = histogram.counts[used].astype(np.float64), histogram.centers[used]
    values[used == 0] = 0.0  # mostly exact zeros, and in any case less than a level
    thresholds = np.linspace(histogram.largest / _CANDIDATES, histogram.largest, _CANDIDATES)
    errors = [np.dot(counts, np.square(values - quantized(values, t / LEVELS))) for t in thresholds[::-1]]
    return float(thresholds[::-1][int(np.argmin(errors))])


def quantized(values: npt.NDArray[np.float64], scale: float) -> npt.NDArray[np.float64]:
    """Values rounded to an INT8 grid and clipped, as QuantizeLinear and DequantizeLinear do."""
    return np.clip(np.rint(values / scale), -LEVELS - 1, LEVELS) * scale


_METHODS: Mapping[Method, Callable[[Histogram, float], float]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
METHODS: tuple[Method, ...] = tuple(_METHODS)

assert BINS % _QUANTIZED == 0
