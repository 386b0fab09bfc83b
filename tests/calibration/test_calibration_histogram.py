"""Streaming histograms and thresholds: properties, and ONNX Runtime's calibrators on the same data."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hywu_calibration.histogram import BINS, Histogram
from hywu_calibration.methods import LEVELS, METHODS, Method, quantized, threshold

FLOATS = st.floats(-1e6, 1e6, width=32)
PIECES = st.lists(arrays(np.float32, st.integers(0, 50), elements=FLOATS), min_size=1, max_size=6)


def counted(*pieces: np.ndarray) -> Histogram:
    histogram = Histogram()
    for piece in pieces:
        histogram.add(piece)
    return histogram


@example([np.array([5.2370376e-37], np.float32)], random.Random(0))
@given(PIECES, st.randoms())
def test_order_and_streams_do_not_matter(pieces: list[np.ndarray], draw: random.Random) -> None:
    once = counted(np.concatenate(pieces))
    shuffled = list(pieces)
    draw.shuffle(shuffled)
    assert counted(*shuffled) == once
    merged = Histogram()
    for piece in shuffled:
        merged.merge(counted(piece))
    assert merged == once
    assert Histogram.from_array(once.to_array()) == once


@given(arrays(np.float32, st.integers(1, 200), elements=FLOATS))
def test_equals_numpy(values: np.ndarray) -> None:
    histogram = counted(values)
    assert histogram.total == values.size
    assert histogram.largest == np.abs(values).max()
    if histogram.exponent is not None:
        edges = np.arange(BINS + 1) * histogram.width
        assert histogram.largest >= edges[BINS // 2]  # at least half of the bins are in use
        expected, _ = np.histogram(np.abs(values.astype(np.float64)), edges)
        np.testing.assert_array_equal(histogram.counts, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Histogram().add(np.array([1, value, 2], np.float32))


@pytest.mark.parametrize("method", METHODS)
def test_all_zero(method: Method) -> None:
    assert threshold(counted(np.zeros(100, np.float32)), method) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_one_value(method: Method) -> None:
    assert threshold(counted(np.full(100, -3.5, np.float32)), method) == pytest.approx(3.5, rel=0.05)


@given(arrays(np.float32, st.integers(1, 200), elements=FLOATS), st.sampled_from(METHODS))
def test_within_the_data(values: np.ndarray, method: Method) -> None:
    histogram = counted(values)
    assert 0 <= threshold(histogram, method) <= histogram.largest


def heavy_tailed(seed: int = 0) -> np.ndarray:
    """Mostly normal, with a few outliers at twenty times the deviation."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(200_000)
    values[::5000] *= 12
    return values.astype(np.float32)


def ort_threshold(values: np.ndarray, method: str, bins: int) -> float:
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method=method, symmetric=True, num_bins=bins, num_quantized_bins=255, percentile=99.9, scenario="same"
    )
    for piece in np.array_split(values, 3):  # the first piece sets the width of its bins
        collector.collect({"x": piece})
    (result,) = collector.compute_collection_result().values()
    return float(result[1])


def test_percentile_equals_onnxruntime() -> None:
    values = heavy_tailed()
    expected = ort_threshold(values, "percentile", 4096)
    found = threshold(counted(values), "percentile", 99.9)
    assert found == pytest.approx(expected, rel=0.01)
    assert found == pytest.approx(float(np.quantile(np.abs(values), 0.999)), rel=0.01)


def test_entropy_is_near_onnxruntime() -> None:
    values = np.random.default_rng(1).laplace(size=200_000).astype(np.float32)
    expected = ort_threshold(values, "entropy", 2047)
    found = threshold(counted(values), "entropy")
    assert found == pytest.approx(expected, rel=0.25)
    assert found < np.abs(values).max()


def test_mse_is_the_best_of_all_thresholds() -> None:
    values = heavy_tailed().astype(np.float64)

    def error(t: float) -> float:
        return float(np.mean(np.square(values - quantized(values, t / LEVELS))))

    histogram = counted(values)
    best = error(threshold(histogram, "mse"))
    assert best <= min(error(t) for t in np.linspace(0.1, histogram.largest, 200)) * 1.01
    assert best < error(threshold(histogram, "minmax"))
