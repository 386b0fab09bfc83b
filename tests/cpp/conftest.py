"""The executables of the C++ runtime's build, where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from core_probe import Probe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def executable() -> Callable[[str], Path]:
    """``executable(name)``: one of the newest build, or of that in ``HYWU_BUILD_DIR``."""

    def find(name: str) -> Path:
        folder = os.environ.get("HYWU_BUILD_DIR")
        found = [path for path in (Path(folder) if folder else ROOT / "build").rglob(name) if path.is_file()]
        if not found:
            pytest.skip(f"{name} is not built: run `make cpp` first")
        return max(found, key=lambda path: path.stat().st_mtime)

    return find


@pytest.fixture(scope="session")
def probe(executable: Callable[[str], Path]) -> Iterator[Probe]:
    """The C++ core's answers."""
    probe = Probe(executable("hywu_core_probe"))
    yield probe
    assert probe.close() == 0
