"""Deltas: what a base model takes, injection into torch modules, conversion of LoRA files."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DeltaSpec": "spec",
    "DeltaTarget": "spec",
    "Injection": "inject",
    "inject": "inject",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
