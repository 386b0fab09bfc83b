"""Image editors with per-request weight deltas: from checkpoints to bundles that run without PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hywu_export.exporter import ExportOptions, export

__all__ = ["ExportOptions", "export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hywu_export import exporter

    return getattr(exporter, name)
