"""Puts together .sdk/onnxruntime/{include,lib}, with which the ONNX Runtime backend is built and tested.

    python tools/onnxruntime_sdk.py                       for this machine
    python tools/onnxruntime_sdk.py --machine aarch64     for tests under QEMU, in .sdk/onnxruntime-aarch64

The runtime needs the header of the C API to build, and the library only to run. The C API is versioned, and a
library serves every older version, so header and library may be of different releases. In this order:

1. ONNXRUNTIME_ROOT, a folder with include/ and lib/ (an unpacked release);
2. the system package (libonnxruntime-dev);
3. the header from the first newer Debian suite that has it, the library from the installed Python wheel.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from debian import Archive, Unavailable

ROOT = Path(__file__).resolve().parent.parent
HEADER = "onnxruntime_c_api.h"
SUITES = ("trixie", "forky", "sid")
# The wheel whose library runs under QEMU's user emulation: 1.20.1 and 1.32.0 crash there.
AARCH64_WHEEL = "onnxruntime==1.23.2"
REMEDY = (
    "Unpack a release of ONNX Runtime and set ONNXRUNTIME_ROOT to its folder (with include/ and lib/); on "
    "Debian 13 or later install libonnxruntime-dev; on Debian 12 install the Python package onnxruntime."
)


def find_header(*folders: Path) -> Path | None:
    """The C API's header below one of `folders`, in any of the places where releases and packages have it."""
    for folder in folders:
        for place in ("", "onnxruntime", "onnxruntime/core/session", "core/session"):
            if (folder / place / HEADER).is_file():
                return folder / place / HEADER
    return None


def find_library(*folders: Path) -> Path | None:
    """The library in one of `folders`: the file itself, not a link to it."""
    for folder in folders:
        for path in sorted(folder.glob("libonnxruntime.so*")):
            if path.is_file():
                return path.resolve()
    return None


def api_version(header: Path) -> int:
    """ORT_API_VERSION of a header."""
    match = re.search(r"^#define ORT_API_VERSION (\d+)", header.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise Unavailable(
            f"{header} does not define ORT_API_VERSION: it is not the header of ONNX Runtime's C API"
        )
    return int(match.group(1))


def library_folders() -> Iterator[Path]:
    """Where this system has libraries."""
    triplet = getattr(sys.implementation, "_multiarch", "")
    for folder in (f"/usr/lib/{triplet}", "/usr/local/lib", "/usr/lib64", "/usr/lib"):
        yield Path(folder)


def wheel_library() -> Path | None:
    """The library in the Python wheel that is installed beside this interpreter."""
    spec = importlib.util.find_spec("onnxruntime")
    return find_library(Path(spec.origin).parent / "capi") if spec is not None and spec.origin else None


def debian_header(target: Path) -> tuple[Path, str]:
    """The header from the first newer Debian suite that has it, unpacked below `target`; where it is from."""
    reasons = []
    for suite in SUITES:
        try:
            with Archive(suite) as archive:
                archive.unpack(["libonnxruntime-dev"], target)
        except Unavailable as error:
            reasons.append(str(error))
            continue
        header = find_header(target / "usr/include")
        if header is not None:
            return header, f"libonnxruntime-dev of Debian {suite}"
    raise Unavailable("; ".join(dict.fromkeys(reasons)) or "no Debian suite has the header")


def aarch64_library(target: Path) -> Path:
    """The library of the aarch64 wheel, unpacked below `target`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--dest", str(target)]
    command += [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
    done = subprocess.run([*command, AARCH64_WHEEL], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"pip cannot download {AARCH64_WHEEL} for aarch64: {done.stderr.strip()}")
    (wheel,) = target.glob("onnxruntime-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(r"/libonnxruntime\.so\.\d", name)]
        if not names:
            raise Unavailable(f"{wheel.name} has no libonnxruntime.so")
        return Path(archive.extract(names[0], target))


def assemble(machine: str, out: Path) -> dict[str, str]:
    """Makes the SDK in `out` anew. Returns where header and library are from, and the C API's version."""
    native = machine == os.uname().machine
    with tempfile.TemporaryDirectory(prefix="hywu-onnxruntime-") as name:
        work = Path(name)
        given = os.environ.get("ONNXRUNTIME_ROOT")
        root = Path(given or "/nowhere")
        header: Path | None
        library: Path | None = None
        header, header_from = find_header(root / "include"), str(root)
        if native:
            library, library_from = find_library(root / "lib", root / "lib64"), str(root)
            if given and (header is None or library is None):
                missing = f"include/{HEADER}" if header is None else "lib/libonnxruntime.so"
                raise Unavailable(f"ONNXRUNTIME_ROOT is {given!r}, and there is no {missing} in it")
        if header is None:
            header, header_from = find_header(Path("/usr/include"), Path("/usr/local/include")), "the system"
            if header is not None and native:
                library, library_from = find_library(*library_folders()), "the system"
        if header is None:
            header, header_from = debian_header(work / "package")
        if library is None and native:
            library, library_from = wheel_library(), "the Python wheel"
        if not native:
            library, library_from = aarch64_library(work), AARCH64_WHEEL
        if library is None:
            raise Unavailable("the library was found neither in the system nor in a Python wheel")

        facts = {
            "header": header_from,
            "api": str(api_version(header)),
            "library": f"{library.name} from {library_from}",
            "source": str(library) if native else library.name,
        }
        staging = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
        try:
            (staging / "include").mkdir()
            (staging / "lib").mkdir()
            for part in header.parent.glob("onnxruntime_*c_api.h"):  # the newer ones are divided into several
                shutil.copy(part, staging / "include" / part.name)
            target = staging / "lib" / library.name
            if native:
                target.symlink_to(library)
            else:
                shutil.copy(library, target)
            for alias in ("libonnxruntime.so.1", "libonnxruntime.so"):
                if alias != library.name:
                    (staging / "lib" / alias).symlink_to(library.name)
            (staging / "sdk.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
            staging.chmod(0o755)
            staging.rename(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if native:
        check(out)
    return facts


def check(out: Path) -> None:
    """Opens the library and compares its version with the header's: the one way in which they may not fit."""

    class ApiBase(ctypes.Structure):
        _fields_ = (
            ("get_api", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)),
            ("get_version_string", ctypes.CFUNCTYPE(ctypes.c_char_p)),
        )

    library = ctypes.CDLL(str(out / "lib/libonnxruntime.so"))
    library.OrtGetApiBase.restype = ctypes.POINTER(ApiBase)
    base = library.OrtGetApiBase().contents
    wanted = api_version(out / "include" / HEADER)
    known = int(base.get_version_string().decode().split(".")[1])
    if wanted > known:
        print(
            f"note: the header's C API is {wanted}, the library's {known}; the runtime asks for {known}",
            file=sys.stderr,
        )


def current(out: Path) -> bool:
    """Whether an SDK is there whose library still exists."""
    try:
        json.loads((out / "sdk.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if os.environ.get("ONNXRUNTIME_ROOT"):
        return False
    wheel = wheel_library()
    linked = (out / "lib/libonnxruntime.so").resolve()
    moved = "site-packages" in str(linked) and wheel is not None and wheel != linked
    return linked.is_file() and (out / "include" / HEADER).is_file() and not moved


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Put together what the ONNX Runtime backend is built and tested with."
    )
    parser.add_argument("--machine", default=os.uname().machine, choices=["x86_64", "aarch64"])
    parser.add_argument("--out", type=Path, help="default: .sdk/onnxruntime, or .sdk/onnxruntime-aarch64")
    parser.add_argument("--anew", action="store_true", help="even if it is there already")
    options = parser.parse_args()
    suffix = "" if options.machine == os.uname().machine else "-" + options.machine
    out: Path = options.out or ROOT / ".sdk" / ("onnxruntime" + suffix)
    if not options.anew and current(out):
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        facts = assemble(options.machine, out)
    except Unavailable as error:
        print(f"ONNX Runtime for {options.machine} is not to be had: {error}.\n{REMEDY}", file=sys.stderr)
        return 1
    print(f"{out}: header from {facts['header']} (C API {facts['api']}), {facts['library']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
