"""Packages of Debian, unpacked into a folder: nothing is installed, and no root is needed.

The mirror is the one that the machine's apt sources name; it has every suite and architecture. Used by the
scripts that put together what the C++ runtime is built against: `onnxruntime_sdk.py`, `aarch64_sdk.py` and
`mingw_sdk.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Unavailable(Exception):
    """Something that a script needs is not on this machine. The text says what, and what to do."""


def release() -> dict[str, str]:
    """The fields of /etc/os-release: `ID`, `VERSION_CODENAME`, …"""
    path = Path("/etc/os-release")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {key: value.strip().strip('"') for key, _, value in pairs}


def _mirror() -> str:
    """The address of the Debian mirror that the machine uses."""
    system = release()
    if system.get("ID") != "debian" or shutil.which("apt-get") is None:
        raise Unavailable("this is not a Debian machine, so there is no Debian mirror to take packages from")
    suites = {system.get("VERSION_CODENAME", ""), "stable", "oldstable", "testing"}
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE)|$(RELEASE)|$(COMPONENT)", "Identifier: Packages"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    for line in found.splitlines():
        site, suite, component = line.split("|")
        if suite in suites and component == "main":
            return site
    raise Unavailable(
        f"the apt sources of this machine have no suite {system.get('VERSION_CODENAME')!r} of Debian"
    )


class Archive:
    """One suite of Debian for one architecture; a context manager, whose lists are gone afterwards.

    Args:
        suite: `bookworm`, `trixie`, …; the machine's own by default.
        architecture: of the packages, as Debian calls it (`arm64`); the machine's own by default.
        sources: source packages, in place of binary ones.

    Raises:
        Unavailable: this is no Debian machine, or the mirror cannot be reached.
    """

    def __init__(
        self, suite: str | None = None, architecture: str | None = None, *, sources: bool = False
    ) -> None:
        suite = suite or release().get("VERSION_CODENAME", "stable")
        options = [f"signed-by={_KEYRING}"] if _KEYRING.is_file() else []
        options += [f"arch={architecture}"] if architecture else []
        words = [
            "deb-src" if sources else "deb",
            f"[{' '.join(options)}]" if options else "",
            _mirror(),
            suite,
            "main",
        ]
        self._line = " ".join(filter(None, words))
        self._suffix = f":{architecture}" if architecture else ""
        self.suite = suite

    def __enter__(self) -> Archive:
        self._temporary = tempfile.TemporaryDirectory(prefix="hywu-apt-")
        self._folder = folder = Path(self._temporary.name)
        for name in ("lists/partial", "cache/archives/partial", "packages"):
            (folder / name).mkdir(parents=True)
        (folder / "sources.list").write_text(self._line + "\n", encoding="utf-8")
        settings = [
            f"Dir::Etc::SourceList={folder / 'sources.list'}",
            "Dir::Etc::SourceParts=/dev/null",
            f"Dir::State::Lists={folder / 'lists'}",
            f"Dir::Cache={folder / 'cache'}",
            "Acquire::Languages=none",
            "APT::Sandbox::User=root",
        ]
        if self._suffix:
            settings.append(f"APT::Architectures::={self._suffix[1:]}")
        self._options = [word for setting in settings for word in ("-o", setting)]
        try:
            self._apt("update")
        except BaseException:
            self._temporary.cleanup()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._temporary.cleanup()

    def unpack(self, packages: Iterable[str], target: Path) -> None:
        """Unpacks binary packages into `target`, as if that were the root of the file system."""
        target.mkdir(parents=True, exist_ok=True)
        self._apt("download", *(name + self._suffix for name in packages))
        for package in self._taken("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(target)], check=True)

    def unpack_sources(self, package: str, target: Path) -> Path:
        """Unpacks the upstream sources of a package below `target`; returns their top folder."""
        self._apt("source", "--download-only", "--tar-only", package)
        (archive,) = self._taken("*.orig.tar.*")
        folder = target / package
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run(["tar", "-xf", str(archive), "-C", str(folder), "--strip-components=1"], check=True)
        return folder

    def _taken(self, pattern: str) -> Sequence[Path]:
        found = sorted((self._folder / "packages").glob(pattern))
        return [path.rename(self._folder / path.name) for path in found]

    def _apt(self, command: str, *arguments: str) -> None:
        done = subprocess.run(
            ["apt-get", "-qq", *self._options, command, *arguments],
            cwd=self._folder / "packages",
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            what = " ".join((command, *arguments))
            raise Unavailable(
                f"apt-get {what} (suite {self.suite}) failed: {done.stderr.strip() or done.stdout.strip()}"
            )
