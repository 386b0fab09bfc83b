"""Streaming histograms of absolute values: constant memory, independent of the order of the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 4096
"""Bins of a histogram. The largest value lies in the upper half, so at least 2048 of them are in use."""

_CHUNK = 1 << 20  # values at a time: bounds the memory of intermediates
_LEAST_EXPONENT = -115
"""Below, all is zero: it is under FP16's and INT8's horizon, and bins to a unit stay a float32 (2**127)."""


class Histogram:
    """How often absolute values fall into ``BINS`` bins of equal width over ``[0, 2**exponent)``.

    The exponent is the smallest that holds the largest value seen. When a larger one comes, neighbouring bins
    are added up; scaling by a power of two is exact, so the counts are those that all data would give at
    once, in any order and from any number of streams.

    Attributes:
        counts: int64 ``[BINS]``.
        exponent: of the range; None while all values are zero (they are in the first bin).
        largest: the largest absolute value, exactly.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.exponent: int | None = None
        self.largest = 0.0

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """The width of a bin; 0 while all values are zero."""
        return 0.0 if self.exponent is None else 2.0**self.exponent / BINS

    @property
    def centers(self) -> npt.NDArray[np.float64]:
        """The middle of every bin."""
        return np.asarray((np.arange(BINS) + 0.5) * self.width, np.float64)

    def add(self, values: npt.NDArray[Any]) -> None:
        """Counts an array's absolute values.

        Raises:
            ValueError: a value is not finite.
        """
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            piece = np.abs(flat[start : start + _CHUNK].astype(np.float32, copy=False))
            largest = float(piece.max())
            if not np.isfinite(largest):
                raise ValueError("a value is not finite")
            self._grow(largest)
            if self.exponent is None:
                self.counts[0] += piece.size
                continue
            bins = (piece * np.float32(BINS / 2.0**self.exponent)).astype(np.int32)
            self.counts += np.bincount(bins, minlength=BINS)

    def merge(self, other: Histogram) -> None:
        """Counts what another histogram has counted."""
        self._grow(other.largest)
        self.counts += _folded(
            other.counts, 0 if other.exponent is None else (self.exponent or 0) - other.exponent
        )

    def _grow(self, largest: float) -> None:
        self.largest = max(self.largest, largest)
        exponent = int(np.frexp(self.largest)[1])
        if self.largest == 0 or exponent < _LEAST_EXPONENT:
            return
        if self.exponent is not None and exponent > self.exponent:
            self.counts = _folded(self.counts, exponent - self.exponent)
        self.exponent = exponent if self.exponent is None else max(self.exponent, exponent)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Histogram)
            and (self.exponent, self.largest) == (other.exponent, other.largest)
            and bool((self.counts == other.counts).all())
        )

    __hash__ = None  # type: ignore[assignment]

    def to_array(self) -> npt.NDArray[np.int64]:
        """All of it as int64 ``[BINS + 2]``, for a state file."""
        largest = np.array([self.largest], np.float64).view(np.int64)
        exponent = np.array([2**31 if self.exponent is None else self.exponent], np.int64)
        return np.concatenate([self.counts, exponent, largest])

    @classmethod
    def from_array(cls, array: npt.NDArray[np.int64]) -> Histogram:
        """What `to_array` gave."""
        result = cls()
        result.counts = array[:BINS].copy()
        result.exponent = None if array[BINS] == 2**31 else int(array[BINS])
        result.largest = float(array[BINS + 1 :].copy().view(np.float64)[0])
        return result


def _folded(counts: npt.NDArray[np.int64], doublings: int) -> npt.NDArray[np.int64]:
    """The counts over a range that is ``2**doublings`` times as large."""
    factor = min(2**doublings, BINS)
    folded = np.zeros_like(counts)
    folded[: BINS // factor] = counts.reshape(-1, factor).sum(1)
    return folded
