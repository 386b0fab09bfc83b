"""Modules without memory: parameters have a shape and a dtype, computed buffers have their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.weak import WeakTensorKeyDictionary

M = TypeVar("M", bound=nn.Module)


def fake_module(factory: Callable[[], M], dtype: torch.dtype = torch.float32) -> M:
    """Builds a module in evaluation mode whose parameters have no data (they are on the ``meta`` device).

    A parameter's value is in the checkpoint. A buffer is computed by the constructor (position ids,
    frequency tables): it keeps its value, and one that is not persistent becomes a constant of the graph.
    Each parameter's memory lives only while the constructor makes it, so the peak is one tensor.

    ``factory`` makes the module from its configuration; ``dtype`` is that of its floating-point parameters.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _parameters_without_data():
            module = factory()
    finally:
        torch.set_default_dtype(previous)
    return module.requires_grad_(False).eval()


@contextmanager
def _parameters_without_data() -> Iterator[None]:
    """Moves every parameter to the ``meta`` device as a module takes it; tied parameters stay tied.

    (accelerate's ``init_empty_weights`` unties those that are tied within a constructor.)
    """
    register = nn.Module.register_parameter
    moved = WeakTensorKeyDictionary()

    def register_without_data(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if param not in moved:
                moved[param] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
                moved[param].__dict__.update(param.__dict__)  # marks that libraries leave there
            param = moved[param]
        register(module, name, param)

    nn.Module.register_parameter = register_without_data  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Within the context, parameters without data are fake tensors on the CPU, which torch.export can
    trace."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None and parameter.is_meta:
                replaced.append((submodule, name, parameter))
    try:
        for submodule, name, parameter in replaced:
            if id(parameter) not in fakes:  # a tied parameter stays tied
                with mode:
                    data = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fakes[id(parameter)] = nn.Parameter(data, requires_grad=False)
            submodule._parameters[name] = fakes[id(parameter)]
        yield
    finally:
        for submodule, name, parameter in replaced:
            submodule._parameters[name] = parameter
