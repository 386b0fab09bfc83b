"""Flow schedules whose noise levels depend on the picture's size: levels before the shift, and the shift.

Some pipelines (FLUX, Qwen-Image) give their `FlowMatchEulerDiscreteScheduler` the levels 1, …, 1/N, which it
shifts by the length of the latents' sequence (Esser et al., arXiv 2403.03206, section 5.3.2). No table by
step count holds the result. So the table keeps the levels as they are before the shift, and the step graph,
which knows the shape of its latents, shifts them. A static ``shift`` goes the same way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hywu_export.schedules.samplers import Scheduler, sampler_name
from hywu_export.schedules.table import ScheduleTable
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
COLUMNS = 3
"""Length of a row: this level, the next, the last of the step count; all before the shift, in 0…1."""

# Settings that change the levels after the shift, or the update: (what they do, remedy).
_OBSTACLES = {
    "use_karras_sigmas": "spaces the noise levels anew after the shift",
    "use_exponential_sigmas": "spaces the noise levels anew after the shift",
    "use_beta_sigmas": "spaces the noise levels anew after the shift",
    "invert_sigmas": "runs from the picture to noise",
    "stochastic_sampling": "draws noise at every step",
}
_LENGTHS = (1, 64, 256, 1000, 1024, 4096, 8192, 16384)  # of sequences, on which a table is checked
_LEVEL_TOLERANCE = 1e-6  # of the range of noise levels, which is 1; a few units in the last place of float32
_TOLERANCE = 1e-5  # of the largest number met so far on a trajectory


@dataclass(frozen=True)
class Shift:
    """What a scheduler's configuration says about the shift; calls work on numbers and within graphs.

    Attributes:
        kind: what the odds of a level are multiplied by: ``static``: ``shift``, ``linear``: mu,
            ``exponential``: exp(mu).
        shift: the factor of ``static``.
        base, longest: (length of a sequence, mu) of two points; mu is linear in the length.
        terminal: where the last level comes to lie, by stretching all; None leaves them.
        train_timesteps: timestep of the level 1.
    """

    kind: str
    shift: float
    base: tuple[int, float]
    longest: tuple[int, float]
    terminal: float | None
    train_timesteps: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shift:
        """The shift of a `FlowMatchEulerDiscreteScheduler` configuration.

        Raises:
            CheckpointError: a value is none that the scheduler can have.
        """

        def number(key: str, default: float) -> float:
            value = config.get(key, default)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise CheckpointError(
                    f"The scheduler's configuration sets {key} to {value!r}",
                    "Expected a finite number",
                    "Fetch the checkpoint whole",
                )
            return value

        base = int(number("base_image_seq_len", 256)), number("base_shift", 0.5)
        longest = int(number("max_image_seq_len", 4096)), number("max_shift", 1.15)
        kind = (
            config.get("time_shift_type", "exponential") if config.get("use_dynamic_shifting") else "static"
        )
        terminal = number("shift_terminal", 0.0) if config.get("shift_terminal") else None
        if base[0] == longest[0] or kind not in ("static", "linear", "exponential"):
            raise CheckpointError(
                f"The scheduler's configuration cannot shift (time_shift_type {kind!r}, "
                f"sequences of {base[0]} to {longest[0]})",
                "Expected the type linear or exponential, and two lengths",
                "Fetch the checkpoint whole",
            )
        train_timesteps = int(number("num_train_timesteps", 1000))
        return cls(kind, number("shift", 1.0), base, longest, terminal, train_timesteps)

    def factor(self, length: int) -> Tensor:
        """What the odds of a level are multiplied with, for latents of ``length`` tokens: float32 ``[]``.

        ``length`` may be symbolic: an expression of a tensor's sizes, in a graph.
        """
        if self.kind == "static":
            return torch.tensor(self.shift, dtype=torch.float32)
        slope = (self.longest[1] - self.base[1]) / (self.longest[0] - self.base[0])
        mu = torch.full((), length, dtype=torch.float32) * slope + (self.base[1] - slope * self.base[0])
        return mu.exp() if self.kind == "exponential" else mu

    def levels(self, row: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """This evaluation's noise level and the next one's, shifted: float32 ``[]`` each.

        Args:
            row: float32 ``[3]``, a row of the table (see `COLUMNS`).
            length: tokens of the latents, photo and text left out.
        """
        shifted = self._shifted(row, self.factor(length))
        after = torch.where(row[1] > 0, shifted[1], torch.zeros_like(shifted[1]))  # 0 is appended last of all
        return shifted[0], after

    def _shifted(self, row: Tensor, factor: Tensor) -> Tensor:
        # The scheduler's factor / (factor + 1/t − 1), which has no value at t = 0, times t / t.
        shifted = factor * row / (factor * row + (1 - row))
        if self.terminal is None:
            return shifted
        return 1 - (1 - shifted) / ((1 - shifted[2]) / (1 - self.terminal))


def euler(latents: Tensor, output: Tensor, level: Tensor, after: Tensor) -> Tensor:
    """The scheduler's update: latents and model output ``[B, …]``, float32, from one level to the next."""
    return latents + (after - level) * output


def shift_table(scheduler: Scheduler, max_steps: int = 100) -> ScheduleTable:
    """The table of `Shift.levels` for every step count from 1 to ``max_steps``.

    It has no history, and its timesteps are those before the shift. One step with ``shift_terminal`` gets no
    rows: the scheduler divides by zero.

    Raises:
        UnsupportedError: it is another scheduler, or has a setting that no shift expresses.
        InputError: ``max_steps`` is out of range.
    """
    if max_steps < 1:
        raise InputError(f"max_steps is {max_steps}", "at least 1")
    check_shiftable(scheduler)
    shift = Shift.from_config(scheduler.config)
    counts = [n for n in range(1, max_steps + 1) if n > 1 or shift.terminal is None]
    if not counts:
        raise InputError(
            f"max_steps is {max_steps}", "at least 2: with shift_terminal one step has no levels"
        )
    rows = {n: _rows(n) for n in counts}
    lengths = [len(rows.get(n, ())) for n in range(max_steps + 1)]
    coefficients = np.concatenate([rows[n] for n in counts])
    table = ScheduleTable(
        name=sampler_name(scheduler),
        class_name=SCHEDULER,
        history=0,
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        timesteps=coefficients[:, 0] * np.float32(shift.train_timesteps),
        coefficients=coefficients,
        initial_scale=np.array([float(n > 0) for n in lengths], np.float32),
        stochastic=False,
    )
    _verify(scheduler, shift, table, sorted({*counts[:3], *counts[19:50:15], counts[-1]}))
    return table


def check_shiftable(scheduler: Scheduler) -> None:
    """Raise UnsupportedError unless the scheduler's levels are a table and a shift."""
    if type(scheduler).__name__ != SCHEDULER:
        raise UnsupportedError(
            f"{type(scheduler).__name__} does not take the noise levels that this pipeline gives",
            f"{SCHEDULER} (flow_euler)",
            "Leave out the scheduler, or name this one",
        )
    for setting, what in _OBSTACLES.items():
        if scheduler.config.get(setting):
            raise UnsupportedError(
                f"{SCHEDULER} with {setting}=True {what}, which this pipeline's step graph does not do",
                "noise levels that are shifted, and an update without noise",
                f"Set {setting}=False in its configuration",
            )


def _rows(steps: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """``[steps, 3]``: the levels as the pipelines compute them."""
    levels = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    return np.stack([levels, np.append(levels[1:], np.float32(0)), np.full_like(levels, levels[-1])], axis=1)


def mean_shift(config: Mapping[str, Any], length: int) -> float:
    """mu for latents of ``length`` tokens, in the order of operations of diffusers' ``calculate_shift``."""
    shift = Shift.from_config(config)
    slope = (shift.longest[1] - shift.base[1]) / (shift.longest[0] - shift.base[0])
    return length * slope + (shift.base[1] - slope * shift.base[0])


def _verify(scheduler: Scheduler, shift: Shift, table: ScheduleTable, step_counts: Iterable[int]) -> None:
    """Raise UnsupportedError unless random trajectories at several sizes are those of the real scheduler."""
    for steps in step_counts:
        for seed, length in enumerate(_LENGTHS):
            levels, latents = _errors(scheduler, shift, table, steps, length, seed)
            if not (levels <= _LEVEL_TOLERANCE and latents <= _TOLERANCE):
                raise UnsupportedError(
                    f"The steps of {SCHEDULER} are not those of its configuration: with {steps} steps and "
                    f"{length} tokens, noise levels are off by {levels:.1g} and latents by {latents:.1g}",
                    f"differences of at most {_LEVEL_TOLERANCE:g} and {_TOLERANCE:g}",
                    "Set the shift in its configuration, and use a diffusers that the toolchain names",
                )


def _errors(
    scheduler: Scheduler, shift: Shift, table: ScheduleTable, steps: int, length: int, seed: int
) -> tuple[float, float]:
    """The largest difference in noise levels, and in latents relative to the largest number so far."""
    real: Any = copy.deepcopy(scheduler)
    real.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mean_shift(scheduler.config, length))
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn((2, 3, 4, 5), generator=generator)

    expected = latents = normal()
    peak = expected.abs().max()
    worst = torch.zeros(2)
    for k, row in enumerate(torch.from_numpy(table.coefficients[table.rows(steps)])):
        level, after = shift.levels(row, length)
        output = normal()
        expected = real.step(output, real.timesteps[k], expected, return_dict=False)[0]
        latents = euler(latents, output, level, after)
        peak = torch.maximum(peak, expected.abs().max())
        timestep = (level - real.timesteps[k] / shift.train_timesteps).abs()
        found = torch.stack([level - real.sigmas[k], after - real.sigmas[k + 1]]).abs()
        worst = torch.maximum(
            worst,
            torch.stack([torch.maximum(found.max(), timestep), (latents - expected).abs().max() / peak]),
        )
    return float(worst[0]), float(worst[1])
