"""Compile a diffusers scheduler to a table of coefficients, by running it on basis vectors.

A scheduler is linear in what it is given: latents, model outputs and noise. Its coefficients are read off
rather than derived again: every evaluation k is given fresh unit vectors x_k, m_k and n_k, so that whatever
the scheduler remembers from earlier evaluations shows up in its answer y_k at the place of the x_j, m_j and
n_j it came from.

A table is only accepted after random trajectories run with it agree with the real scheduler: unit vectors
alone do not see clipping, for example.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hywu_export.schedules.samplers import Scheduler, check_supported, sampler_name, set_steps
from hywu_export.schedules.table import ScheduleTable
from hywu_export.schedules.update import apply_row
from hywu_runtime.errors import InputError, UnsupportedError

MAX_HISTORY = 3
_NEGLIGIBLE = 1e-8  # of the largest coefficient
_TOLERANCE = 1e-5  # of the largest number met so far on a trajectory

Array = npt.NDArray[np.float64]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep schedulers from giving the same advice about every step count."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@_quiet()
def trace_scheduler(scheduler: Scheduler, max_steps: int = 100, history: int | None = None) -> ScheduleTable:
    """The coefficients of a scheduler for every step count from 1 to ``max_steps``.

    Step counts that the scheduler itself refuses, or for which it divides by zero, get no rows.

    Args:
        scheduler: a diffusers scheduler; it is copied and left as it is. Noise is taken as one standard
            normal draw per evaluation, and ``step`` is called with its defaults (DDIM with ``eta`` 0).
        max_steps: the largest step count of the table.
        history: how many earlier evaluations (at most 3) the rows refer to; by default the smallest number,
            at least 1, that suffices.

    Raises:
        UnsupportedError: the scheduler is not linear, needs a longer history, or accepts no step count.
        InputError: ``max_steps`` or ``history`` is out of range.
    """
    if max_steps < 1:
        raise InputError(f"max_steps is {max_steps}", "at least 1")
    if history is not None and not 1 <= history <= MAX_HISTORY:
        raise InputError(f"history is {history}", f"1 to {MAX_HISTORY}")
    check_supported(scheduler)
    cls = type(scheduler).__name__
    traces: dict[int, _Trace] = {}
    refusal: _StepsRefusedError | None = None
    for steps in range(1, max_steps + 1):
        try:
            traces[steps] = _trace(scheduler, steps)
        except _StepsRefusedError as error:
            refusal = error
    if not traces:
        raise UnsupportedError(
            f"{cls} cannot run any step count up to {max_steps}: {refusal}",
            "a scheduler that works with set_timesteps(N) and step(model_output, t, sample)",
            "Choose another scheduler",
        )
    for length in range(1, MAX_HISTORY + 1) if history is None else [history]:
        rows = {steps: row for steps, trace in traces.items() if (row := _rows(trace, length)) is not None}
        if len(rows) == len(traces):
            break
    else:
        raise UnsupportedError(
            f"{cls} refers to evaluations further back than {history or MAX_HISTORY}, or to earlier noise",
            "a scheduler whose update is linear in the last few latents and model outputs",
            "Lower its order, or choose another scheduler",
        )
    table = _assemble(scheduler, max_steps, length, traces, rows)
    _verify(scheduler, table, sorted({*list(traces)[:3], *list(traces)[4::13], max(traces)}))
    return table


class _StepsRefusedError(UnsupportedError):
    """The scheduler cannot run this step count."""

    def __init__(self, scheduler: Scheduler, steps: int, reason: object):
        super().__init__(f"{type(scheduler).__name__} fails with {steps} steps ({reason})")


class _Draw(TorchFunctionMode):
    """Answers the normal draw inside a scheduler's step, wherever it is made, with a given tensor."""

    def __init__(self, noise: Tensor):
        super().__init__()
        self.noise: Tensor | None = noise

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **kwargs)
        if self.noise is None:
            raise UnsupportedError("it draws noise more than once per evaluation")
        shape = (torch.empty if func is torch.randn else torch.empty_like)(*args).shape
        if shape != self.noise.shape:
            raise UnsupportedError(f"it draws noise of {list(shape)} for latents of {list(self.noise.shape)}")
        noise, self.noise = self.noise, None
        return noise.to(kwargs.get("dtype") or noise.dtype)


class _Run:
    """One pass over a fresh copy of the scheduler, driven as pipelines drive it."""

    def __init__(self, scheduler: Scheduler, steps: int):
        self.scheduler: Any = copy.deepcopy(scheduler)
        self.steps = steps
        try:
            self.timesteps: Tensor = set_steps(self.scheduler, steps)
        except Exception as error:  # schedulers refuse with whatever comes to hand
            raise _StepsRefusedError(scheduler, steps, error) from error
        self.initial_scale = float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def evaluate(self, k: int, x: Tensor, m: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The model input for ``x``, and the next latents given the model output."""
        t = self.timesteps[k]
        try:
            # Flow-matching schedulers have no scale_model_input.
            scale = getattr(self.scheduler, "scale_model_input", None)
            model_input = x if scale is None else scale(x, t)
            with _Draw(noise):
                x_next = self.scheduler.step(m, t, x, return_dict=False)[0]
        except Exception as error:
            raise _StepsRefusedError(self.scheduler, self.steps, error) from error
        if x_next.shape != x.shape:
            reason = f"latents of shape {list(x.shape)} become {list(x_next.shape)}"
            raise _StepsRefusedError(self.scheduler, self.steps, reason)
        return model_input, x_next


@dataclass(frozen=True)
class _Trace:
    """What R evaluations answer to unit vectors."""

    timesteps: npt.NDArray[np.float32]  # [R]
    initial_scale: float
    input_scales: Array  # [R]
    responses: Array  # [R, 3R]; column 3j, 3j+1, 3j+2: response to x, m, noise of evaluation j


def _trace(scheduler: Scheduler, steps: int) -> _Trace:
    run = _Run(scheduler, steps)
    count = len(run.timesteps)
    # [3R, batch 1, 3R channels, 1, 1]: the coordinates lie along the channels.
    basis = torch.eye(3 * count, dtype=torch.float64).reshape(3 * count, 1, 3 * count, 1, 1)
    input_scales = np.empty(count)
    responses = np.empty((count, 3 * count))
    for k in range(count):
        model_input, answer = run.evaluate(k, *basis[3 * k : 3 * k + 3])
        input_scales[k] = model_input[0, 3 * k, 0, 0]
        responses[k] = answer.flatten()
    if not all(np.isfinite(values).all() for values in (responses, input_scales, run.initial_scale)):
        raise _StepsRefusedError(scheduler, steps, "its coefficients are not finite")
    timesteps = run.timesteps.to(torch.float32).numpy()
    return _Trace(timesteps, run.initial_scale, input_scales, responses)


def _rows(trace: _Trace, history: int) -> Array | None:
    """Coefficients ``[R, K]`` in the order of docs/bundle.md, or None if the history is too short."""
    count = len(trace.timesteps)
    rows = np.zeros((count, 2 * history + 4))
    rows[:, 0] = trace.input_scales
    for k in range(count):
        response = _within(trace.responses, k, history)
        if response is None:
            return None
        rows[k, 1:4] = response[3 * k : 3 * k + 3]
        for j in range(1, min(history, k) + 1):
            rows[k, 2 + 2 * j : 4 + 2 * j] = response[3 * (k - j) : 3 * (k - j) + 2]
    return rows


def _within(responses: Array, k: int, history: int) -> Array | None:
    """y_k in terms of x, m and noise of evaluation k and x and m of the last ``history``, if possible."""
    foreign = np.zeros(responses.shape[1], dtype=bool)
    foreign[: 3 * max(0, k - history)] = True
    foreign[2 : 3 * k : 3] = True  # noise is not remembered
    response: Array = responses[k]
    bound = _NEGLIGIBLE * np.abs(response).max()
    if np.abs(response[foreign]).max(initial=0.0) <= bound:
        return response
    # A corrector (UniPC) carries a state along that depends on all of the past, but y_{k-1} depends on it in
    # the same way. As x_k is y_{k-1} on a real trajectory, any multiple of x_k − y_{k-1} = 0 may be added.
    previous = responses[k - 1]
    weight = previous[foreign] @ previous[foreign]
    if weight == 0.0:
        return None
    factor = float(response[foreign] @ previous[foreign] / weight)
    response = response - factor * previous
    response[3 * k] += factor
    return response if np.abs(response[foreign]).max() <= bound else None


def _assemble(
    scheduler: Scheduler, max_steps: int, history: int, traces: dict[int, _Trace], rows: dict[int, Array]
) -> ScheduleTable:
    counts = [len(rows[steps]) if steps in rows else 0 for steps in range(max_steps + 1)]
    scales = [traces[steps].initial_scale if steps in traces else 0.0 for steps in range(max_steps + 1)]
    coefficients = np.concatenate(list(rows.values())).astype(np.float32)
    return ScheduleTable(
        name=sampler_name(scheduler),
        class_name=type(scheduler).__name__,
        history=history,
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        timesteps=np.concatenate([trace.timesteps for trace in traces.values()]),
        coefficients=coefficients,
        initial_scale=np.array(scales, dtype=np.float32),
        stochastic=bool(np.any(coefficients[:, 3])),
    )


def _verify(scheduler: Scheduler, table: ScheduleTable, step_counts: Iterable[int]) -> None:
    """Raise UnsupportedError unless random trajectories with the table are those of the real scheduler."""
    for steps in step_counts:
        for seed, scale in enumerate((1.0, 30.0, 1.0, 30.0)):
            error = trajectory_error(scheduler, table, steps, scale, seed)
            if not error <= _TOLERANCE:
                raise UnsupportedError(
                    f"{table.class_name} is not linear in latents, model outputs and one draw of noise: with "
                    f"{steps} steps, a table of it is off by {error:.1g} on a random trajectory",
                    f"a relative difference of at most {_TOLERANCE:g}",
                    "Switch off what clips or thresholds in its configuration, or choose another scheduler",
                )


def trajectory_error(
    scheduler: Scheduler, table: ScheduleTable, steps: int, scale: float, seed: int, first: int | None = None
) -> float:
    """The largest difference on a random trajectory, relative to the largest number so far.

    With ``first``, it is one that starts at this evaluation from latents with noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(factor: float) -> Tensor:
        return factor * torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64)

    run = _Run(scheduler, steps)
    if first is None:
        real = latents = normal(scale * run.initial_scale)
    else:
        real, latents = _both_started(run, table, first, normal(scale), normal(1.0))
    history = torch.zeros((2, 2 * table.history, 3, 4, 5), dtype=torch.float64)
    peak, worst = real.abs().max(), torch.zeros((), dtype=torch.float64)
    rows = torch.from_numpy(table.coefficients[table.rows(steps)]).double()
    for k, row in list(enumerate(rows))[first or 0 :]:
        m, noise = normal(scale), normal(1.0)
        model_input, real = run.evaluate(k, real, m, noise)
        terms, _ = apply_row(row.abs(), latents.abs(), m.abs(), noise.abs(), history.abs())
        difference = (model_input - row[0] * latents).abs().max() / row[0].abs()
        latents, history = apply_row(row, latents, m, noise, history)
        peak = torch.maximum(peak, terms.max())
        worst = torch.maximum(worst, torch.maximum(difference, (latents - real).abs().max()) / peak)
    return float(worst)


def _both_started(
    run: _Run, table: ScheduleTable, first: int, latents: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The first latents of a request that starts at an evaluation: the scheduler's, and the table's."""
    from hywu_export.schedules.start import noised

    assert table.start is not None
    real = noised(run.scheduler, run.timesteps, first, latents, noise)
    if hasattr(run.scheduler, "set_begin_index"):
        run.scheduler.set_begin_index(first)
    row = table.start[table.rows(run.steps)][first].astype(np.float64)
    return real, row[0] * latents + row[1] * noise
