"""Puts together .sdk/aarch64: the arm64 libraries that the C++ runtime is cross-compiled against.

    python tools/aarch64_sdk.py

They are unpacked from Debian packages; libc and libstdc++ come with the cross-compiler.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from debian import Archive, Unavailable

OUT = Path(__file__).resolve().parent.parent / ".sdk/aarch64"
PACKAGES = (
    *("libpcre2-dev", "libpcre2-8-0", "libutf8proc-dev", "libutf8proc2"),
    *("libjpeg62-turbo-dev", "libjpeg62-turbo", "libpng-dev", "libpng16-16", "zlib1g-dev", "zlib1g"),
)


def main() -> int:
    if (OUT / "usr/lib/aarch64-linux-gnu").is_dir():
        return 0
    OUT.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix="aarch64.", dir=OUT.parent))
    try:
        with Archive(architecture="arm64") as archive:
            archive.unpack(PACKAGES, staging)
        # Debian links some libraries by absolute paths, which would lead out of this folder.
        for link in staging.rglob("*"):
            if link.is_symlink() and link.readlink().is_absolute():
                target = staging / link.readlink().relative_to("/")
                link.unlink()
                link.symlink_to(target)
        # A system whose /lib is a link to /usr/lib has libraries of packages that still say /lib.
        if (staging / "lib").is_dir():
            shutil.copytree(staging / "lib", staging / "usr/lib", symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(staging / "lib")
        shutil.rmtree(staging / "usr/share", ignore_errors=True)
        staging.chmod(0o755)
        staging.rename(OUT)
    except Unavailable as error:
        print(f"The arm64 libraries are not to be had: {error}.", file=sys.stderr)
        print(
            "Unpack the arm64 packages of your system into .sdk/aarch64, or install them (multiarch).",
            file=sys.stderr,
        )
        return 1
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"{OUT}: {', '.join(PACKAGES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
