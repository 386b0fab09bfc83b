"""Samplers that start midway, against the schedulers as image-to-image pipelines of diffusers drive them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import SanaSprintImg2ImgPipeline, StableDiffusion3Img2ImgPipeline

from hywu_export.schedules import apply_row, trace_scheduler, with_start, write_schedules
from hywu_runtime.errors import InputError, UnsupportedError
from hywu_runtime.manifest import Sampler, Schedules, Strength
from hywu_runtime.schedule import Schedule

MAX_STEPS = 12
SHAPE = (2, 3, 4, 5)
SCHEDULERS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 1),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, 2),
    "scm": ("SCMScheduler", {"sigma_data": 0.5}, 1),
    "ddim": ("DDIMScheduler", {"clip_sample": False}, 1),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, 1),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, None),
    "unipc": ("UniPCMultistepScheduler", {}, None),
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    schedulers = {name: getattr(diffusers, cls)(**config) for name, (cls, config, _) in SCHEDULERS.items()}
    return {name: (s, with_start(trace_scheduler(s, MAX_STEPS), s)) for name, s in schedulers.items()}


@pytest.fixture(scope="module")
def schedule(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Schedule:
    """All of them as the runtime reads them."""
    path = tmp_path_factory.mktemp("start") / "schedule.safetensors"
    tables = {name: table for name, (_, table) in made.items()}
    write_schedules(path, tables)
    samplers = {
        name: Sampler(table.class_name, table.step_range(), table.stochastic, table.order)
        for name, table in tables.items()
    }
    return Schedule(path, Schedules(path.name, "flow_euler", 4, samplers, Strength(0.6)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_who_may_start_midway(made: dict[str, Any], schedule: Schedule, name: str) -> None:
    assert made[name][1].order == SCHEDULERS[name][2]
    if SCHEDULERS[name][2] is None:
        with pytest.raises(InputError, match="cannot start midway"):
            schedule.rows(name, 4, 0.5)
        assert len(schedule.rows(name, 4, 1.0)) == 4


@pytest.mark.parametrize("strength", [1.0, 0.9, 0.6, 0.5, 1 / 3, 0.05])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
@pytest.mark.parametrize("name", [name for name, (_, _, order) in SCHEDULERS.items() if order is not None])
def test_trajectories(
    made: dict[str, Any], schedule: Schedule, name: str, steps: int, strength: float
) -> None:
    """Noise on a photo's latents, then every evaluation, with random model outputs."""
    photo, noise, *outputs = torch.randn((2 + 2 * steps, *SHAPE), generator=torch.Generator().manual_seed(1))
    real = copy.deepcopy(made[name][0])
    timesteps = _pipeline_timesteps(real, steps, strength)
    if name == "scm":
        latents = _sana_latents(real, photo, timesteps[:1], noise)
        timesteps = timesteps[:-1]
    elif hasattr(real, "scale_noise"):
        latents = real.scale_noise(photo, timesteps[:1], noise)
    else:
        latents = real.add_noise(photo, noise, timesteps[:1])
    rows = schedule.rows(name, steps, strength)
    assert rows.start is not None
    np.testing.assert_allclose(rows.timesteps, timesteps.to(torch.float32).numpy(), rtol=1e-6)
    start = torch.from_numpy(rows.start)
    scale = float(real.config.get("sigma_data", 1.0))  # SANA's photo latents are scaled by it
    ours = start[0] * scale * photo + start[1] * noise
    history = torch.zeros((SHAPE[0], rows.coefficients.shape[1] - 4, *SHAPE[1:]))
    draws, theirs = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    stochastic = schedule.section.samplers[name].stochastic
    options = {"generator": theirs} if stochastic else {}
    peak = latents.abs().max()
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5 * float(peak))
    for k, (row, t) in enumerate(zip(torch.from_numpy(rows.coefficients), timesteps)):
        if hasattr(real, "scale_model_input"):
            real.scale_model_input(latents, t)
        latents = real.step(outputs[k], t, latents, return_dict=False, **options)[0]
        drawn = torch.randn(SHAPE, generator=draws) if stochastic else torch.zeros(SHAPE)
        ours, history = apply_row(row, ours, outputs[k], drawn, history)
        peak = torch.maximum(peak, latents.abs().max())
        torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5 * float(peak))


def _pipeline_timesteps(scheduler: Any, steps: int, strength: float) -> torch.Tensor:
    """What is left of the timesteps, by the pipelines' own method."""
    options = {}
    if type(scheduler).__name__ == "SCMScheduler":
        options["intermediate_timesteps"] = 1.3 if steps == 2 else None
    scheduler.set_timesteps(steps, **options)
    pipeline: Any = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = StableDiffusion3Img2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    return timesteps


def _sana_latents(
    scheduler: Any, photo: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """The pipeline's first latents, with an autoencoder that does nothing and noise that is given."""
    from unittest.mock import patch

    vae = SimpleNamespace(
        encode=lambda x: SimpleNamespace(latent=x[:, :3]), config=SimpleNamespace(scaling_factor=1.0)
    )
    pipeline: Any = SimpleNamespace(scheduler=scheduler, vae=vae, vae_scale_factor=1)
    wide = torch.cat([photo, photo], dim=1)  # else it is taken for latents, which it does not scale
    with patch(f"{SanaSprintImg2ImgPipeline.__module__}.randn_tensor", lambda *_, **__: noise):
        return SanaSprintImg2ImgPipeline.prepare_latents(
            pipeline, wide, timestep, 2, 3, 4, 5, torch.float32, "cpu", None
        )


def test_a_scheduler_that_cannot_add_noise() -> None:
    class Mute(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        @property
        def scale_noise(self) -> Any:
            raise AttributeError

    scheduler = Mute()
    with pytest.raises(UnsupportedError, match="cannot add noise"):
        with_start(trace_scheduler(scheduler, 3), scheduler)
