"""The sampler: Euler steps of a flow over evenly spaced noise levels, shifted."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

DEFAULT_SHIFT = 3.0


class ShiftedFlowScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # diffusers is untyped
    """diffusers' flow-matching Euler scheduler over ``sigma_i = 1 - i / N``, where its own default ends at
    the smallest level of its training. The shift k gives ``k * sigma / (1 + (k - 1) * sigma)``."""

    def set_timesteps(self, num_inference_steps: int | None = None, **settings: Any) -> None:
        if num_inference_steps is not None:
            settings["sigmas"] = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        super().set_timesteps(num_inference_steps, **settings)
