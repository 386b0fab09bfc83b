"""The executables of the C++ runtime's build, where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from core_probe import Probe
from native import Library

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


@pytest.fixture(scope="session")
def onnxruntime_library() -> Path:
    """The library of the installed ONNX Runtime, which the Python runtime uses too."""
    import onnxruntime

    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip("the installed onnxruntime brings no libonnxruntime.so")
    return found[0]


@pytest.fixture(scope="session")
def library(onnxruntime_library: Path) -> Library:
    """The C ABI of the release build, or of the build in ``HYWU_BUILD_DIR``, with Python's ONNX Runtime."""
    folder = Path(os.environ.get("HYWU_BUILD_DIR", ROOT / "build" / "release"))
    path = folder / "src" / "api" / "libhywu.so"
    if not path.exists():
        (pytest.fail if "CI" in os.environ else pytest.skip)("libhywu.so is not built: run `make cpp` first")
    os.environ["HYWU_ONNXRUNTIME_LIBRARY"] = str(onnxruntime_library)
    return Library(path)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the made-up family."""
    import toy_bundle

    path = tmp_path_factory.mktemp("toy") / "bundle"
    toy_bundle.write_bundle(path)
    return path
