"""Builds .sdk/mingw: PCRE2 and utf8proc for Windows as static libraries, from Debian's source packages.

    python tools/mingw_sdk.py

Debian has the cross-compiler (g++-mingw-w64-x86-64-posix), and no packages of these two for it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from debian import Archive, Unavailable

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / ".sdk/mingw"
OPTIONS = {
    "pcre2": ["-DPCRE2_SUPPORT_JIT=ON", "-DPCRE2_BUILD_TESTS=OFF", "-DPCRE2_BUILD_PCRE2GREP=OFF"],
    "utf8proc": ["-DUTF8PROC_ENABLE_TESTING=OFF"],
}


def build(sources: Path, work: Path, into: Path, options: list[str]) -> None:
    """Configures, builds and installs one library."""
    configure = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        str(sources),
        "-B",
        str(work),
        f"-DCMAKE_INSTALL_PREFIX={into}",
    ]
    configure += [
        f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'runtime/cmake/mingw.cmake'}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    configure += ["-DBUILD_SHARED_LIBS=OFF", "-Wno-dev"]
    for command in (
        [*configure, *options],
        ["cmake", "--build", str(work)],
        ["cmake", "--install", str(work)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"{' '.join(command)} failed: {(done.stderr + done.stdout)[-2000:]}")


def main() -> int:
    if (OUT / "include/nlohmann").is_dir():
        return 0
    OUT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="hywu-mingw-") as name:
        work = Path(name)
        try:
            with Archive(sources=True) as archive:
                for package, options in OPTIONS.items():
                    sources = archive.unpack_sources(package, work)
                    build(sources, work / (package + "-build"), work / "installed", options)
            for unused in ("share", "bin", "cmake", "man", "lib/pkgconfig"):
                shutil.rmtree(work / "installed" / unused, ignore_errors=True)
            json = Path("/usr/include/nlohmann")
            if not json.is_dir():
                raise Unavailable("nlohmann-json3-dev is not installed")
            shutil.copytree(json, work / "installed/include/nlohmann")
            shutil.rmtree(OUT, ignore_errors=True)
            shutil.move(work / "installed", OUT)
        except Unavailable as error:
            print(f"The libraries for Windows are not to be had: {error}.", file=sys.stderr)
            print(
                "Build PCRE2 and utf8proc for Windows, static, and install them below .sdk/mingw.",
                file=sys.stderr,
            )
            return 1
    print(f"{OUT}: {', '.join(OPTIONS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
