"""ONNX → ONNX: functions on onnx-ir models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hywu_export.passes.cleaning import clean
    from hywu_export.passes.linting import Finding, check, lint

__all__ = ["Finding", "check", "clean", "lint"]

_HOMES = {
    "clean": "cleaning",
    "Finding": "linting",
    "check": "linting",
    "lint": "linting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
