"""What a variant is, and how it differs from FP32: ``report.json`` of a variant.

``report.schema.json`` beside this file says the same as a JSON schema, ``docs/precision.md`` in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hywu_runtime.manifest import Precision

FORMAT = 1
SCHEMA = Path(__file__).with_name("report.schema.json")
LEAST_DB, MOST_DB = -100.0, 200.0
"""Ratios are cut to these: JSON has no infinity, and beyond them there is nothing to tell."""

LayerPrecision = Literal["fp32", "fp16", "bf16", "int8", "int8-weights"]
Measured = Literal["runtime", "emulation"]


@dataclass(frozen=True)
class Edit:
    """One edited picture against FP32.

    Attributes:
        photo: the file's name.
        size: width and height in pixels.
        psnr_db: over all pixels and channels; 100 if the pictures are equal.
        largest_difference: in levels of 255.
    """

    photo: str
    prompt: str
    size: tuple[int, int]
    guided: bool
    psnr_db: float
    largest_difference: int


@dataclass(frozen=True)
class Quality:
    """Edited pictures against FP32. ``psnr_db`` is the mean over edits, ``least_psnr_db`` the worst one."""

    psnr_db: float
    least_psnr_db: float
    edits: tuple[Edit, ...]

    @classmethod
    def of(cls, edits: Sequence[Edit]) -> Quality:
        """The quality of at least one edit."""
        values = [edit.psnr_db for edit in edits]
        return cls(round(sum(values) / len(values), 3), min(values), tuple(edits))


@dataclass(frozen=True)
class FinalImage:
    """The edited picture, which is what counts.

    Attributes:
        deltas_on: at strength 1; None for a bundle without deltas.
        deltas_off: at strength 0.
        measured: ``runtime``: ONNX Runtime ran the variant's own graphs. ``emulation``: every narrow
            node's result was rounded, in FP32 graphs, because ONNX Runtime's CPU does not compute in that
            type.
    """

    deltas_on: Quality | None
    deltas_off: Quality
    measured: Measured


@dataclass(frozen=True)
class LayerReport:
    """A product with a constant weight: a MatMul, Gemm or Conv.

    Attributes:
        name: the module's path.
        sqnr_db: signal to noise of its output against FP32; None where it was not measured.
        precision: of its inputs.
    """

    graph: str
    name: str
    op: str
    sqnr_db: float | None
    precision: LayerPrecision


@dataclass(frozen=True)
class Wide:
    """What computes in a wider type than the variant's, and why: a layer (INT8) or a node (FP16, BF16)."""

    graph: str
    name: str
    op: str
    reason: str


@dataclass(frozen=True)
class Size:
    """Bytes of graphs with their weights, linked ones included: in FP32, in the variant, and by component."""

    fp32_bytes: int
    variant_bytes: int
    components: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A photograph that could not be read, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Samples:
    """What was run for the ranges: ``count`` edits of so many photographs, prompts and ``steps``."""

    count: int
    photographs: int
    prompts: int
    steps: int
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Target:
    """What was asked for: each edit at least ``min_psnr_db``, a share of at most ``max_wide`` wide."""

    min_psnr_db: float
    max_wide: float


@dataclass(frozen=True)
class Report:
    """How a variant was made and how it differs from FP32.

    Attributes:
        method: of the activations' thresholds (INT8 alone), with its parameters as ``percentile 99.99``.
        smooth: SmoothQuant's α, or None.
        target: None where nothing was asked for.
        notes: what a reader should know besides, in whole sentences.
    """

    variant: str
    precision: Precision
    final_image: FinalImage
    layers: tuple[LayerReport, ...]
    wide: tuple[Wide, ...]
    size: Size
    samples: Samples
    seed: int
    versions: Mapping[str, str]
    method: str | None = None
    smooth: float | None = None
    target: Target | None = None
    notes: tuple[str, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether the pictures with deltas on (off, without deltas) are as asked; None if nothing was."""
        quality = self.final_image.deltas_on or self.final_image.deltas_off
        return None if self.target is None else quality.least_psnr_db >= self.target.min_psnr_db

    @property
    def wide_layers(self) -> int:
        """How many layers are wider than most: in INT8 variants those without INT8, else those in FP32."""
        narrow = {"int8": "int8", "int8-weights": "int8-weights"}.get(self.precision)
        return sum(x.precision != narrow if narrow else x.precision == "fp32" for x in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as ``report.schema.json`` says. Equal reports give equal text."""
        content = {"format": FORMAT, **asdict(self)}
        for layer in content["layers"]:
            layer["sqnr_db"] = bounded_db(layer["sqnr_db"])
        return dict(_rounded(content))

    def dumps(self) -> str:
        """The text of ``report.json``."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def bounded_db(ratio: float | None) -> float | None:
    """A ratio in dB within ``LEAST_DB`` and ``MOST_DB``; None for one that is not a number."""
    if ratio is None or math.isnan(ratio):
        return None
    return min(max(ratio, LEAST_DB), MOST_DB)


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("hywu-export", "numpy", "onnx-ir", "onnxruntime"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # another distribution of the same module, or a source tree
            found[name] = _module_version(name)
    return found


def _module_version(name: str) -> str:
    from importlib import import_module

    try:
        return str(getattr(import_module(name.replace("-", "_")), "__version__", "unknown"))
    except ImportError:
        return "unknown"


def _rounded(value: Any) -> Any:
    """Numbers with three decimals: more would be noise, and differ from machine to machine."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
