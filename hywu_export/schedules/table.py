"""The table of one sampler and the file that holds all tables of a bundle (docs/bundle.md, *Schedules*)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hywu_runtime.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9_+-]+")


@dataclass(frozen=True)
class ScheduleTable:
    """All step counts 1…M of one sampler.

    A row holds K = 2·history + 4 coefficients: of the model input, of the latents, of the model output, of
    the noise, then pairs for the latents and the model output of 1, 2, … evaluations ago. A row of noise
    levels that the step graph shifts (`schedules.shift`) has no history and a meaning of its own.
    """

    name: str
    class_name: str  # diffusers class
    history: int  # pairs of earlier evaluations that a row refers to
    offsets: npt.NDArray[np.int64]  # [M+2]; rows of step count N are offsets[N]…offsets[N+1]
    timesteps: npt.NDArray[np.float32]  # [rows]
    coefficients: npt.NDArray[np.float32]  # [rows, K]
    initial_scale: npt.NDArray[np.float32]  # [M+1]; deviation of the first latents, 0 if refused
    stochastic: bool  # some row uses noise
    start: npt.NDArray[np.float32] | None = None  # [rows, S]; how a request begins that starts at a row
    order: int | None = None  # evaluations of a step, if requests may start at any (schedules.start)

    def rows(self, steps: int) -> slice:
        """The rows of a step count; empty if the sampler refuses it."""
        if not 0 <= steps < len(self.offsets) - 1:
            return slice(0, 0)
        return slice(int(self.offsets[steps]), int(self.offsets[steps + 1]))

    def step_range(self) -> tuple[int, int]:
        """The smallest and the largest step count that the sampler accepts."""
        accepted = np.flatnonzero(np.diff(self.offsets))
        return int(accepted[0]), int(accepted[-1])

    def widen(self, history: int) -> ScheduleTable:
        """The same sampler with room for a longer history; raises InputError if it would be shorter."""
        if history < self.history:
            raise InputError(
                f"{self.class_name} needs {self.history} earlier evaluations, not {history}",
                f"a history of at least {self.history}",
            )
        padding = ((0, 0), (0, 2 * (history - self.history)))
        return replace(self, history=history, coefficients=np.pad(self.coefficients, padding))


def write_schedules(path: str | os.PathLike[str], tables: Mapping[str, ScheduleTable]) -> None:
    """Write the schedule file of a bundle; the same tables give the same bytes.

    The mapping's keys are the samplers' names in the file. All tables are widened to the longest history
    among them, for every sampler of a bundle has the same K. Raises InputError for an empty mapping, an
    unusable name, or a file that cannot be written; an earlier file then stays as it was.
    """
    from safetensors.numpy import save

    if not tables:
        raise InputError("There is no sampler to write", "at least one schedule table")
    for name in tables:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{name!r} cannot be the name of a sampler",
                "ASCII letters, digits, '_', '+' and '-', at least one",
            )
    history = max(table.history for table in tables.values())
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for name, table in sorted(tables.items()):
        wide = table.widen(history)
        tensors[f"{name}.offsets"] = np.ascontiguousarray(wide.offsets, dtype=np.int64)
        tensors[f"{name}.timesteps"] = np.ascontiguousarray(wide.timesteps, dtype=np.float32)
        tensors[f"{name}.coefficients"] = np.ascontiguousarray(wide.coefficients, dtype=np.float32)
        tensors[f"{name}.initial_scale"] = np.ascontiguousarray(wide.initial_scale, dtype=np.float32)
        if wide.start is not None:
            tensors[f"{name}.start"] = np.ascontiguousarray(wide.start, dtype=np.float32)
    _replace(Path(path), save(tensors))


def _replace(path: Path, data: bytes) -> None:
    """Put ``data`` in place at once, so that no reader ever sees half of it."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        staged.write_bytes(data)
        staged.replace(path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()
        raise InputError(
            f"{path} cannot be written ({error.strerror})",
            "a file in a directory that exists, and free space",
        ) from error
