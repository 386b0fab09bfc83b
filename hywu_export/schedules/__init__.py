"""Samplers as tables: one row of coefficients per evaluation of the denoiser."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hywu_export.schedules.samplers import make_scheduler, sampler_name
    from hywu_export.schedules.shift import Shift, euler, shift_table
    from hywu_export.schedules.start import with_start
    from hywu_export.schedules.table import ScheduleTable, write_schedules
    from hywu_export.schedules.trace import trace_scheduler
    from hywu_export.schedules.update import apply_row

__all__ = [
    "ScheduleTable",
    "Shift",
    "apply_row",
    "euler",
    "make_scheduler",
    "sampler_name",
    "shift_table",
    "trace_scheduler",
    "with_start",
    "write_schedules",
]

_HOMES = {
    "ScheduleTable": "table",
    "Shift": "shift",
    "apply_row": "update",
    "euler": "shift",
    "make_scheduler": "samplers",
    "sampler_name": "samplers",
    "shift_table": "shift",
    "trace_scheduler": "trace",
    "with_start": "start",
    "write_schedules": "table",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
