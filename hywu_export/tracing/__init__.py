"""torch → ONNX, under real or fake weights, with free axes that are proved to be free."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hywu_export.tracing.spec import Axis, GraphSpec, Inferred, TensorSpec, Transform

if TYPE_CHECKING:
    from hywu_export.tracing.fake import fake_module
    from hywu_export.tracing.tracer import TracedGraph, trace

__all__ = ["Axis", "GraphSpec", "Inferred", "TensorSpec", "TracedGraph", "Transform", "fake_module", "trace"]

_HOMES = {"fake_module": "fake", "TracedGraph": "tracer", "trace": "tracer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
