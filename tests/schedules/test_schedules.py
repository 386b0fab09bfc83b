"""Tables against the diffusers schedulers that they were traced from."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from hywu_export.schedules import (
    ScheduleTable,
    apply_row,
    make_scheduler,
    sampler_name,
    trace_scheduler,
    write_schedules,
)
from hywu_runtime.errors import InputError, UnsupportedError

# Name, class, settings, history.
SAMPLERS: list[tuple[str, str, dict[str, Any], int]] = [
    ("ddim", "DDIMScheduler", {"clip_sample": False}, 1),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}, 1),
    (
        "ddim",
        "DDIMScheduler",
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
        1,
    ),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, 1),
    ("ddpm", "DDPMScheduler", {"clip_sample": False}, 1),
    ("ddpm", "DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, 1),
    ("euler", "EulerDiscreteScheduler", {}, 1),
    (
        "euler",
        "EulerDiscreteScheduler",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        1,
    ),
    ("euler", "EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 1),
    ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, 1),
    ("euler", "EulerDiscreteScheduler", {"prediction_type": "sample"}, 1),
    ("euler_karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}, 1),
    ("euler_exponential", "EulerDiscreteScheduler", {"use_exponential_sigmas": True}, 1),
    ("euler_a", "EulerAncestralDiscreteScheduler", {}, 1),
    (
        "euler_a",
        "EulerAncestralDiscreteScheduler",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        1,
    ),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}, 1),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, 1),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {"prediction_type": "sample", "solver_type": "heun"}, 1),
    (
        "dpmpp_2m",
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        1,
    ),
    ("dpmpp_2m_karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, 1),
    ("dpmpp_3m", "DPMSolverMultistepScheduler", {"solver_order": 3, "timestep_spacing": "trailing"}, 2),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 1),
    (
        "dpmpp_2m_sde_karras",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "prediction_type": "v_prediction"},
        1,
    ),
    ("dpmpp_2s", "DPMSolverSinglestepScheduler", {}, 1),
    ("deis", "DEISMultistepScheduler", {}, 1),
    ("lcm", "LCMScheduler", {}, 1),
    ("lcm", "LCMScheduler", {"prediction_type": "v_prediction"}, 1),
    ("tcd", "TCDScheduler", {}, 1),
    ("heun", "HeunDiscreteScheduler", {}, 1),
    (
        "heun_karras",
        "HeunDiscreteScheduler",
        {"use_karras_sigmas": True, "prediction_type": "v_prediction"},
        1,
    ),
    ("dpm2", "KDPM2DiscreteScheduler", {}, 1),
    ("dpm2_a", "KDPM2AncestralDiscreteScheduler", {}, 1),
    ("unipc", "UniPCMultistepScheduler", {}, 2),
    (
        "unipc",
        "UniPCMultistepScheduler",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        2,
    ),
    ("unipc", "UniPCMultistepScheduler", {"solver_order": 3}, 3),
    ("unipc", "UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}, 2),
    ("pndm", "PNDMScheduler", {"skip_prk_steps": True}, 3),
    ("lms", "LMSDiscreteScheduler", {}, 3),
    ("flow_euler", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 1),
    ("flow_euler", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, 1),
    ("flow_heun", "FlowMatchHeunDiscreteScheduler", {}, 1),
    ("edm_euler", "EDMEulerScheduler", {}, 1),
]
MAX_STEPS = 16
SHAPE = (2, 4, 5, 3)


def scheduler_of(class_name: str, **config: Any) -> Any:
    return getattr(diffusers, class_name)(**config)


@functools.cache
def table_of(index: int) -> ScheduleTable:
    _, class_name, config, _ = SAMPLERS[index]
    # LMS integrates numerically for every step.
    return trace_scheduler(
        scheduler_of(class_name, **config), 6 if class_name.startswith("LMS") else MAX_STEPS
    )


def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A model that is not linear, mixes positions and depends on the time."""
    phase = t.float() * 0.01
    return torch.tanh(0.8 * x + 0.3 * x.roll(1, dims=-1)) * (1.0 + 0.2 * torch.sin(phase)) + 0.1 * torch.cos(
        phase
    )


def run_real(
    scheduler: Any, steps: int, noises: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The denoising loop of the diffusers pipelines, with given noise.

    In float64: in float32, the real Heun schedulers lose more digits than their tables.
    """
    noises = noises.double()
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    current = 0
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noises[1 + current], raising=False)
    latents = noises[0] * getattr(scheduler, "init_noise_sigma", 1.0)
    for current, t in enumerate(scheduler.timesteps):  # noqa: B007 (the draw above reads it)
        scaled = (
            scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        )
        latents = scheduler.step(denoiser(scaled, t), t, latents, return_dict=False)[0]
    return latents.float()


def run_table(table: ScheduleTable, steps: int, noises: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The same loop by rows; also the largest latents met on the way."""
    latents = noises[0] * float(table.initial_scale[steps])
    history = torch.zeros(SHAPE[0], 2 * table.history, *SHAPE[1:])
    peak = float(latents.abs().max())
    timesteps = torch.from_numpy(table.timesteps[table.rows(steps)])
    for k, row in enumerate(torch.from_numpy(table.coefficients[table.rows(steps)])):
        m = denoiser(row[0] * latents, timesteps[k])
        latents, history = apply_row(row, latents, m, noises[1 + k], history)
        peak = max(peak, float(latents.abs().max()))
    return latents, peak


def draw(steps: int, seed: int) -> torch.Tensor:
    return torch.randn(2 * steps + 8, *SHAPE, generator=torch.Generator().manual_seed(seed))


CASES = pytest.mark.parametrize(
    "index", range(len(SAMPLERS)), ids=[f"{i}-{name}" for i, (name, *_) in enumerate(SAMPLERS)]
)


@CASES
def test_table_reproduces_the_pipeline_loop(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, class_name, config, history = SAMPLERS[index]
    table, scheduler = table_of(index), scheduler_of(class_name, **config)
    assert (table.name, table.class_name, table.history) == (name, class_name, history)
    low, high = table.step_range()
    for steps in sorted({low, 2, 3, 5, high}):
        noises = draw(steps, seed=index)
        expected = run_real(scheduler, steps, noises, monkeypatch)
        result, peak = run_table(table, steps, noises)
        torch.testing.assert_close(result, expected, rtol=0, atol=3e-6 * max(1.0, peak))


@given(index=st.integers(0, len(SAMPLERS) - 1), steps=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_step_count(index: int, steps: int, seed: int) -> None:
    _, class_name, config, _ = SAMPLERS[index]
    noises = draw(steps, seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        expected = run_real(scheduler_of(class_name, **config), steps, noises, monkeypatch)
    result, peak = run_table(table_of(index), steps, noises)
    torch.testing.assert_close(result, expected, rtol=0, atol=3e-6 * max(1.0, peak))


def test_stochastic_samplers_are_marked() -> None:
    stochastic = {SAMPLERS[i][1] for i in range(len(SAMPLERS)) if table_of(i).stochastic}
    assert stochastic == {
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",  # its SDE form
        "EulerAncestralDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",  # its stochastic form
        "KDPM2AncestralDiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
    }


def test_textbook_coefficients_of_euler() -> None:
    """Euler: input x / √(σ² + 1), then x + (σ' − σ)·m."""
    scheduler = diffusers.EulerDiscreteScheduler()
    table = trace_scheduler(scheduler, 7)
    scheduler.set_timesteps(7)
    sigmas = scheduler.sigmas.numpy().astype(np.float64)
    expected = np.zeros((7, 6))
    expected[:, 0] = (sigmas[:-1] ** 2 + 1) ** -0.5
    expected[:, 1] = 1.0
    expected[:, 2] = np.diff(sigmas)
    np.testing.assert_allclose(table.coefficients[table.rows(7)], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(table.timesteps[table.rows(7)], scheduler.timesteps.numpy())


def test_heun_takes_two_evaluations_per_step_but_the_last() -> None:
    table = trace_scheduler(diffusers.HeunDiscreteScheduler(), 9)
    assert np.diff(table.offsets).tolist() == [0, *(2 * n - 1 for n in range(1, 10))]


@pytest.mark.parametrize("class_name", ["LCMScheduler", "TCDScheduler"])
def test_refused_step_counts_have_no_rows(class_name: str) -> None:
    """Both distil a model of 50 original steps and refuse more."""
    table = trace_scheduler(scheduler_of(class_name), 53)
    assert len(table.offsets) == 55
    assert len(table.initial_scale) == 54
    assert table.step_range() == (1, 50)
    assert np.diff(table.offsets).tolist() == [*range(51), 0, 0, 0]
    assert table.initial_scale[51:].tolist() == [0, 0, 0]
    assert table.rows(51) == slice(1275, 1275)
    assert table.rows(54) == table.rows(-1) == slice(0, 0)


def test_scheduler_and_global_random_state_are_left_alone() -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(4)
    before, timesteps = torch.get_rng_state(), scheduler.timesteps.clone()
    trace_scheduler(scheduler, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(timesteps, scheduler.timesteps)
    assert scheduler.step_index is None


@pytest.mark.parametrize(
    ("class_name", "config", "setting"),
    [
        ("DDIMScheduler", {}, "clip_sample"),
        ("DDPMScheduler", {}, "clip_sample"),
        ("LCMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding"),
        ("UniPCMultistepScheduler", {"thresholding": True}, "thresholding"),
        ("CMStochasticIterativeScheduler", {}, "clip_denoised"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ],
)
def test_refused_settings_are_named(class_name: str, config: dict[str, Any], setting: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{class_name} with {setting}=True.*Set {setting}=False"):
        trace_scheduler(scheduler_of(class_name, **config), 4)


class Limited(diffusers.EulerDiscreteScheduler):
    """Clips without a setting that says so."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return (super().step(*args, **kwargs)[0].clamp(-2000, 2000),)


class Shifted(diffusers.EulerDiscreteScheduler):
    """Affine rather than linear."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return (super().step(*args, **kwargs)[0] + 0.1,)


class Forgetful(diffusers.EulerDiscreteScheduler):
    """Refuses to run."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("sigma")


class TwiceNoisy(diffusers.EulerAncestralDiscreteScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        latents = super().step(*args, **kwargs)[0]
        return (latents + torch.randn_like(latents),)


class Remembering(diffusers.EulerAncestralDiscreteScheduler):
    """Adds the noise of the evaluation before."""

    last: torch.Tensor | None = None

    def step(self, m: torch.Tensor, t: Any, x: torch.Tensor, **_: Any) -> Any:
        noise = torch.randn(x.shape, dtype=x.dtype)
        last, self.last = self.last, noise
        return (x - 0.1 * m + (0 if last is None else last),)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (Limited(), "Limited is not linear"),
        (Shifted(), "Shifted is not linear"),
        (Forgetful(), r"Forgetful cannot run any step count up to 5: .*\('sigma'\)"),
        (TwiceNoisy(), "TwiceNoisy .* draws noise more than once per evaluation"),
        (Remembering(), "Remembering refers to .*earlier noise"),
        (diffusers.PNDMScheduler(), "PNDMScheduler refers to evaluations further back than 3"),
        (diffusers.UnCLIPScheduler(clip_sample=False, variance_type="learned_range"), "UnCLIPScheduler"),
        (diffusers.VQDiffusionScheduler(num_vec_classes=8), "VQDiffusionScheduler cannot run"),
        (diffusers.DDPMWuerstchenScheduler(), "DDPMWuerstchenScheduler cannot run"),
        # An epsilon model says nothing about the image at zero signal.
        (
            diffusers.DDIMScheduler(
                clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
            ),
            "DDIMScheduler cannot run any step count .* not finite",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_no_table_is_refused_by_class(scheduler: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        trace_scheduler(scheduler, 5)


@pytest.mark.parametrize(("max_steps", "history"), [(0, None), (-3, None), (5, 0), (5, 4)])
def test_arguments_out_of_range(max_steps: int, history: int | None) -> None:
    with pytest.raises(InputError):
        trace_scheduler(diffusers.EulerDiscreteScheduler(), max_steps, history)


def test_given_history_is_kept_or_refused() -> None:
    scheduler = diffusers.UniPCMultistepScheduler()
    wide = trace_scheduler(scheduler, 6, history=3)
    assert (wide.history, wide.coefficients.shape[1]) == (3, 10)
    noises = draw(6, seed=1)
    result, _ = run_table(wide, 6, noises)
    torch.testing.assert_close(
        result, run_table(trace_scheduler(scheduler, 6), 6, noises)[0], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(UnsupportedError, match="further back than 1"):
        trace_scheduler(scheduler, 6, history=1)


def test_widening_changes_nothing_but_the_width() -> None:
    table = trace_scheduler(diffusers.DPMSolverMultistepScheduler(), 6)
    wide = table.widen(3)
    assert wide.coefficients.shape == (21, 10)
    noises = draw(6, seed=2)
    assert torch.equal(run_table(table, 6, noises)[0], run_table(wide, 6, noises)[0])
    with pytest.raises(InputError, match="needs 3 earlier evaluations, not 2"):
        wide.widen(2)


def test_file_holds_all_samplers_at_one_width(tmp_path: Path) -> None:
    tables = {
        name: trace_scheduler(scheduler, 4)
        for name, scheduler in {
            "euler": diffusers.EulerDiscreteScheduler(),
            "unipc": diffusers.UniPCMultistepScheduler(),
            "heun": diffusers.HeunDiscreteScheduler(),
        }.items()
    }
    write_schedules(tmp_path / "a.safetensors", tables)
    write_schedules(tmp_path / "b.safetensors", dict(reversed(tables.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    file = load_file(tmp_path / "a.safetensors")
    columns = ("offsets", "timesteps", "coefficients", "initial_scale")
    assert set(file) == {f"{name}.{column}" for name in tables for column in columns}
    for name, table in tables.items():
        wide = table.widen(2)
        for column in columns:
            stored, expected = file[f"{name}.{column}"], getattr(wide, column)
            assert stored.dtype == (np.int64 if column == "offsets" else np.float32)
            np.testing.assert_array_equal(stored, expected)
        assert file[f"{name}.offsets"].shape == (6,)
        assert file[f"{name}.initial_scale"].shape == (5,)
        assert file[f"{name}.coefficients"].shape == (file[f"{name}.offsets"][-1], 8)


def test_unusable_names_write_nothing(tmp_path: Path) -> None:
    table = trace_scheduler(diffusers.EulerDiscreteScheduler(), 2)
    with pytest.raises(InputError, match="name of a sampler"):
        write_schedules(tmp_path / "s.safetensors", {"eu.ler": table})
    with pytest.raises(InputError, match="no sampler"):
        write_schedules(tmp_path / "s.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    table = trace_scheduler(diffusers.EulerDiscreteScheduler(), 2)
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "missing" / "s.safetensors", tmp_path / "taken"):
        with pytest.raises(InputError, match="cannot be written"):
            write_schedules(path, {"euler": table})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_importing_the_package_is_cheap() -> None:
    script = "import sys, hywu_export.schedules; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert printed.stdout.strip() == b"set()"


def test_update_is_the_formula_and_survives_tracing() -> None:
    class Update(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return apply_row(*tensors)

    generator = torch.Generator().manual_seed(0)
    c, x, m, noise = (torch.randn(s, generator=generator) for s in ((8,), SHAPE, SHAPE, SHAPE))
    history = torch.randn(SHAPE[0], 4, *SHAPE[1:], generator=generator)
    expected = c[1] * x + c[2] * m + c[3] * noise + sum(c[4 + i] * history[:, i] for i in range(4))
    program = torch.export.export(Update(), (c, x, m, noise, history), strict=False)
    for update in (apply_row, program.module()):
        x_next, history_next = update(c, x, m, noise, history)
        torch.testing.assert_close(x_next, expected)
        assert torch.equal(history_next, torch.stack((x, m, history[:, 0], history[:, 1]), dim=1))


PIPELINE_CONFIG = diffusers.PNDMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
).config


@pytest.mark.parametrize(
    "name",
    [
        "ddim",
        "ddpm",
        "deis",
        "dpm2",
        "dpm2_a",
        "dpmpp_2m",
        "dpmpp_2m_karras",
        "dpmpp_2m_sde",
        "dpmpp_2s",
        "dpmpp_3m",
        "euler",
        "euler_a",
        "euler_beta",
        "euler_exponential",
        "euler_karras",
        "flow_euler",
        "flow_heun",
        "heun",
        "ipndm",
        "lcm",
        "lms",
        "pndm",
        "sa_solver",
        "tcd",
        "unipc",
    ],
)
def test_sampler_from_a_pipelines_configuration(name: str) -> None:
    scheduler = make_scheduler(name, {**PIPELINE_CONFIG, "clip_sample": False})
    assert sampler_name(scheduler) == name
    assert scheduler.config.get("steps_offset", 1) == 1
    assert scheduler.config.get("beta_end", 0.012) == 0.012


def test_sampler_by_class_keeps_the_configuration() -> None:
    config = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, beta_end=0.012).config
    for sampler in ("DPMSolverMultistepScheduler", diffusers.DPMSolverMultistepScheduler):
        scheduler = make_scheduler(sampler, config)
        assert sampler_name(scheduler) == "dpmpp_2m_karras"
        assert scheduler.config.beta_end == 0.012
    assert sampler_name(make_scheduler("dpmpp_2m", config)) == "dpmpp_2m"


def test_samplers_without_a_short_name_go_by_their_class() -> None:
    assert (
        sampler_name(
            diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")
        )
        == "dpmsolver_multistep"
    )


def test_clipping_is_never_switched_off_silently() -> None:
    with pytest.raises(UnsupportedError, match="DDIMScheduler with clip_sample=True"):
        make_scheduler("ddim", PIPELINE_CONFIG)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("eulr", "no sampler 'eulr'.*euler_a"),
        ("_karras", "no sampler '_karras'"),
        ("NoSuchScheduler", "no sampler"),
        ("ddim_karras", "DDIMScheduler has no karras spacing"),
        (dict, "dict is not a scheduler"),
    ],
)
def test_unknown_samplers(sampler: str | type, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_scheduler(sampler, PIPELINE_CONFIG)


def test_configuration_that_a_scheduler_cannot_take() -> None:
    with pytest.raises(InputError, match="EulerDiscreteScheduler cannot be built"):
        make_scheduler("euler", {"beta_schedule": "no such schedule"})
