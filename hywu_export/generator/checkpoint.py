"""Reading and writing checkpoint folders: ``config.json`` beside ``model.safetensors`` or its shards."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hywu_export.bundle.sources import SafetensorsIndex
from hywu_runtime.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_STEM = "model"
_STORED_DTYPES = ("F32", "F16", "BF16")

Module = TypeVar("Module", bound=nn.Module)


def check_checkpoint(path: str | Path) -> SafetensorsIndex:
    """Check a parameter generator's checkpoint by its configuration and headers; no weight is read.

    Returns:
        Where every tensor of the generator's state dict lies.

    Raises:
        CheckpointError: the folder, its configuration or its weights are missing, damaged or inconsistent.
    """
    from .config import GeneratorConfig
    from .network import ParameterGenerator

    config = GeneratorConfig.from_file(checkpoint_folder(path) / CONFIG_FILE)
    return check_weights(path, meta_module(ParameterGenerator, config))


def checkpoint_folder(path: str | Path) -> Path:
    """``path``, if it is a folder.

    Raises:
        CheckpointError: it is not.
    """
    if not Path(path).is_dir():
        raise CheckpointError(f"{path} is not a folder", f"a folder with {CONFIG_FILE}", "check the path")
    return Path(path)


def meta_module(make: Callable[[Any], Module], config: Any) -> Module:
    """``make(config)`` on the meta device: names, shapes and no memory.

    Raises:
        CheckpointError: a weight of that configuration could not be addressed.
    """
    try:
        with torch.device("meta"):
            return make(config)
    except (RuntimeError, TypeError) as error:  # of torch, for a size or a number of elements beyond 64 bits
        raise CheckpointError(
            f"the configuration implies a weight that cannot exist: {str(error).splitlines()[0]}",
            "sizes of a real network",
            f"check {CONFIG_FILE}",
        ) from error


def check_weights(folder: str | Path, module: nn.Module) -> SafetensorsIndex:
    """Index the weights in ``folder`` and compare their names, shapes and dtypes with those of ``module``.

    Raises:
        CheckpointError: a file is missing or damaged; a tensor is missing, extra, mis-shaped or not a float.
    """
    index = SafetensorsIndex.from_folder(folder, WEIGHTS_STEM)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    remedy = f"check that {CONFIG_FILE} and the weights are of the same checkpoint"
    for name in sorted(expected.keys() ^ index.keys()):
        wrong = "lack the tensor" if name in expected else "have the extra tensor"
        wanted = f"the {len(expected)} tensors that {CONFIG_FILE} implies"
        raise CheckpointError(f"the weights in {folder} {wrong} {name!r}", wanted, remedy)
    for name, shape in expected.items():
        stored = index[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"the tensor {name!r} in {stored.file} has the shape {list(stored.shape)}",
                f"{list(shape)}",
                remedy,
            )
        if stored.dtype not in _STORED_DTYPES:
            raise CheckpointError(
                f"the tensor {name!r} in {stored.file} is stored as {stored.dtype}",
                f"one of {', '.join(_STORED_DTYPES)}",
                "convert the checkpoint",
            )
    return index


def load_weights(folder: str | Path, module: Module, dtype: torch.dtype) -> Module:
    """Give ``module``, made by `meta_module`, the weights in ``folder`` as ``dtype``.

    Raises:
        CheckpointError: as `check_weights`.
    """
    index = check_weights(folder, module)
    state: dict[str, Tensor] = {}
    for path in index.files:
        try:
            with safe_open(path, framework="pt") as file:
                state.update({name: file.get_tensor(name).to(dtype) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}", "a safetensors file", "fetch the file again"
            ) from error
    module.load_state_dict(state, assign=True)
    return module


def save_checkpoint(
    folder: str | Path, config: Mapping[str, Any], module: nn.Module, dtype: torch.dtype
) -> None:
    """Write ``config.json`` and ``model.safetensors``; each file appears whole or not at all.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in module.state_dict().items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
            weights, settings = Path(staging, f"{WEIGHTS_STEM}.safetensors"), Path(staging, CONFIG_FILE)
            save_file(state, weights, metadata={"format": "pt"})
            settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            os.replace(weights, folder / weights.name)
            os.replace(settings, folder / settings.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error}",
            "a writable folder with enough space",
            "choose another folder",
        ) from error
