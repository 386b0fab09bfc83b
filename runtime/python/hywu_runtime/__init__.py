"""Runs bundles: an image editor whose weight deltas are inputs, made anew for every request.

from hywu_runtime import Editor
editor = Editor.load("bundle")
image = editor.edit("photo.jpg", "make it look like an old photograph", steps=8, seed=42)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hywu_runtime import errors
    from hywu_runtime.bundle import Bundle
    from hywu_runtime.deltas import Deltas
    from hywu_runtime.editor import Editor
    from hywu_runtime.manifest import Manifest

__version__ = "0.1.0"
__all__ = ["Bundle", "Deltas", "Editor", "Manifest", "errors"]

_HOMES = {"Bundle": "bundle", "Deltas": "deltas", "Editor": "editor", "Manifest": "manifest"}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("hywu_runtime.errors")
    if name in _HOMES:
        return getattr(importlib.import_module(f"hywu_runtime.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
