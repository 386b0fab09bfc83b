"""Schedule tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_bundle
from safetensors.numpy import save_file

from hywu_runtime.errors import BundleError, InputError
from hywu_runtime.manifest import Sampler, Schedules
from hywu_runtime.schedule import Schedule, ranges

SECTION = Schedules(
    "s.safetensors", "even", 3, {"even": Sampler("Even", (1, 5)), "wild": Sampler("Wild", (2, 4), True)}
)


def test_rows(tmp_path: Path) -> None:
    tables = toy_bundle.schedule()
    save_file(tables, tmp_path / "s.safetensors")
    schedule = Schedule(tmp_path / "s.safetensors", SECTION)
    assert len(schedule.rows()) == 3
    rows = schedule.rows("wild", 3)
    assert (rows.sampler, rows.steps, len(rows)) == ("wild", 3, 5)
    np.testing.assert_array_equal(rows.coefficients, tables["wild.coefficients"][3:8])
    np.testing.assert_array_equal(rows.timesteps, tables["wild.timesteps"][3:8])
    assert rows.initial_scale == tables["wild.initial_scale"][3]
    assert schedule.accepted("wild") == [2, 3, 4]
    assert ranges([1, 2, 3, 7, 9, 10]) == "1 to 3, 7, 9 to 10"
    for steps in (0, -1, 1, 5, 10**20, True, 2.0, "3"):
        with pytest.raises(InputError, match="2 to 4"):
            schedule.rows("wild", steps)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="even, wild"):
        schedule.rows("ghost")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("even.offsets"),
        lambda t: t.pop("wild.timesteps"),
        lambda t: t.update({"even.offsets": t["even.offsets"][:-1]}),
        lambda t: t.update({"even.offsets": t["even.offsets"][::-1].copy()}),
        lambda t: t.update({"even.offsets": t["even.offsets"].astype(np.float32)}),
        lambda t: t.update({"even.offsets": t["even.offsets"] + 10**9}),
        lambda t: t.update({"even.offsets": np.array([0, 2**63 - 1, -(2**63), -1, 1, 15, 15])}),
        lambda t: t.update({"even.coefficients": t["even.coefficients"][:, 0]}),
        lambda t: t.update({"even.coefficients": t["even.coefficients"][:, :3].copy()}),
        lambda t: t.update({"even.coefficients": t["even.coefficients"] * np.nan}),
        lambda t: t.update({"even.timesteps": t["even.timesteps"].astype(np.float64)}),
    ],
)
def test_damaged_tables(tmp_path: Path, change: Any) -> None:
    tables = toy_bundle.schedule()
    change(tables)
    save_file(tables, tmp_path / "s.safetensors")
    with pytest.raises(BundleError):
        Schedule(tmp_path / "s.safetensors", SECTION)


def test_file_that_is_no_schedule(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(b"\0" * 40)
    for name in ("s.safetensors", "ghost.safetensors"):
        with pytest.raises(BundleError):
            Schedule(tmp_path / name, SECTION)
