"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from hywu_runtime.errors import BundleError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an operating system error (disk full, no permission) into a BundleError that names ``path``."""
    try:
        yield
    except OSError as error:
        remedy = "Check the path and its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "Free some space or choose another place; nothing half-written is left behind"
        raise BundleError(
            f"Bundle {path} cannot be written: {error.strerror or error}",
            "The export needs a writable directory with room for the weights",
            remedy,
        ) from error


def check_target(path: Path, overwrite: bool) -> None:
    """Checks that a bundle may be written to ``path``.

    Raises:
        BundleError: it is taken and ``overwrite`` is false, is not a bundle, or is no name for one.
    """
    if not path.name or path.name == "..":
        raise BundleError(
            f"{path} is no name for a bundle", "A bundle is a directory with a name", "Choose another path"
        )
    if not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink():
        raise BundleError(f"{path} exists and is not a directory", "A new path", "Choose another one")
    with writing(path):
        content = os.listdir(path)
    if content and not overwrite:
        raise BundleError(
            f"{path} exists and is not empty",
            "A bundle is written to a new path",
            "Choose another path, or overwrite the bundle that is there (--overwrite)",
        )
    if content and "manifest.json" not in content:
        raise BundleError(
            f"{path} exists and holds no bundle (no manifest.json)",
            "Only a bundle is overwritten",
            "Choose another path",
        )


class StagingDirectory:
    """Collects files in a hidden sibling of ``path`` and renames it to ``path`` at the end.

    With ``overwrite`` a directory that is there is replaced, whatever it holds: see :func:`check_target`.

    The sibling is on the same file system, and locked while its process lives: leftovers of killed
    processes are recognised by the missing lock, and removed by the next export to the same path. Of two
    exports to one path at the same time, the one that finishes last is refused (or replaces the other, with
    ``overwrite``).

    Raises:
        BundleError: ``path`` cannot be written.
    """

    def __init__(self, path: Path, overwrite: bool):
        self.path, self._overwrite = path, overwrite
        self.files: dict[str, dict[str, object]] = {}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._prefix = f".{path.name}.partial-"
            self._remove_leftovers()
            self.directory, self._lock = self._create()

    def _create(self) -> tuple[Path, int]:
        while True:
            directory = self.path.parent / f"{self._prefix}{os.getpid()}-{secrets.token_hex(4)}"
            directory.mkdir()
            # Another process may take the directory for a leftover until the lock is held: then try again.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.stat(directory).st_ino == os.fstat(lock).st_ino:
                        return directory, lock
                except BaseException:
                    os.close(lock)
                    raise

    def _remove_leftovers(self) -> None:
        for leftover in self.path.parent.glob(f"{_glob_escape(self._prefix)}*"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, BlockingIOError):
                lock = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(leftover)
                finally:
                    os.close(lock)

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file of the bundle, and records its size and SHA-256 under its name."""
        self._check_name(name)
        target = self.directory / name
        digest, size = hashlib.sha256(), 0
        with writing(self.path):
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        self.files[name] = {"size": size, "sha256": digest.hexdigest()}

    def _check_name(self, name: str) -> None:
        parts = name.split("/")
        if (
            name != str(PurePosixPath(name))
            or "\\" in name
            or ":" in name
            or "\0" in name
            or {"", ".", ".."} & set(parts)
        ):
            raise BundleError(
                f"{name!r} is no name for a file of a bundle",
                "Names are relative, with '/', and without '..'",
            )
        if name in self.files:
            raise BundleError(f"File {name!r} is added to the bundle twice", "A name stands for one file")

    def publish(self) -> None:
        """Makes the directory visible under its path, in one step."""
        with writing(self.path):
            for folder, _, _ in os.walk(self.directory):
                _sync_directory(Path(folder))
            if self._overwrite and self.path.exists():
                _exchange(self.directory, self.path)
            else:
                try:
                    os.rename(self.directory, self.path)
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        raise BundleError(
                            f"{self.path} was written by another process in the meantime",
                            "One export writes to a path at a time",
                            "Choose another path, or pass overwrite",
                        ) from error
                    raise
            _sync_directory(self.path.parent)
        self.discard()  # after an exchange, the old bundle

    def discard(self) -> None:
        """Removes the staging directory, if there is one; lets the lock go."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _glob_escape(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two directories in one step (renameat2 with RENAME_EXCHANGE): at no moment is ``old`` missing."""
    at_working_directory, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (
        at_working_directory,
        os.fsencode(new),
        at_working_directory,
        os.fsencode(old),
        rename_exchange,
    )
    if libc.renameat2(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"it cannot be replaced in one step ({os.strerror(number)})")
