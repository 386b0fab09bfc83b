"""Image editors with per-request weight deltas: from checkpoints to bundles that run without PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hywu_export.any_module import Generator, Traced, trace
    from hywu_export.deltas.layouts import Layout, Pair
    from hywu_export.exporter import ExportOptions, export

__all__ = ["ExportOptions", "Generator", "Layout", "Pair", "Traced", "export", "trace"]

_HOMES = {
    "ExportOptions": "exporter",
    "Generator": "any_module",
    "Layout": "deltas.layouts",
    "Pair": "deltas.layouts",
    "Traced": "any_module",
    "export": "exporter",
    "trace": "any_module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
