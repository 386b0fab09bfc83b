"""A bundle against what it stands for: the checkpoints' torch modules, and its own FP32 graphs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hywu_export.verify.job import verify
    from hywu_export.verify.measures import Check, Measure, Report, Tolerance

__all__ = ["Check", "Measure", "Report", "Tolerance", "verify"]

_HOMES = {
    "verify": "job",
    "Check": "measures",
    "Measure": "measures",
    "Report": "measures",
    "Tolerance": "measures",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hywu_export.verify.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
