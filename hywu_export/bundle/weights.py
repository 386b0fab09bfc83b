"""Weights on their way from checkpoints into a bundle, a piece of one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from hywu_runtime.bundle import header_sha256
from hywu_runtime.errors import CheckpointError

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Dtypes of weights, by their safetensors names."""

SAFETENSORS_DTYPES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}

CHUNK_BYTES = 16 * 2**20


class TensorLocation(Protocol):
    """Where the bytes of a tensor are: little-endian, row-major, ``length`` bytes from ``offset`` in
    ``file``.

    ``dtype`` is a safetensors name (``F16``).
    """

    @property
    def file(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in memory in place of one in a file; ``data`` gives its bytes when they are written."""

    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], bytes]


class WeightSource(Protocol):
    """A checkpoint: tensor name → location."""

    def __contains__(self, name: object, /) -> bool: ...
    def __getitem__(self, name: str, /) -> TensorLocation: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weights file. Its bytes are ``data``, or what that gives when they are written, or are
    read from ``location`` and converted to ``dtype``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    location: TensorLocation | None = None
    data: bytes | Callable[[], bytes] | None = None

    @property
    def size(self) -> int:
        """Bytes in the weights file."""
        return math.prod(self.shape) * NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file laid out before it is written: every tensor has its offset from the start of the
    file."""

    name: str
    header: bytes
    tensors: tuple[StoredTensor, ...]
    offsets: Mapping[str, int]

    @classmethod
    def lay_out(cls, name: str, tensors: Iterable[StoredTensor]) -> WeightsFile:
        """Orders tensors by alignment, then by name, so that equal content gives equal bytes."""
        ordered = tuple(sorted(tensors, key=lambda t: (-NUMPY_DTYPES[t.dtype].itemsize, t.name)))
        entries: dict[str, object] = {}
        starts: dict[str, int] = {}
        position = 0
        for tensor in ordered:
            starts[tensor.name] = position
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, position + tensor.size],
            }
            position += tensor.size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)
        header = len(text).to_bytes(8, "little") + text
        return cls(name, header, ordered, {key: len(header) + start for key, start in starts.items()})

    def chunks(self) -> Iterator[bytes]:
        """The file's content; at most ``CHUNK_BYTES`` are held at once."""
        yield self.header
        for tensor in self.tensors:
            if tensor.data is not None:
                yield tensor.data() if callable(tensor.data) else tensor.data
            elif tensor.location is not None:
                yield from read_tensor(tensor.name, tensor.location, tensor.dtype)


def read_tensor(name: str, location: TensorLocation, dtype: str) -> Iterator[bytes]:
    """Reads a tensor's bytes, converted to ``dtype``, in pieces.

    Raises:
        CheckpointError: the file is gone or too short, or a value does not fit into ``dtype``.
    """
    source, target = NUMPY_DTYPES[location.dtype], NUMPY_DTYPES[dtype]
    try:
        with location.file.open("rb") as file:
            file.seek(location.offset)
            remaining = location.length
            while remaining:
                piece = file.read(min(remaining, CHUNK_BYTES))
                if not piece or len(piece) % source.itemsize:
                    raise CheckpointError(
                        f"Checkpoint file {location.file} ends within tensor {name!r}",
                        f"The tensor has {location.length} bytes from byte {location.offset}",
                        "Download the file again",
                    )
                remaining -= len(piece)
                yield piece if source == target else _convert(name, np.frombuffer(piece, source), target)
    except OSError as error:
        raise CheckpointError(
            f"Tensor {name!r} cannot be read from {location.file}: {error.strerror or error}"
        ) from error


def _convert(name: str, values: np.ndarray[Any, Any], target: np.dtype[Any]) -> bytes:
    with np.errstate(over="ignore"):
        converted = values.astype(target)
    if not np.array_equal(np.isfinite(values), np.isfinite(converted)):
        raise CheckpointError(
            f"Tensor {name!r} has values beyond the range of {target.name}",
            f"Weights are converted from {values.dtype.name} to {target.name}",
            "Export in a wider dtype",
        )
    return converted.tobytes()


def file_identity(file: Path) -> dict[str, object]:
    """Size of a safetensors file and hash of its header, as a reader of the bundle compares them.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return {"size": file.stat().st_size, "header_sha256": header_sha256(file)}
    except OSError as error:
        raise CheckpointError(f"Checkpoint file {file} cannot be read: {error.strerror or error}") from error
