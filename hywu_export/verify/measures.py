"""Two arrays compared, and when they are the same: what every check of `hywu verify` measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hywu_runtime.manifest import Precision

Array = npt.NDArray[Any]
Failure = Literal["shape", "value"]


@dataclass(frozen=True)
class Measure:
    """How far values are from those expected. Measures of parts add up to that of the whole.

    Attributes:
        largest, mean: absolute difference, in the tensor's own unit (levels for uint8). NaN if something is
            not finite.
        signal, noise: sums of squares of the values expected and of the differences.
        peak: the largest absolute value expected; 255 for uint8.
        count: how many values.
    """

    largest: float = 0.0
    mean: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    peak: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, got: Array, expected: Array) -> Measure:
        """Arrays of one shape."""
        wide = expected.astype(np.float64)
        difference = np.abs(got.astype(np.float64) - wide)
        if not difference.size:
            return cls()
        with np.errstate(invalid="ignore", over="ignore"):
            return cls(
                float(difference.max()),
                float(difference.mean()),
                float(np.square(wide).sum()),
                float(np.square(difference).sum()),
                255.0 if expected.dtype == np.uint8 else float(np.abs(wide).max()),
                difference.size,
            )

    def __add__(self, other: Measure) -> Measure:
        count = self.count + other.count
        return Measure(
            float(np.maximum(self.largest, other.largest)),  # which keeps NaN
            (self.mean * self.count + other.mean * other.count) / count if count else 0.0,
            self.signal + other.signal,
            self.noise + other.noise,
            max(self.peak, other.peak),
            count,
        )

    @property
    def relative(self) -> float:
        """The largest difference in units of the largest value."""
        return self.largest / (self.peak or 1.0) if self.largest else self.largest

    @property
    def sqnr_db(self) -> float:
        """Signal to noise: infinite if all is equal, NaN if something is not finite."""
        return _decibels(self.signal, self.noise)

    @property
    def psnr_db(self) -> float:
        """The peak's square to the mean squared difference."""
        return _decibels(self.peak**2 * self.count, self.noise)

    def to_json(self) -> dict[str, float | None]:
        """Numbers that JSON can hold: null is infinite for a ratio, not finite for a difference."""
        values = {
            "largest": self.largest,
            "mean": self.mean,
            "relative": self.relative,
            "sqnr_db": self.sqnr_db,
            "psnr_db": self.psnr_db,
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    return 10 * math.log10(signal / noise) if signal else -math.inf


@dataclass(frozen=True)
class Tolerance:
    """What a measure must meet; ``origin`` says where the limit comes from."""

    kind: Literal["relative", "levels", "sqnr_db", "psnr_db", "equal"]
    limit: float
    origin: str = ""

    def meets(self, measure: Measure) -> bool:
        """NaN meets nothing."""
        if self.kind in ("sqnr_db", "psnr_db"):
            value = measure.sqnr_db if self.kind == "sqnr_db" else measure.psnr_db
            return value >= self.limit
        value = measure.relative if self.kind == "relative" else measure.largest
        return value <= self.limit

    def excess(self, measure: Measure) -> float:
        """How bad a measure is, to find the worst of several: the larger the worse."""
        if self.kind in ("sqnr_db", "psnr_db"):
            value = -(measure.sqnr_db if self.kind == "sqnr_db" else measure.psnr_db)
        else:
            value = measure.relative if self.kind == "relative" else measure.largest
        return math.inf if math.isnan(value) else value

    def __str__(self) -> str:
        text = {
            "relative": f"within {self.limit:g} of the largest value",
            "levels": f"within {self.limit:g} level{'' if self.limit == 1 else 's'}",
            "sqnr_db": f"SQNR of at least {self.limit:g} dB",
            "psnr_db": f"PSNR of at least {self.limit:g} dB",
            "equal": "equal",
        }[self.kind]
        return f"{text} ({self.origin})" if self.origin else text


EXACT = Tolerance("equal", 0)
TORCH = Tolerance("relative", 1e-4)
"""ONNX Runtime against torch, both FP32: they sum in another order."""
LEVEL = Tolerance("levels", 1)
"""uint8 of two FP32 computations: what lies on the border may round either way."""
TILED = Tolerance("psnr_db", 30, "the VAE works in tiles")
"""A picture decoded in tiles against one decoded as a whole: rims and norms are a tile's."""

SQNR_FLOORS: Mapping[Precision, float] = {"fp16": 35, "bf16": 18, "int8-weights": 20, "int8": 10}
"""dB that every output of a graph must reach, from the noise of a rounding and what a deep graph adds to it.

A significand of n bits gives about 6 n dB to each result: 66 in FP16, 48 in BF16; 8 bits per channel give
a weight about 40 dB, and per tensor an activation about 30. Some hundred of them in a row cost another 20 dB,
and 10 more are left as a margin. A wrong scale gives less than 10 dB.
"""
PSNR_FLOORS: Mapping[Precision, float] = {"fp16": 35, "bf16": 25, "int8-weights": 25, "int8": 20}
"""dB of an edited picture, where a variant makes no promise of its own."""
PROMISE_MARGIN = 6.0
"""dB by which one more picture may be worse than the worst that a variant's report saw."""


def for_graph(dtype: str, precision: Precision | None) -> Tolerance:
    """What an output must meet. None is FP32, TF32 in TensorRT."""
    key: Precision = precision or "fp16"
    if dtype == "uint8":
        return Tolerance("psnr_db", PSNR_FLOORS[key])
    return Tolerance("sqnr_db", SQNR_FLOORS[key]) if dtype.startswith("float") else EXACT


def for_picture(precision: Precision | None, promised: float | None) -> Tolerance:
    """What an edited picture must meet, given the worst PSNR that the variant's report saw."""
    if promised is None:
        return Tolerance("psnr_db", PSNR_FLOORS[precision or "fp16"])
    limit = round(promised - PROMISE_MARGIN, 1)
    return Tolerance("psnr_db", limit, f"its report's {promised:.1f} less {PROMISE_MARGIN:g}")


@dataclass(frozen=True)
class TensorCheck:
    """One output at all sizes that were tried. ``sizes``: where it is worst."""

    tensor: str
    tolerance: Tolerance
    measure: Measure = field(default_factory=Measure)
    failure: Failure | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    detail: str = ""

    def seen(self, got: Array, expected: Array, sizes: Mapping[str, int]) -> TensorCheck:
        """With one more comparison."""
        if self.failure == "shape":
            return self
        if got.shape != expected.shape or got.dtype != expected.dtype:
            detail = f"{got.dtype} {list(got.shape)} instead of {expected.dtype} {list(expected.shape)}"
            return replace(self, failure="shape", sizes=dict(sizes), detail=detail)
        one = Measure.of(got, expected)
        worse = not self.measure.count or self.tolerance.excess(one) > self.tolerance.excess(self.measure)
        failed = self.failure == "value" or not self.tolerance.meets(one)
        return replace(
            self,
            measure=self.measure + one,
            failure="value" if failed else None,
            sizes=dict(sizes) if worse else self.sizes,
        )

    @property
    def badness(self) -> tuple[int, float]:
        """For finding the worst: a wrong shape, then a wrong value, then the largest difference."""
        return {"shape": 2, "value": 1, None: 0}[self.failure], self.tolerance.excess(self.measure)


@dataclass(frozen=True)
class Check:
    """A graph or a whole edit, of one part: ``torch``, ``variant NAME`` or ``engine KEY``."""

    part: str
    name: str
    tensors: tuple[TensorCheck, ...]

    @property
    def worst(self) -> TensorCheck:
        """The tensor that is furthest from what it should be."""
        return max(self.tensors, key=lambda tensor: tensor.badness)

    @property
    def failure(self) -> Failure | None:
        """The gravest."""
        return self.worst.failure


@dataclass(frozen=True)
class NotRun:
    """A part that was not compared, and why."""

    part: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `verify` found. ``notes``: what limits what the numbers say."""

    checks: tuple[Check, ...]
    not_run: tuple[NotRun, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def failure(self) -> Failure | None:
        """The gravest failure: a wrong shape, then a wrong value."""
        failures = {check.failure for check in self.checks}
        return "shape" if "shape" in failures else "value" if "value" in failures else None
