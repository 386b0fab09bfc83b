"""The HY-WU parameter generator: configuration, token layout, network, checkpoint and condition encoders."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .condition import TextImageConditionEncoder, load_condition_encoder
    from .config import GeneratorConfig
    from .layout import TokenLayout
    from .network import ParameterGenerator

__all__ = [
    "GeneratorConfig",
    "ParameterGenerator",
    "TextImageConditionEncoder",
    "TokenLayout",
    "load_condition_encoder",
]

_MODULES = {
    "GeneratorConfig": "config",
    "ParameterGenerator": "network",
    "TextImageConditionEncoder": "condition",
    "TokenLayout": "layout",
    "load_condition_encoder": "condition",
}


def __getattr__(name: str) -> Any:
    """Import torch only when something that needs it is asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
