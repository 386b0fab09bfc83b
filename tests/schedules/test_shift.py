"""Noise levels that depend on the size of the picture, against the diffusers scheduler."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from torch import Tensor, nn

from hywu_export.passes import check
from hywu_export.schedules import Shift, euler, shift_table
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, trace
from hywu_runtime.errors import CheckpointError, InputError, UnsupportedError

CONFIGS: dict[str, dict[str, Any]] = {
    "kontext": {"use_dynamic_shifting": True, "shift": 3.0},
    "qwen": {
        "use_dynamic_shifting": True,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
    "lightning": {"use_dynamic_shifting": True, "base_shift": 1.0986, "max_shift": 1.0986},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "num_train_timesteps": 500},
    "static": {"shift": 3.0},
    "static, stretched": {"shift": 1.73, "shift_terminal": 0.1},
    "none": {},
}


def shifted(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, length: int) -> Any:
    """The scheduler as the Kontext pipeline sets it."""
    config = scheduler.config
    mu = calculate_shift(
        length, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


@pytest.mark.parametrize("name", CONFIGS)
def test_levels_are_those_of_the_scheduler(name: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    shift, table = Shift.from_config(scheduler.config), shift_table(scheduler, 50)
    terminal = bool(scheduler.config.shift_terminal)
    assert table.step_range() == (1 + terminal, 50)
    assert table.name == "flow_euler"
    assert table.history == 0
    assert not table.stochastic
    for steps in (2, 3, 8, 50) if terminal else (1, 3, 8, 50):
        for length in (1, 96, 4080, 16384):
            real = shifted(copy.deepcopy(scheduler), steps, length)
            rows = torch.from_numpy(table.coefficients[table.rows(steps)])
            levels = torch.stack([torch.stack(shift.levels(row, length)) for row in rows])
            both = torch.stack([real.sigmas[:-1], real.sigmas[1:]], dim=1)
            # Stretching subtracts from 1: there, the scheduler's own float32 is that coarse.
            relative = {"rtol": 0, "atol": 1e-6} if terminal else {"rtol": 1e-6, "atol": 0}
            torch.testing.assert_close(levels, both, **relative)
            timesteps = levels[:, 0] * scheduler.config.num_train_timesteps
            torch.testing.assert_close(timesteps, real.timesteps, rtol=5e-6 if terminal else 1e-6, atol=0)
            assert levels[-1, 1] == 0


class Step(nn.Module):
    """An update whose schedule follows from the shape of its latents."""

    def __init__(self, shift: Shift):
        super().__init__()
        self.shift = shift

    def forward(self, latents: Tensor, output: Tensor, row: Tensor) -> tuple[Tensor]:
        level, after = self.shift.levels(row, latents.shape[2] * latents.shape[3] // 4)
        return (euler(latents, output, level, after),)


@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_a_graph_shifts_by_the_shape_of_its_latents(name: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    module, table = Step(Shift.from_config(scheduler.config)), shift_table(scheduler, 4)
    side = Axis(16, 1024, 16)
    axes = {"batch": Axis(1, 4), "height": side, "width": side}
    axes |= {"h": Axis(of="height", divide=8), "w": Axis(of="width", divide=8)}
    latents = TensorSpec("latents", "float32", ("batch", 4, "h", "w"))
    output = TensorSpec("output", "float32", latents.shape)
    row = TensorSpec("row", "float32", (3,))
    after = TensorSpec("latents.next", "float32", latents.shape)
    traced = trace(GraphSpec("step", module, [latents, output, row], [after]), axes)
    check(traced.model, axes, traced.inputs, traced.outputs, "step")
    session = ort.InferenceSession(ir.to_proto(traced.model).SerializeToString())
    for height, width in ((2, 2), (6, 4), (128, 122)):
        real = shifted(copy.deepcopy(scheduler), 4, height * width // 4)
        x = expected = torch.randn(2, 4, height, width)
        for k, coefficients in enumerate(table.coefficients[table.rows(4)]):
            m = torch.randn_like(x)
            expected = real.step(m, real.timesteps[k], expected, return_dict=False)[0]
            made = session.run(None, {"latents": x.numpy(), "output": m.numpy(), "row": coefficients})
            x = torch.from_numpy(made[0])
        torch.testing.assert_close(x, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    "setting",
    [
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "invert_sigmas",
        "stochastic_sampling",
    ],
)
def test_what_no_shift_expresses_is_named(setting: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**{setting: True})
    with pytest.raises(UnsupportedError, match=f"{setting}=True.*Set {setting}=False"):
        shift_table(scheduler, 4)


def test_another_scheduler_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"FlowMatchHeunDiscreteScheduler does not take.*flow_euler"):
        shift_table(FlowMatchHeunDiscreteScheduler(), 4)


def test_a_scheduler_that_differs_from_its_configuration_is_refused() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(5.0)
    with pytest.raises(UnsupportedError, match=r"not those of its configuration: .* are off by"):
        shift_table(scheduler, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"base_shift": "much"},
        {"max_shift": float("nan")},
        {"max_image_seq_len": 256},
        {"use_dynamic_shifting": True, "time_shift_type": "cubic"},
        {"shift": True},
    ],
)
def test_damaged_configurations_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="scheduler's configuration"):
        Shift.from_config({**FlowMatchEulerDiscreteScheduler().config, **change})


def test_step_counts_out_of_range() -> None:
    with pytest.raises(InputError, match="max_steps is 0"):
        shift_table(FlowMatchEulerDiscreteScheduler(), 0)
    with pytest.raises(InputError, match="at least 2"):
        shift_table(FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), 1)
