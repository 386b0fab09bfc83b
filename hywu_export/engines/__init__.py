"""Engines: the graphs of a bundle compiled by TensorRT or TensorRT-RTX.

Nothing here is imported before it is used; TensorRT itself is imported by the module
`tensorrt` alone, which runs in a process of its own while an engine is built.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hywu_export.engines.importing import import_plans as import_plans
    from hywu_export.engines.job import BuildOptions as BuildOptions
    from hywu_export.engines.job import Built as Built
    from hywu_export.engines.job import build as build
    from hywu_export.engines.script import write_script as write_script

_PLACES = {
    "BuildOptions": "job",
    "Built": "job",
    "build": "job",
    "import_plans": "importing",
    "write_script": "script",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
