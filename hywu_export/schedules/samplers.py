"""Samplers by short name, and what keeps a scheduler from being a table."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from hywu_runtime.errors import InputError, UnsupportedError


class Scheduler(Protocol):
    """What is used of a diffusers scheduler, besides the optional scale_model_input and init_noise_sigma."""

    config: Any
    timesteps: Any

    def set_timesteps(self, num_inference_steps: int, **options: Any) -> None: ...

    def step(self, *args: Any, **kwargs: Any) -> Any: ...


# Short name → diffusers class and the settings that the name stands for.
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "edm_dpmpp_2m": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "edm_euler": ("EDMEulerScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ipndm": ("IPNDMScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "sa_solver": ("SASolverScheduler", {}),
    "scm": ("SCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

# Ending of a name → setting that spaces the noise levels. No ending: none of them.
_SPACINGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}

# Settings that no table can express: setting → (why, remedy).
_OBSTACLES = {
    "clip_sample": (
        "clips the predicted image, which no linear table can do",
        "Set clip_sample=False in its configuration",
    ),
    "clip_denoised": (
        "clips the predicted image, which no linear table can do",
        "Set clip_denoised=False in its configuration",
    ),
    "thresholding": (
        "limits the predicted image by its own quantile (dynamic thresholding), which no linear table can do",
        "Set thresholding=False in its configuration",
    ),
    "use_dynamic_shifting": (
        "makes the noise levels depend on the image size, which a table per step count cannot do",
        "Set use_dynamic_shifting=False and a fixed shift in its configuration",
    ),
}


def sampler_name(scheduler: Scheduler) -> str:
    """The short name of a scheduler, such as ``euler_a`` or ``dpmpp_2m_karras``.

    A scheduler that has no short name goes by its class: ``FooBarScheduler`` is ``foo_bar``.
    """
    cls = type(scheduler)
    name = next(
        (
            name
            for name, (class_name, settings) in _SAMPLERS.items()
            if class_name == cls.__name__ and all(scheduler.config.get(k) == v for k, v in settings.items())
        ),
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__.removesuffix("Scheduler")).lower(),
    )
    endings = [f"_{ending}" for ending, setting in _SPACINGS.items() if _active(scheduler, setting)]
    return name + "".join(endings)


def make_scheduler(
    sampler: str | type, config: Mapping[str, Any], check: Callable[[Scheduler], None] | None = None
) -> Scheduler:
    """Build another sampler from the configuration of a pipeline's scheduler.

    Args:
        sampler: a short name (``euler``), a short name with an ending for the spacing of the noise levels
            (``dpmpp_2m_karras``; without an ending the usual spacing), a diffusers class name, or a class.
            A short name decides the settings that it stands for; everything else is the configuration's.
        config: ``pipeline.scheduler.config`` or an equal mapping.
        check: raises UnsupportedError for what cannot become a table; by default `check_supported`, which is
            for schedulers that will be traced.

    Raises:
        InputError: no such sampler, or it cannot be built from this configuration.
        UnsupportedError: the result could not become a table. Nothing is switched off silently: DDIM, for
            one, clips unless the configuration says ``clip_sample: False``.
    """
    cls, settings = (sampler, {}) if isinstance(sampler, type) else _resolve(sampler)
    if not hasattr(cls, "from_config"):
        raise InputError(f"{cls.__name__} is not a scheduler", "a diffusers scheduler class")
    try:
        scheduler: Scheduler = cls.from_config(dict(config), **settings)
    except Exception as error:  # whatever a scheduler's constructor has to say about its settings
        raise InputError(
            f"{cls.__name__} cannot be built from this configuration ({error})",
            "the configuration of a scheduler that is compatible with it",
        ) from error
    (check or check_supported)(scheduler)
    return scheduler


def set_steps(scheduler: Scheduler, steps: int) -> Any:
    """Sets a step count as pipelines set it; the timestep of every evaluation, a tensor ``[R]``."""
    if type(scheduler).__name__ == "SCMScheduler":
        # SANA-Sprint's pipelines: 1.3 is the middle of two steps, and 0, where the last ends, is none.
        options: dict[str, Any] = {"intermediate_timesteps": 1.3 if steps == 2 else None}
        scheduler.set_timesteps(steps, **options)
        return scheduler.timesteps[:-1]
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


def check_supported(scheduler: Scheduler) -> None:
    """Raise UnsupportedError if a setting is on that a table cannot express."""
    for setting, (why, remedy) in _OBSTACLES.items():
        if _active(scheduler, setting):
            raise UnsupportedError(
                f"{type(scheduler).__name__} with {setting}=True {why}",
                "an update that is linear and fixed",
                remedy,
            )


def _active(scheduler: Scheduler, setting: str) -> bool:
    # A configuration also carries settings of other classes, which mean nothing to this one.
    return setting in _parameters(type(scheduler)) and bool(scheduler.config.get(setting))


def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls).parameters


def _resolve(sampler: str) -> tuple[Any, dict[str, Any]]:
    """The class that a name stands for, and the settings that the name decides."""
    import diffusers

    if sampler.endswith("Scheduler") and isinstance(getattr(diffusers, sampler, None), type):
        return getattr(diffusers, sampler), {}
    name, _, ending = sampler.rpartition("_")
    if ending not in _SPACINGS:
        name, ending = sampler, ""
    if name in _SAMPLERS:
        class_name, settings = _SAMPLERS[name]
        cls = getattr(diffusers, class_name)
        spacings = {setting: e == ending for e, setting in _SPACINGS.items() if setting in _parameters(cls)}
        if not ending or _SPACINGS[ending] in spacings:
            return cls, {**settings, **spacings}
        raise InputError(
            f"{class_name} has no {ending} spacing of noise levels", f"{name!r} without an ending"
        )
    raise InputError(
        f"There is no sampler {sampler!r}",
        f"a diffusers scheduler class or one of {', '.join(_SAMPLERS)}",
        "Append _karras, _exponential or _beta for another spacing of the noise levels",
    )
