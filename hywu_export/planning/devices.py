"""The table of devices: memory, bandwidth, and dense peaks by precision, each row with its source."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hywu_export.planning.costs import Limits
from hywu_runtime.errors import InputError

_FILE = Path(__file__).with_name("devices.json")
GB = 1e9
MARGIN = {False: 1 * GB, True: 2 * GB}
"""Bytes left for what the graphs do not show, by `Device.unified`: the context, workspaces of libraries, the
engine's own code; and the system, where it lives in the same memory. Assumed, not measured."""


@dataclass(frozen=True)
class Device:
    """What a vendor says of a device.

    Attributes:
        memory: bytes, counted as the vendor's GB · 10⁹, which is never more than there is.
        unified: CPU and GPU share it.
        bandwidth: bytes a second.
        peak: dense operations a second: ``float32`` (CUDA cores), ``tf32``, ``float16``, ``bfloat16``,
            ``int8``, ``fp8``; what is absent is not there, or not stated.
        unconfirmed: keys whose figure was derived, or not found in a second place.
    """

    key: str
    name: str
    memory: float
    unified: bool
    bandwidth: float
    compute_capability: str
    peak: Mapping[str, float]
    source: str
    url: str
    note: str
    unconfirmed: tuple[str, ...]

    @property
    def margin(self) -> float:
        """Bytes that are left for other things unless the user says how many."""
        return MARGIN[self.unified]

    @property
    def limits(self) -> Limits:
        """As `planning.costs` asks for them. FP32 graphs run in TF32 where there is TF32, as
        TensorRT and ONNX Runtime do by default: a least time takes the fastest."""
        peak = {name: value for name, value in self.peak.items() if name not in ("tf32", "fp8")}
        peak["float32"] = max(peak["float32"], self.peak.get("tf32", 0.0))
        return Limits(peak, self.bandwidth)


def devices() -> dict[str, Device]:
    """All devices by key, in the order of the table."""
    rows = json.loads(_FILE.read_text(encoding="utf-8"))
    return {
        key: Device(
            key, row["name"], row["memory"] * GB, row["unified"], row["bandwidth"] * GB,
            row["compute_capability"], {name: value * 1e12 for name, value in row["peak"].items()},
            row["source"], row["url"], row["note"], tuple(row["unconfirmed"]),
        )
        for key, row in rows.items()
    }  # fmt: skip


def find_device(key: str) -> Device:
    """The device that is called ``key``.

    Raises:
        InputError: there is none; the message has the nearest names.
    """
    table = devices()
    wanted = key.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in table:
        return table[wanted]
    near = difflib.get_close_matches(wanted, table, n=3, cutoff=0.4)
    near += [name for name in table if name not in near and (wanted in name or name in wanted) and wanted]
    raise InputError(
        f"There is no device {key!r} in the table",
        f"The nearest are {', '.join(near)}" if near else f"It has {', '.join(table)}",
        "Choose one of these; `hywu plan --devices` lists all",
    )
