"""The schedule tables: what each evaluation of the denoiser is told, and what is made of its output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hywu_runtime.codec import show
from hywu_runtime.errors import BundleError, InputError
from hywu_runtime.manifest import Schedules

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """A request's rows, float32: ``timesteps [n]``, ``coefficients [n, K]``, ``initial_scale []``."""

    sampler: str
    steps: int
    timesteps: Floats
    coefficients: Floats
    initial_scale: Floats

    def __len__(self) -> int:
        return len(self.timesteps)


class Schedule:
    """The tables of ``schedule.safetensors``."""

    def __init__(self, path: Path, section: Schedules):
        """Reads and checks the tables.

        Args:
            path: the safetensors file.
            section: the manifest's ``schedules``.
        Raises:
            BundleError: the file cannot be read, or a table is missing or malformed.
        """
        from safetensors.numpy import load_file

        self.section = section
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors has its own exception, and raises OSError and ValueError too
            raise _damaged(f"{path.name} cannot be read: {error}") from None
        self._tables = {name: self._table(tensors, name) for name in section.samplers}
        widths = {table[2].shape[1] for table in self._tables.values()}
        if len(widths) > 1:
            raise _damaged(f"The samplers of {path.name} have {sorted(widths)} coefficients")
        self.width = widths.pop()

    def _table(
        self, tensors: dict[str, npt.NDArray[Any]], name: str
    ) -> tuple[npt.NDArray[np.int64], Floats, Floats, Floats]:
        parts = []
        for key, dtype, ndim in (
            ("offsets", "int64", 1),
            ("timesteps", "float32", 1),
            ("coefficients", "float32", 2),
            ("initial_scale", "float32", 1),
        ):
            tensor = tensors.get(f"{name}.{key}")
            if tensor is None or tensor.dtype != dtype or tensor.ndim != ndim:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise _damaged(
                    f"The schedule tensor {name}.{key} is {found}, not {dtype} with {ndim} dimensions"
                )
            parts.append(tensor)
        offsets, timesteps, coefficients, initial = parts
        sound = (
            len(offsets) == len(initial) + 1 >= 2
            and offsets[0] == 0
            and bool(np.all(offsets[1:] >= offsets[:-1]))
            and offsets[-1] == len(timesteps) == len(coefficients)
            and all(bool(np.isfinite(part).all()) for part in (timesteps, coefficients, initial))
        )
        if not sound:
            raise _damaged(f"The schedule of sampler {name} is inconsistent or not finite")
        return offsets, timesteps, coefficients, initial

    def accepted(self, sampler: str) -> list[int]:
        """The step counts that ``sampler`` takes, ascending."""
        return [int(n) for n in np.flatnonzero(np.diff(self._tables[sampler][0]))]

    def rows(self, sampler: str | None = None, steps: int | None = None) -> Rows:
        """The rows for a step count.

        Args:
            sampler: a sampler of the bundle; None is its default.
            steps: the step count; None is the bundle's default, or the nearest that ``sampler`` takes.
        Raises:
            InputError: the bundle has no such sampler, or the sampler refuses the count; the message names
                what it takes.
        """
        name = self.section.default if sampler is None else sampler
        if not isinstance(name, str) or name not in self._tables:
            raise InputError(
                f"This bundle has no sampler {show(name)}",
                f"It has {', '.join(sorted(self._tables))}",
                "Choose one of these",
            )
        accepted = self.accepted(name)
        if steps is None:
            steps = min(accepted, key=lambda n: abs(n - self.section.default_steps), default=0)
        if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps not in accepted:
            raise InputError(
                f"{show(steps)} steps cannot be made with sampler {name}",
                f"It takes {ranges(accepted)}",
                "Choose another number of steps",
            )
        offsets, timesteps, coefficients, initial = self._tables[name]
        part = slice(int(offsets[steps]), int(offsets[steps + 1]))
        return Rows(name, int(steps), timesteps[part], coefficients[part], initial[steps])


def ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 5]`` as ``1 to 3, 5``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in parts) or "no number of steps"


def _damaged(problem: str) -> BundleError:
    return BundleError(
        problem,
        "Expected the tables that docs/bundle.md describes",
        "Copy or export the bundle again",
    )
