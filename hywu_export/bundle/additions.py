"""Variants and engines: folders that are added to a bundle which exists already."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from hywu_export.bundle.staging import StagingDirectory, writing
from hywu_runtime.codec import decode
from hywu_runtime.errors import BundleError
from hywu_runtime.manifest import FILE_NAME, Engine, File, Manifest, Variant, is_safe_path


class BundleAddition:
    """A folder that appears in a bundle together with its entry in the manifest, or not at all.

    ::

        with BundleAddition(bundle, "variants/int8") as addition:
            addition.write("step.onnx", chunks)
            addition.commit(lambda m: replace(m, variants={**m.variants, "int8": variant}))

    The folder is staged inside the bundle, where nothing looks for it. ``commit`` takes the place of a folder
    of that name: its entries leave the manifest first, so that the bundle is valid at every moment; a process
    that is killed in between leaves the bundle without the addition. Of two additions at the same time both
    are kept.

    Args:
        bundle: the bundle's directory.
        folder: ``variants/<name>`` or ``engines/<key>``.
    Raises:
        BundleError: there is no bundle, the name is not allowed, or nothing can be written there.
    """

    def __init__(self, bundle: str | Path, folder: str):
        self.bundle, self.folder = Path(bundle), folder
        parts = folder.split("/")
        if len(parts) != 2 or parts[0] not in ("variants", "engines") or not is_safe_path(folder):
            raise BundleError(
                f"{folder!r} is no folder for an addition to a bundle",
                'Expected variants/NAME or engines/KEY, the name without / \\ : * ? " < > |',
                "Choose another name",
            )
        Manifest.read(self.bundle)
        self._staging = StagingDirectory(self.bundle.absolute() / folder, overwrite=True)

    def __enter__(self) -> BundleAddition:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._staging.discard()
        with contextlib.suppress(OSError):  # it was made for the staging directory, and is empty
            self._staging.path.parent.rmdir()

    @property
    def directory(self) -> Path:
        """Where the files are staged, for tools that look at what was written so far."""
        return self._staging.directory

    def write(self, name: str, chunks: Iterable[bytes]) -> None:
        """Writes a file of the folder; ``name`` is relative to it. Raises BundleError."""
        self._staging.write(name, chunks)

    def commit(self, change: Callable[[Manifest], Manifest]) -> Manifest:
        """Puts the folder in its place, and what ``change`` makes of the manifest.

        ``change`` is given the manifest without what the folder held before, and with its new files.

        Returns:
            The new manifest.
        Raises:
            BundleError: the new manifest is not valid, or cannot be written; the bundle is as it was.
        """
        with _locked(self.bundle):
            before = Manifest.read(self.bundle)
            without = _without(before, self.folder)
            added = {
                f"{self.folder}/{name}": decode(File, entry, name)
                for name, entry in self._staging.files.items()
            }
            files = dict(sorted({**without.files, **added}.items()))
            after = change(replace(without, files=files))
            with _staged_manifest(self.bundle, after) as put_after:
                if without.files != before.files:
                    with _staged_manifest(self.bundle, without) as put_without:
                        put_without()
                self._staging.publish()
                put_after()
        return after


def _without(manifest: Manifest, folder: str) -> Manifest:
    """The manifest without the files of a folder and all that refers to them."""

    def outside(path: str) -> bool:
        return not path.startswith(f"{folder}/")

    def elsewhere(addition: Variant | Engine) -> bool:
        return all(map(outside, (*addition.graphs.values(), addition.report or "")))

    return replace(
        manifest,
        files={path: file for path, file in manifest.files.items() if outside(path)},
        variants={name: v for name, v in manifest.variants.items() if elsewhere(v)},
        engines={key: e for key, e in manifest.engines.items() if elsewhere(e)},
        linked={path: tensors for path, tensors in manifest.linked.items() if outside(path)},
    )


@contextlib.contextmanager
def _locked(bundle: Path) -> Iterator[None]:
    """One addition at a time: a lock on the bundle's directory, which goes with the process."""
    with writing(bundle):
        descriptor = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _staged_manifest(bundle: Path, manifest: Manifest) -> Iterator[Callable[[], None]]:
    """A manifest written beside the bundle's own; the function that is given puts it in its place."""
    text = manifest.dumps().encode()
    staged = bundle / f".{FILE_NAME}.partial-{secrets.token_hex(4)}"

    def put() -> None:
        with writing(bundle):
            os.replace(staged, bundle / FILE_NAME)
            descriptor = os.open(bundle, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    try:
        with writing(bundle), staged.open("xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield put
    finally:
        staged.unlink(missing_ok=True)
