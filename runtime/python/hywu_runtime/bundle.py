"""A bundle on disk: its manifest, and its files found, checked and mapped."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from hywu_runtime.codec import show
from hywu_runtime.errors import BundleError, InputError
from hywu_runtime.manifest import LinkedTensor, Manifest, is_safe_path

MAX_HEADER = 100 * 2**20  # safetensors' own limit


@dataclass(frozen=True)
class Weight:
    """A linked initializer: raw little-endian bytes, mapped read-only from the checkpoint."""

    data: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
    dtype: str
    shape: tuple[int, ...]


class Bundle:
    """An opened bundle: ``root``, ``manifest``, and where its files are."""

    def __init__(self, root: Path, manifest: Manifest, sources: Mapping[str, Path]):
        self.root = root
        self.manifest = manifest
        self.sources = dict(sources)
        self._maps: dict[Path, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        verify: bool = False,
        sources: Mapping[str, str | Path] | None = None,
        links: bool = True,
    ) -> Bundle:
        """Reads the manifest and checks every file of the bundle.

        Those of engines are checked when they are used: whatever happens to them, the bundle is sound.

        Args:
            path: the bundle directory.
            verify: compare the SHA-256 of every file too, engines included; sizes are always compared.
            sources: for a bundle with linked weights, source id to the checkpoint's directory.
            links: check the checkpoints that weights are linked to; without it, ``sources`` are not needed
                until a graph is loaded.
        Raises:
            BundleError: the manifest is invalid, or a file is missing, of another size or hash, or outside
                the bundle; a linked checkpoint is not the one that was exported.
            InputError: ``sources`` names a source that the bundle does not have.
        """
        root = Path(path)
        manifest = Manifest.read(root)
        root = root if root.is_dir() else root.parent
        for name in sources or {}:
            if name not in manifest.sources:
                raise InputError(
                    f"The bundle has no source {show(name)}",
                    f"It has {sorted(manifest.sources)}",
                    "Correct `sources`",
                )
        bundle = cls(root, manifest, {name: Path(directory) for name, directory in (sources or {}).items()})
        for file in manifest.files:
            if verify or not file.startswith("engines/"):
                bundle.check(file, verify)
        if links:
            bundle._check_links()
        return bundle

    def file(self, path: str) -> Path:
        """The file that the manifest calls ``path``, inside the bundle.

        Raises:
            BundleError: it is outside (by a symbolic link), or not a file.
        """
        return _inside(self.root, path, "the bundle")

    def graph_file(self, graph: str, variant: str | None = None) -> str:
        """The path, as the manifest names it, of a graph's ONNX file.

        Raises:
            InputError: there is no such variant.
        """
        if variant is not None:
            if variant not in self.manifest.variants:
                have = ", ".join(sorted(self.manifest.variants)) or "none"
                raise InputError(
                    f"The bundle has no variant {show(variant)}",
                    f"It has: {have}",
                    "Choose one of these, or make it with `hywu calibrate`",
                )
            if graph in self.manifest.variants[variant].graphs:
                return self.manifest.variants[variant].graphs[graph]
        return self.manifest.graphs[graph].file

    def initializers(self, graph_file: str) -> dict[str, Weight]:
        """The linked initializers of a graph, memory-mapped. Keep them as long as the session lives.

        Raises:
            BundleError: the root of a source was not given.
        """
        return {name: self._map(tensor) for name, tensor in self.manifest.linked.get(graph_file, {}).items()}

    def check(self, path: str, verify: bool = False) -> None:
        """Compares a file's size with the manifest, and with ``verify`` its hash. Raises BundleError."""
        entry = self.manifest.files[path]
        file = self.file(path)
        try:
            with file.open("rb") as stream:  # even for the size alone: what cannot be read is found here
                size = os.fstat(stream.fileno()).st_size
                digest = _sha256(stream) if verify and size == entry.size else entry.sha256
        except OSError as error:
            raise _damaged(f"{path} cannot be read: {error.strerror}", "Expected a readable file") from None
        if size != entry.size:
            raise _damaged(f"{path} has {size} bytes", f"Expected {entry.size}")
        if digest != entry.sha256:
            raise _damaged(f"{path} has SHA-256 {digest}", f"Expected {entry.sha256}")

    def _check_links(self) -> None:
        used = {(t.source, t.file) for tensors in self.manifest.linked.values() for t in tensors.values()}
        for source, path in sorted(used):
            file = self._source_file(source, path)
            expected = self.manifest.sources[source].files[path]
            try:
                size, header = file.stat().st_size, header_sha256(file)
            except OSError as error:
                raise _other_checkpoint(source, file, f"cannot be read: {error.strerror}") from None
            if size != expected.size:
                raise _other_checkpoint(source, file, f"has {size} bytes, not {expected.size}")
            if header != expected.header_sha256:
                raise _other_checkpoint(source, file, "has another safetensors header")

    def _source_file(self, source: str, path: str) -> Path:
        if source not in self.sources:
            name = self.manifest.sources[source].name
            raise BundleError(
                f"The weights of this bundle are linked to source {show(source)} ({show(name)})",
                "Expected the directory of that checkpoint",
                f"Give it: sources={{{source!r}: DIRECTORY}}, or --source {source}=DIRECTORY",
            )
        root = self.sources[source]
        file = root / path  # checkpoints in a hub's cache are symbolic links: these are followed
        if not is_safe_path(path) or not file.is_file():
            raise _other_checkpoint(source, file, "is not a file")
        return file

    def _map(self, tensor: LinkedTensor) -> Weight:
        file = self._source_file(tensor.source, tensor.file)
        if file not in self._maps:
            try:
                with file.open("rb") as stream:
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise _other_checkpoint(tensor.source, file, f"cannot be mapped: {error}") from None
            self._maps[file] = np.frombuffer(mapped, np.uint8)
        data = self._maps[file][tensor.offset : tensor.offset + tensor.length]
        if len(data) != tensor.length or math.prod(tensor.shape) == 0:
            raise _other_checkpoint(tensor.source, file, f"holds no {tensor.length} bytes at {tensor.offset}")
        return Weight(data, tensor.dtype, tensor.shape)


def header_sha256(path: Path) -> str:
    """SHA-256 of a safetensors header: 8 bytes (n, little-endian) and the n bytes of JSON after them."""
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        return hashlib.sha256(prefix + stream.read(min(length, MAX_HEADER))).hexdigest()


def _inside(root: Path, path: str, what: str) -> Path:
    file = root / path
    try:
        resolved = file.resolve()
        inside = is_safe_path(path) and resolved.is_relative_to(root.resolve())
        is_file = inside and resolved.is_file()
    except (OSError, ValueError, RuntimeError):  # a loop of links, a path that the system refuses
        inside, is_file = True, False
    if not inside:
        raise BundleError(
            f"{path} leads out of {what}",
            "Expected a file inside it",
            "Do not use this bundle unless you know where it comes from",
        )
    if not is_file:
        raise _damaged(f"{path} is missing", "Expected a file that the manifest lists")
    return file


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def _damaged(wrong: str, expected: str) -> BundleError:
    return BundleError(wrong, expected, "The bundle is damaged: copy or export it again")


def _other_checkpoint(source: str, file: Path, problem: str) -> BundleError:
    return BundleError(
        f"{file} {problem}",
        f"Expected the checkpoint that source {show(source)} was exported from",
        "Give that checkpoint's directory, or export again from this one",
    )
