"""Weights for modules that were built without them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from hywu_export.bundle.weights import NUMPY_DTYPES, TensorLocation, WeightSource
from hywu_runtime.errors import CheckpointError


@contextmanager
def with_weights(module: nn.Module, weights: Mapping[str, WeightSource]) -> Iterator[None]:
    """Within the context, the parameters without data of a graph's module have those of the checkpoints.

    ``weights`` is component → its checkpoint; a parameter is named ``<component>.<name in the checkpoint>``.
    Values are read one by one and widened to the parameter's dtype, so the peak is the module and one tensor.

    Raises:
        CheckpointError: no checkpoint holds a parameter, or holds it in another shape.
    """
    loaded: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    missing: dict[int, str] = {}
    places = [
        (submodule, f"{path}.{name}" if path else name, name, parameter)
        for path, submodule in module.named_modules(remove_duplicate=False)
        for name, parameter in submodule._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    for _, path, _, parameter in places:
        location = _find(path, weights)
        if location is None:  # perhaps tied, and stored under its other name
            missing.setdefault(id(parameter), path)
        elif id(parameter) not in loaded:
            loaded[id(parameter)] = nn.Parameter(_read(path, parameter, location), requires_grad=False)
    for identity, path in missing.items():
        if identity not in loaded:
            raise CheckpointError(
                f"No checkpoint holds the parameter {path!r}",
                f"Expected it in that of one of {', '.join(weights)}",
                "Give the checkpoints that the bundle was exported from",
            )
    try:
        for submodule, _, name, parameter in places:
            submodule._parameters[name] = loaded[id(parameter)]
            replaced.append((submodule, name, parameter))
        yield
    finally:
        for submodule, name, parameter in replaced:
            submodule._parameters[name] = parameter


def _find(path: str, weights: Mapping[str, WeightSource]) -> TensorLocation | None:
    component, _, name = path.partition(".")
    source = weights.get(component)
    return source[name] if source is not None and name in source else None


def _read(path: str, parameter: nn.Parameter, location: TensorLocation) -> torch.Tensor:
    if tuple(location.shape) != tuple(parameter.shape):
        raise CheckpointError(
            f"The parameter {path!r} has shape {list(location.shape)} in {location.file}",
            f"Expected {list(parameter.shape)}",
            "Check that the configuration belongs to the weights",
        )
    count = math.prod(location.shape)
    dtype = torch.empty((), dtype=parameter.dtype).numpy().dtype
    with location.file.open("rb") as stream:
        stream.seek(location.offset)
        values = np.frombuffer(stream.read(location.length), NUMPY_DTYPES[location.dtype], count)
    return torch.from_numpy(values.reshape(location.shape).astype(dtype))
