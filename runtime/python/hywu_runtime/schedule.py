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
    """The rows that a request runs, float32: ``timesteps [n]``, ``coefficients [n, K]``.

    ``initial_scale []`` is that of the step count; ``start [S]`` that of the first row, where requests may
    start midway.
    """

    sampler: str
    steps: int
    timesteps: Floats
    coefficients: Floats
    initial_scale: Floats
    start: Floats | None = None

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class _Table:
    """One sampler's tensors; ``start`` is there if requests may start midway."""

    offsets: npt.NDArray[np.int64]
    timesteps: Floats
    coefficients: Floats
    initial_scale: Floats
    start: Floats | None = None


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
        widths = {table.coefficients.shape[1] for table in self._tables.values()}
        if len(widths) > 1:
            raise _damaged(f"The samplers of {path.name} have {sorted(widths)} coefficients")
        self.width = widths.pop()

    def _table(self, tensors: dict[str, npt.NDArray[Any]], name: str) -> _Table:
        parts = []
        for key, dtype, ndim in (
            ("offsets", "int64", 1),
            ("timesteps", "float32", 1),
            ("coefficients", "float32", 2),
            ("initial_scale", "float32", 1),
            ("start", "float32", 2),
        ):
            if key == "start" and self.section.strength is None:
                continue
            tensor = tensors.get(f"{name}.{key}")
            if tensor is None or tensor.dtype != dtype or tensor.ndim != ndim:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise _damaged(
                    f"The schedule tensor {name}.{key} is {found}, not {dtype} with {ndim} dimensions"
                )
            parts.append(tensor)
        offsets, timesteps, coefficients, initial, *start = parts
        sound = (
            len(offsets) == len(initial) + 1 >= 2
            and offsets[0] == 0
            and bool(np.all(offsets[1:] >= offsets[:-1]))
            and all(offsets[-1] == len(part) for part in (timesteps, coefficients, *start))
            and all(bool(np.isfinite(part).all()) for part in parts[1:])
        )
        if not sound:
            raise _damaged(f"The schedule of sampler {name} is inconsistent or not finite")
        return _Table(offsets, timesteps, coefficients, initial, *start)

    def accepted(self, sampler: str) -> list[int]:
        """The step counts that ``sampler`` takes, ascending."""
        return [int(n) for n in np.flatnonzero(np.diff(self._tables[sampler].offsets))]

    def rows(
        self, sampler: str | None = None, steps: int | None = None, strength: float | None = None
    ) -> Rows:
        """The rows for a step count, or, where requests start midway, its last ones.

        Args:
            sampler: a sampler of the bundle; None is its default.
            steps: the step count; None is the bundle's default, or the nearest that ``sampler`` takes.
            strength: the part of the steps to run, above 0 and at most 1; None is the bundle's default.
        Raises:
            InputError: the bundle has no such sampler, the sampler refuses the count, or it cannot start
                there; the message names what it takes.
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
        table = self._tables[name]
        first, last = int(table.offsets[steps]), int(table.offsets[steps + 1])
        first += self._skipped(name, int(steps), last - first, strength)
        part = slice(first, last)
        return Rows(
            name,
            int(steps),
            table.timesteps[part],
            table.coefficients[part],
            table.initial_scale[steps],
            None if table.start is None else table.start[first],
        )

    def _skipped(self, sampler: str, steps: int, rows: int, strength: float | None) -> int:
        """How many rows a request leaves out that starts midway, as the pipelines of diffusers count."""
        section = self.section.strength
        if section is None:
            if strength is not None:
                raise InputError(
                    "`strength` was given, but this bundle starts every edit from noise",
                    "Expected none",
                    "Leave it out",
                )
            return 0
        value = section.default if strength is None else strength
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 < value <= 1:
            raise InputError(
                f"`strength` is {show(strength)}",
                "Expected a number above 0 and at most 1",
                "Correct it: 1 keeps nothing of the photo, a small one nearly all of it",
            )
        order = self.section.samplers[sampler].order
        if order is None:
            if value < 1:
                able = sorted(n for n, s in self.section.samplers.items() if s.order is not None)
                raise InputError(
                    f"The sampler {sampler} cannot start midway, as a strength of {float(value)} asks",
                    "Its steps build on earlier ones",
                    f"Use a strength of 1{', or the sampler ' + ' or '.join(able) if able else ''}",
                )
            return 0
        skipped = int(max(steps - min(steps * float(value), steps), 0)) * order
        if skipped >= rows:
            raise InputError(
                f"No step is left of {steps} with a strength of {float(value)}",
                "Expected at least one",
                "Raise the strength or the number of steps",
            )
        return skipped


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
