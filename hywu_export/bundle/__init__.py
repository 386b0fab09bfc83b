"""Writing a bundle (its format: docs/bundle.md; its reader: ``hywu_runtime.bundle``)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hywu_export.bundle.additions import BundleAddition
    from hywu_export.bundle.weights import TensorLocation, WeightSource
    from hywu_export.bundle.writer import BundleWriter

__all__ = ["BundleAddition", "BundleWriter", "TensorLocation", "WeightSource"]

_HOMES = {
    "BundleAddition": "additions",
    "BundleWriter": "writer",
    "TensorLocation": "weights",
    "WeightSource": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
