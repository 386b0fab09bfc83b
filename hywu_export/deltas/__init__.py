"""Deltas: what a base model takes, injection into torch modules, conversion of LoRA files."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hywu_export.deltas.convert import load_lora, peft_to_deltas, save_lora
    from hywu_export.deltas.injection import Injection, inject
    from hywu_export.deltas.layouts import Layout, Pair, flatten
    from hywu_export.deltas.spec import DeltaSpec, DeltaTarget, generator_paths

_HOMES = {
    "DeltaSpec": "spec",
    "DeltaTarget": "spec",
    "Injection": "injection",
    "Layout": "layouts",
    "Pair": "layouts",
    "flatten": "layouts",
    "generator_paths": "spec",
    "inject": "injection",
    "load_lora": "convert",
    "peft_to_deltas": "convert",
    "save_lora": "convert",
}

__all__ = [
    "DeltaSpec", "DeltaTarget", "Injection", "Layout", "Pair", "flatten", "generator_paths", "inject",
    "load_lora", "peft_to_deltas", "save_lora",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
