"""What a calibration is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from hywu_calibration.methods import PERCENTILE, Method
from hywu_runtime.errors import InputError
from hywu_runtime.manifest import Precision

Form: TypeAlias = Literal["tensorrt", "ort-cpu"]
FORMS: tuple[Form, ...] = ("tensorrt", "ort-cpu")


@dataclass(frozen=True)
class CalibrationOptions:
    """What is asked for.

    Attributes:
        precision: ``fp16``, ``bf16``, ``int8`` or ``int8-weights``.
        images, prompts: a folder of photographs and a file of instructions, like those that will come.
        samples: edits to run; every precision is measured with them.
        method: of the thresholds, INT8 alone; ``percentile`` belongs to the method of that name.
        smooth: SmoothQuant's α, 0 to 1, or None: no smoothing.
        min_psnr: what every edit must reach against FP32, in dB; worst layers are kept wide until it does …
        max_wide: … or this share of the layers is.
        seed: of everything that is drawn.
        name: of the variant; None is the precision's.
        steps: of the edits; None is the bundle's default.
        strength: of the deltas while ranges are observed. The quality is measured at 1 and 0 in any case.
        deltas: delta files to use in turn, for a bundle without a generator.
        form: what INT8 is for: ``tensorrt`` (FP16 around it, convolutions too) or ``ort-cpu`` (FP32 around
            it, unsigned activations, no convolutions).
        sources: checkpoint directories of linked weights.
        cache: where recordings are kept for another run; None is beside the bundle, until the end.
    """

    precision: Precision
    images: Path | None = None
    prompts: Path | None = None
    samples: int = 64
    method: Method = "mse"
    percentile: float = PERCENTILE
    smooth: float | None = None
    min_psnr: float = 32.0
    max_wide: float = 0.1
    seed: int = 0
    name: str | None = None
    steps: int | None = None
    strength: float = 1.0
    deltas: tuple[Path, ...] = ()
    form: Form = "tensorrt"
    sources: Mapping[str, str | Path] = field(default_factory=dict)
    cache: Path | None = None

    @property
    def variant(self) -> str:
        return self.name or self.precision

    def check(self) -> None:
        """Raises InputError for a number outside its limits."""
        limits = (
            ("samples", self.samples, 1, 65536),
            ("percentile", self.percentile, 50, 100),
            ("smooth", self.smooth, 0, 1),
            ("min-psnr", self.min_psnr, 0, 100),
            ("max-wide", self.max_wide, 0, 1),
            ("seed", self.seed, 0, 2**63 - 1),
        )
        for name, value, low, high in limits:
            if value is not None and not low <= value <= high:  # NaN is refused too
                raise InputError(
                    f"--{name} is {value}", f"Expected a number from {low} to {high}", "Correct it"
                )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.variant) or self.variant.endswith("."):
            raise InputError(
                f"{self.variant!r} is no name for a variant",
                "Expected letters, digits, '.', '_' and '-', 64 at most, a letter or digit first",
                "Choose another --name",
            )
        if self.form != "tensorrt" and self.precision != "int8":
            raise InputError(
                f"--backend {self.form} was given for {self.precision}",
                "The form for one backend belongs to int8; other precisions have one for all",
                "Leave it out",
            )
