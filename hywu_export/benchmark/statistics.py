"""Sums over measured times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTILES = (50, 90, 95, 99)
WINDOW = 4
AGREE = 1.05
Summary = dict[str, float]


def summary(values: Sequence[float]) -> Summary:
    """Count, mean, percentiles (linear between ranks) and the variation, standard deviation over mean."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    found = {"count": len(array), "mean": mean, "min": float(array.min())}
    found |= {f"p{p}": float(np.percentile(array, p)) for p in PERCENTILES}
    return found | {"max": float(array.max()), "variation": float(array.std() / mean) if mean > 0 else 0.0}


def stable(times: Sequence[float]) -> bool:
    """Whether the last four times agree within 5 %."""
    last = times[-WINDOW:]
    return len(last) == WINDOW and max(last) <= AGREE * min(last)


def curve(values: Sequence[float]) -> list[float]:
    """The values at percentiles 0, 1, …, 100, for plots."""
    return [float(v) for v in np.percentile(np.asarray(values, np.float64), range(101))]
