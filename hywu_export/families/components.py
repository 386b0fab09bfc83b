"""Components of a diffusers pipeline folder: modules made from their configs, and where their weights lie.

Nothing is loaded here. A module is built by a factory (with fake or with real parameters, as the caller
chooses), and each of its parameters is matched with a tensor of the checkpoint by name and shape, from the
file's header.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hywu_export.bundle.sources import SafetensorsIndex, TensorLocation, read_json_object
from hywu_runtime.errors import CheckpointError, HywuError, UnsupportedError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Component:
    """A module and, for each of its parameters and persistent buffers, the tensor of the checkpoint."""

    name: str
    module: nn.Module
    tensors: Mapping[str, TensorLocation]
    index: SafetensorsIndex


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a pipeline's file ``path``.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path.name} is missing from {path.parent}",
            "A diffusers pipeline folder holds model_index.json and one folder for each component",
            "Give the folder that save_pretrained wrote, or fetch the checkpoint whole",
        )
    return read_json_object(path)


def pipeline_class(base: Path) -> str:
    """The class name in ``model_index.json``; for a folder of transformers, the architecture in
    ``config.json``."""
    if not (base / "model_index.json").exists() and (base / "config.json").exists():
        architectures = read_config(base / "config.json").get("architectures")
        if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
            return architectures[0]
    return class_name(base / "model_index.json")


def class_name(path: Path) -> str:
    """The class that a pipeline's JSON file is for.

    Raises:
        CheckpointError: the file is missing or damaged, or names no class.
    """
    name = read_config(path).get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{path} names no class",
            "diffusers writes it under the key _class_name",
            "Save the pipeline again with save_pretrained",
        )
    return name


# Attention blocks of early diffusers VAEs (the public InstructPix2Pix checkpoint among them).
_OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

# Models of language and vision before transformers 4.52, as they are published still.
_OLD_PREFIXES = {"model.language_model.": "model.", "model.visual.": "visual."}


def _spellings(name: str) -> list[str]:
    """Names under which a checkpoint may hold the parameter ``name``, today's first."""
    names = [name, f"text_model.{name}", name.removeprefix("text_model.")]
    for new, old in _OLD_PREFIXES.items():
        if name.startswith(new):
            names.append(old + name.removeprefix(new))
    for new, old in _OLD_ATTENTION.items():
        if new in name:
            names.append(name.replace(new, old))
    return names


# Written by old library versions; computed, not learnt.
_COMPUTED = ("position_ids", "inv_freq")


def open_component(
    name: str, folder: Path, make: Callable[[dict[str, Any]], nn.Module], unused: tuple[str, ...] = ()
) -> Component:
    """Build the component in ``folder`` with ``make(config)`` and find its weights.

    Tensors whose names start with one of ``unused`` may be in the checkpoint without being in the module.

    Raises:
        CheckpointError: a tensor is missing, extra or mis-shaped, a file is damaged, or the configuration is
            none that the module can have.
        UnsupportedError: the weights exist only as a pickle.
    """
    config = read_config(folder / "config.json")
    try:
        module = make(config)
    except HywuError:
        raise
    except Exception as error:  # whatever a constructor has to say about its settings
        raise CheckpointError(
            f"The {name} cannot be made from {folder / 'config.json'} ({str(error) or type(error).__name__})",
            "Settings that its class accepts",
            "Fetch the checkpoint whole",
        ) from error
    index = _open_index(folder)
    found: dict[str, TensorLocation] = {}
    used: set[str] = set()
    tied = _tied(module)
    for parameter, value in module.state_dict().items():
        names = (parameter, *tied.get(parameter, ()))
        key = next((key for name in names for key in _spellings(name) if key in index), None)
        if key is None:
            raise CheckpointError(
                f"The {name}'s checkpoint in {folder} lacks {parameter!r}",
                f"Its config.json asks for it with shape {list(value.shape)}",
                "Check that config and weights belong together",
            )
        if index[key].shape != tuple(value.shape):
            raise CheckpointError(
                f"{key!r} in {folder} has shape {list(index[key].shape)}",
                f"The {name}'s config.json asks for {list(value.shape)}",
                "Check that config and weights belong together",
            )
        found[parameter] = index[key]
        used.add(key)
    extra = sorted(
        key for key in index if key not in used and not key.endswith(_COMPUTED) and not key.startswith(unused)
    )
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"The {name}'s checkpoint in {folder} holds {extra[0]!r}{more}",
            "Its config.json asks for no such tensor",
            "Check that config and weights belong together",
        )
    return Component(name, module, found, index)


def _tied(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter → the other names of the same tensor; a checkpoint may hold it under one of them."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(other for other in group if other != name)
        for group in groups.values()
        if len(group) > 1
        for name in group
    }


def _open_index(folder: Path) -> SafetensorsIndex:
    for variant in ("", ".fp16"):
        for stem in ("diffusion_pytorch_model", "model"):
            single = folder / f"{stem}{variant}.safetensors"
            if single.exists():
                return SafetensorsIndex.from_file(single)
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.exists():
                return SafetensorsIndex.from_index(index)
    if any(folder.glob("*.bin")):
        raise UnsupportedError(
            f"{folder} holds its weights as a pickle (.bin)",
            "Only safetensors are read: a pickle can run code",
            "Convert it with `pipeline.save_pretrained(folder, safe_serialization=True)`",
        )
    raise CheckpointError(
        f"{folder} holds no weights",
        "diffusion_pytorch_model.safetensors or model.safetensors, or their shards with an index",
        "Fetch the checkpoint whole",
    )
