"""What `cmake --install` gives: found by CMake and pkg-config, and nothing seen but hywu_*."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "runtime" / "examples"


def run(*command: object, **environment: str) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release build, installed and then moved: nothing in it may know where it was."""
    build = Path(os.environ.get("HYWU_BUILD_DIR", ROOT / "build" / "release"))
    if not (build / "src/api/libhywu.so").exists():
        (pytest.fail if "CI" in os.environ else pytest.skip)("libhywu.so is not built: run `make cpp`")
    folder = tmp_path_factory.mktemp("installed")
    run("cmake", "--install", build, "--prefix", folder / "first", "--strip")
    return (folder / "first").rename(folder / "moved")


def one(folder: Path, pattern: str) -> Path:
    (found,) = [path for path in folder.rglob(pattern) if not path.is_symlink()]
    return found


def test_symbols_size_and_libraries(installed: Path) -> None:
    library = one(installed, "libhywu.so*")
    symbols = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
    assert "hywu_edit" in symbols
    assert [name for name in symbols if not name.startswith("hywu_")] == []
    assert library.stat().st_size < 1_500_000
    dynamic = run("readelf", "-d", library)
    assert "[libhywu.so.0]" in dynamic
    assert "RUNPATH" not in dynamic
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    stems = {name.split(".so")[0] for name in needed}
    assert stems <= {"libpcre2-8", "libutf8proc", "libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x86-64"}


def test_a_program_finds_it_with_cmake(installed: Path, tmp_path: Path) -> None:
    config = one(installed, "hywuConfig.cmake").parent
    run("cmake", "-S", EXAMPLES / "find_package", "-B", tmp_path, f"-Dhywu_DIR={config}")
    run("cmake", "--build", tmp_path)
    assert "libhywu.so.0" in run("readelf", "-d", tmp_path / "edit")


def test_a_program_finds_it_with_pkg_config(installed: Path, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("there is no pkg-config")
    folder = str(one(installed, "hywu.pc").parent)
    flags = run("pkg-config", "--cflags", "--libs", "hywu", PKG_CONFIG_PATH=folder).split()
    library = one(installed, "libhywu.so*").parent
    run("gcc", EXAMPLES / "edit.c", "-o", tmp_path / "edit", *flags, f"-Wl,-rpath,{library}")
    done = subprocess.run([tmp_path / "edit", tmp_path / "absent"], capture_output=True, text=True)
    assert done.returncode > 0  # it starts, and says what is wrong; a loader's failure would be 127
    assert done.returncode != 127
    assert done.stderr


def test_the_executables_find_the_library_beside_them(installed: Path) -> None:
    tool = installed / "bin" / "hywu-edit"
    if not tool.exists():
        pytest.skip("built without libjpeg or libpng")
    assert "bundle" in run(tool, "--help")
