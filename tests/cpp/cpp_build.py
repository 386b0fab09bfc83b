"""Where the C++ build is that the tests of this folder run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def executable(name: str) -> Path:
    """An executable of the build, or a skipped test where nothing was built (a failed one in CI).

    ``HYWU_CPP_BUILD`` names another folder than ``build/release``.
    """
    build = Path(os.environ.get("HYWU_CPP_BUILD", ROOT / "build" / "release"))
    found = [
        path
        for path in build.rglob(f"{name}*")
        if path.is_file() and path.stem == name and os.access(path, os.X_OK)
    ]
    if not found:
        message = f"{name} is not in {build}: run `make cpp`"
        if "CI" in os.environ:
            pytest.fail(message)
        pytest.skip(message)
    return found[0]
