"""Bench files: read, written, compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hywu_runtime.errors import InputError
from hywu_runtime.files import write_atomically

SCHEMA_FILE = Path(__file__).with_name("bench.schema.json")
_NEEDED = ("schema", "bundle", "backend", "request", "stages")


def read(path: str | Path) -> dict[str, Any]:
    """The object in a file of ``hywu bench --json`` or ``hywu-bench --out``.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        good = isinstance(value, dict) and all(key in value for key in _NEEDED)
        good = good and value["schema"] == "hywu.bench/1" and isinstance(value["stages"], dict)
        if good:
            for numbers in value["stages"].values():
                float(numbers["p50"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as a measurement ({error})",
            "Expected what `hywu bench --json` writes, schema hywu.bench/1",
            "Check the path",
        ) from None
    if not good:
        raise InputError(
            f"{path} is no measurement",
            "Expected what `hywu bench --json` writes, schema hywu.bench/1",
            "Measure again with this version",
        )
    return dict(value)


def write(path: str | Path, result: Mapping[str, Any]) -> None:
    """Writes a measurement, whole or not at all. Raises InputError."""
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a file, whole or not at all. Raises InputError."""
    write_atomically(path, lambda stream: stream.write(text.encode()))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What else than the times differs between two measurements, so that a ratio of these may mean something
    else."""
    found = []
    for key in ("bundle", "variant", "backend", "runtime", "versions", "threads", "low_memory"):
        if old.get(key) != new.get(key):
            found.append(f"{key}: {_word(old.get(key))}, now {_word(new.get(key))}")
    for key in ("width", "height", "batch", "evaluations", "sampler"):
        before, after = old["request"].get(key), new["request"].get(key)
        if before != after:
            found.append(f"{key}: {_word(before)}, now {_word(after)}")
    for key in ("cpu", "system", "governor", "jetson"):
        before, after = (side.get("machine", {}).get(key) for side in (old, new))
        if before is not None and after is not None and before != after:
            found.append(f"{key}: {_word(before)}, now {_word(after)}")
    return found


def ratios(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Medians, old and new, of the stages that both have."""
    return {
        name: (float(old["stages"][name]["p50"]), float(new["stages"][name]["p50"]))
        for name in new["stages"]
        if name in old["stages"]
    }


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return "none" if value is None else str(value)
