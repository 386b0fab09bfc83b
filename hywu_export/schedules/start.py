"""Samplers that start midway, from a photo: the first latents, and whether the rest of a table then holds.

Image-to-image pipelines leave out the first steps and give the scheduler the photo's latents with as much
noise as the schedule has at that point. That too is linear: `with_start` reads it off the real scheduler with
unit vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hywu_export.schedules.samplers import Scheduler, set_steps
from hywu_export.schedules.table import ScheduleTable
from hywu_export.schedules.trace import trajectory_error
from hywu_runtime.errors import UnsupportedError

_TOLERANCE = 1e-5  # of the largest number met so far on a trajectory


def with_start(table: ScheduleTable, scheduler: Scheduler) -> ScheduleTable:
    """The table of ``scheduler`` with ``start`` and, if requests may start midway, ``order``.

    A row of ``start`` is ``[2]``: the factors of the photo's latents and of standard normal noise. A sampler
    may start midway if no row then refers to evaluations that were left out, and if random trajectories from
    there on are the real scheduler's.

    Raises:
        UnsupportedError: the scheduler has no way to add noise to latents, or none that is linear.
    """
    counts = [n for n in range(len(table.offsets) - 1) if table.rows(n).stop > table.rows(n).start]
    start = np.concatenate([_starts(scheduler, n, _count(table, n)) for n in counts]).astype(np.float32)
    started = replace(table, start=start)
    order = int(getattr(scheduler, "order", 1))
    alone = all(_stands_alone(table, n, first) for n in counts for first in _firsts(table, n, order))
    checked = sorted({*counts[:3], *counts[4::20], counts[-1]})
    if alone and all(_follows(scheduler, started, n, order) for n in checked):
        return replace(started, order=order)
    return started


def _count(table: ScheduleTable, steps: int) -> int:
    rows = table.rows(steps)
    return int(rows.stop - rows.start)


def _firsts(table: ScheduleTable, steps: int, order: int) -> Iterator[int]:
    """The evaluations at which a request of ``steps`` may begin."""
    yield from range(0, min(steps * order, _count(table, steps)), order)


def _stands_alone(table: ScheduleTable, steps: int, first: int) -> bool:
    """Whether the rows from ``first`` on refer to none before."""
    rows = table.coefficients[table.rows(steps)][first : first + table.history]
    return not any(np.any(row[4 + 2 * i :]) for i, row in enumerate(rows))


def _starts(scheduler: Scheduler, steps: int, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``[count, 2]``: what becomes of unit vectors at each evaluation."""
    prepared = copy.deepcopy(scheduler)
    timesteps = set_steps(prepared, steps)
    basis = torch.eye(2, dtype=torch.float64).reshape(2, 1, 2, 1, 1)
    return np.stack([noised(prepared, timesteps, k, *basis).flatten().numpy() for k in range(count)])


def noised(scheduler: Scheduler, timesteps: Tensor, k: int, latents: Tensor, noise: Tensor) -> Tensor:
    """What a pipeline begins evaluation ``k`` with, if it is the first: latents with noise ``[B, …]``."""
    begun: Any = copy.copy(scheduler)  # some remember where they were asked
    if hasattr(begun, "set_begin_index"):
        begun.set_begin_index(k)
    timestep = timesteps[k : k + 1].repeat(len(latents))
    if hasattr(begun, "scale_noise"):
        made: Tensor = begun.scale_noise(latents, timestep, noise)
    elif hasattr(begun, "add_noise"):
        made = begun.add_noise(latents, noise, timestep)
    elif type(begun).__name__ == "SCMScheduler":  # as SanaSprintImg2ImgPipeline.prepare_latents
        angle = timesteps[k]
        made = torch.cos(angle) * latents + torch.sin(angle) * begun.config.sigma_data * noise
    else:
        raise UnsupportedError(
            f"{type(begun).__name__} cannot add noise to latents",
            "a scheduler with scale_noise or add_noise",
            "Choose another scheduler",
        )
    return made


def _follows(scheduler: Scheduler, table: ScheduleTable, steps: int, order: int) -> bool:
    """Whether random trajectories from each of some first evaluations are those of the real scheduler."""
    firsts = list(_firsts(table, steps, order))
    return all(
        trajectory_error(scheduler, table, steps, scale, seed, first) <= _TOLERANCE
        for first in {firsts[0], firsts[len(firsts) // 2], firsts[-1]}
        for seed, scale in enumerate((1.0, 30.0))
    )
