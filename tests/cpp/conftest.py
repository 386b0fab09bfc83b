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
    """``executable(name)``: a program of the build in ``HYWU_BUILD_DIR``, or else in ``build/release``.

    Where nothing is built the test is skipped; in CI it fails.
    """

    def find(name: str) -> Path:
        folder = Path(os.environ.get("HYWU_BUILD_DIR", ROOT / "build" / "release"))
        found = [path for path in folder.rglob(name) if path.is_file()]
        if not found:
            (pytest.fail if "CI" in os.environ else pytest.skip)(f"{name} is not in {folder}: run `make cpp`")
        return found[0]

    return find


@pytest.fixture(scope="session")
def probe(executable: Callable[[str], Path]) -> Iterator[Probe]:
    """The C++ core's answers."""
    probe = Probe(executable("hywu_core_probe"))
    yield probe
    assert probe.close() == 0
