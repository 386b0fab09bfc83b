"""Edited pictures: what a variant is measured by in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hywu_calibration.samples import Sample
from hywu_export.bundle.sessions import ModelBackend
from hywu_runtime.backends import Backend
from hywu_runtime.bundle import Bundle

if TYPE_CHECKING:
    import onnx_ir as ir

    from hywu_runtime import Deltas

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], object]
IDENTICAL_DB = 100.0
"""The PSNR that is put in for two equal pictures: 8-bit pictures that differ at all stay below it."""


@dataclass(frozen=True)
class Strengths:
    """PSNR in dB against FP32, one for each edit, with deltas on and off."""

    on: tuple[float, ...]
    off: tuple[float, ...]


class Evaluation:
    """Some edits in FP32, and how near other models come to them.

    Args:
        bundle: the bundle; its own graphs are the reference.
        samples: the edits.
        deltas: sets to use in turn, in place of generated ones; empty with a generator.
        folder: where the reference pictures are kept, for a job that goes on.
    """

    def __init__(self, bundle: Bundle, samples: Sequence[Sample], deltas: Sequence[Deltas], folder: Path):
        self.bundle, self.samples, self._deltas, self._folder = bundle, tuple(samples), tuple(deltas), folder

    def references(self, backend: Backend, strength: float, progress: Progress | None = None) -> list[Pixels]:
        """The pictures in FP32, made where they are missing."""
        file = self._folder / f"reference-{strength:g}.safetensors"
        from safetensors.numpy import load_file, save

        from hywu_runtime.files import write_atomically

        if not file.exists():
            pictures = self.edit(backend, strength, progress)
            content = save({f"{i:05d}": picture for i, picture in enumerate(pictures)})
            write_atomically(file, lambda stream: stream.write(content))
        return [picture for _, picture in sorted(load_file(file).items())]

    def edit(self, backend: Backend, strength: float, progress: Progress | None = None) -> list[Pixels]:
        """The edits with deltas of a strength."""
        from hywu_runtime import Editor

        pictures = []
        with Editor(self.bundle, backend) as editor:
            for i, sample in enumerate(self.samples):
                if progress is not None:
                    progress(i, len(self.samples))
                photos = [sample.photo] * editor.limits().photos
                picture = editor.edit(
                    photos, sample.prompt, seed=sample.seed, steps=sample.steps, size=sample.size,
                    guidance=dict(sample.guidance), delta_strength=strength, output="array",
                    deltas=self._deltas[sample.number % len(self._deltas)] if self._deltas else None,
                )  # fmt: skip
                pictures.append(np.asarray(picture))
        return pictures

    def psnr(
        self,
        models: Mapping[str, ir.Model],
        references: Sequence[Pixels],
        strength: float,
        progress: Progress | None = None,
    ) -> tuple[tuple[float, ...], list[Pixels]]:
        """PSNR in dB of the edits by ``models``, by graph, and the pictures."""
        pictures = self.edit(ModelBackend(self.bundle, models), strength, progress)
        return tuple(psnr(a, b) for a, b in zip(pictures, references)), pictures


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures, in dB; ``IDENTICAL_DB`` for equal ones."""
    error = float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))))
    return float(10 * np.log10(255**2 / error)) if error else IDENTICAL_DB
