"""Checkpoint files as sources of weights: where each tensor's bytes lie, from the headers alone.

Nothing here loads a weight, so checking takes as long as reading the headers, whatever the checkpoint's size.
The file format is that of https://huggingface.co/docs/safetensors: header length, JSON header, data.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # values come from files, and may be of any size
from typing import Any

from hywu_runtime.errors import CheckpointError

_DTYPES = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    2: ("U16", "I16", "F16", "BF16"),
    4: ("U32", "I32", "F32"),
    8: ("U64", "I64", "F64", "C64"),
}
DTYPE_BYTES = {dtype: size for size, dtypes in _DTYPES.items() for dtype in dtypes}

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD_NAME = re.compile(r"-\d+-of-\d+\.safetensors$")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_JSON_BYTES = 100_000_000
_FETCH_AGAIN = "fetch the file again; if it was made here, save it again"


@dataclass(frozen=True)
class TensorLocation:
    """A tensor inside a safetensors file.

    Attributes:
        file: the file.
        dtype: a key of `DTYPE_BYTES`.
        shape: the tensor's shape; row-major.
        offset: bytes from the start of the file to the tensor's first number.
        length: bytes that the tensor takes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class SafetensorsIndex(Mapping[str, TensorLocation]):
    """Tensor name → `TensorLocation`, over one safetensors file or all shards of a checkpoint.

    Attributes:
        files: every file of the checkpoint.
    """

    def __init__(self, tensors: Mapping[str, TensorLocation], files: Iterable[Path]):
        self._tensors = dict(tensors)
        self.files = tuple(files)

    def __getitem__(self, name: str) -> TensorLocation:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @classmethod
    def from_file(cls, path: str | Path) -> SafetensorsIndex:
        """Index one safetensors file.

        Raises:
            CheckpointError: the file is missing, truncated or damaged.
        """
        path = Path(path)
        return cls(_read_header(path), [path])

    @classmethod
    def from_folder(cls, folder: str | Path, stem: str | None = None) -> SafetensorsIndex:
        """Index ``<stem>.safetensors``, or the shards that ``<stem>.safetensors.index.json`` names.

        Args:
            folder: where the files are.
            stem: such as ``model`` or ``diffusion_pytorch_model``; None takes the only one there is.

        Raises:
            CheckpointError: no such folder or file, an ambiguous stem, a shard that is missing, damaged or
                holds other tensors than the index says.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder", "a checkpoint folder", "check the path")
        stem = _only_stem(folder) if stem is None else stem
        single, index = folder / (stem + _SUFFIX), folder / (stem + _INDEX_SUFFIX)
        if single.exists():
            return cls.from_file(single)
        if index.exists():
            return cls.from_index(index)
        raise CheckpointError(
            f"{folder} has no weights", f"{single.name} or {index.name}", "check the path, or fetch it again"
        )

    @classmethod
    def from_index(cls, index: Path) -> SafetensorsIndex:
        """Index the shards that a file like ``model.safetensors.index.json`` names.

        Raises:
            CheckpointError: a shard is missing, damaged or holds other tensors than the index says.
        """
        weight_map = _weight_map(index)
        tensors: dict[str, TensorLocation] = {}
        shards = [index.with_name(name) for name in sorted(set(weight_map.values()))]
        for shard in shards:
            held = _read_header(shard)
            listed = {tensor for tensor, file in weight_map.items() if file == shard.name}
            for tensor in sorted(listed ^ held.keys()):
                wrong = f"{'lacks the' if tensor in listed else 'has the unlisted'} tensor {tensor!r}"
                raise CheckpointError(
                    f"{shard} {wrong}", f"the tensors that {index.name} lists for it", "fetch both again"
                )
            tensors.update(held)
        return cls(tensors, shards)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, keys in the order of the file.

    Raises:
        CheckpointError: the file cannot be read, is not UTF-8 JSON, is not an object, or has a key twice.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(text) > _MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} is too large", f"at most {_MAX_JSON_BYTES} bytes of JSON", _FETCH_AGAIN
        )
    return _parse_json_object(text, str(path))


def _parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ValueError(f"the key {key!r} occurs twice")
            table[key] = value
        return table

    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{what} is not valid JSON: {error}", "one JSON object with unique keys", _FETCH_AGAIN
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{what} is a JSON {type(data).__name__}", "a JSON object", _FETCH_AGAIN)
    return data


def _only_stem(folder: Path) -> str:
    names = [path.name for path in folder.iterdir()]
    stems = {name.removesuffix(_INDEX_SUFFIX) for name in names if name.endswith(_INDEX_SUFFIX)}
    stems |= {
        name.removesuffix(_SUFFIX)
        for name in names
        if name.endswith(_SUFFIX) and not _SHARD_NAME.search(name)
    }
    if len(stems) == 1:
        return stems.pop()
    found = ", ".join(sorted(stems)) if stems else "none"
    raise CheckpointError(
        f"{folder} does not have exactly one set of safetensors weights: {found}",
        f"one *{_SUFFIX} or one *{_INDEX_SUFFIX}",
        "name the one to use, or convert the weights to safetensors",
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} has no weight_map", "an object of tensor names and file names", _FETCH_AGAIN
        )
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(_SUFFIX) or re.search(r"[/\\:\0]", name):
            raise CheckpointError(
                f"{index}: the tensor {tensor!r} is said to be in {brief(name)}",
                f"the plain name of a {_SUFFIX} file in the same folder",
                "do not use this checkpoint unless you trust its origin",
            )
    return weight_map


def _read_header(path: Path) -> dict[str, TensorLocation]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} ({size} bytes) says that its header takes {length} bytes",
                    "a safetensors file with a header within the file",
                    _FETCH_AGAIN,
                )
            header = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    table = _parse_json_object(header, f"the header of {path}")
    table.pop("__metadata__", None)
    tensors = {name: _location(path, name, entry, 8 + length) for name, entry in table.items()}
    _check_coverage(path, tensors, 8 + length, size)
    return tensors


def _location(path: Path, name: str, entry: Any, start: int) -> TensorLocation:
    def damaged(wrong: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: the tensor {name!r} {wrong}", expected, _FETCH_AGAIN)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged("has a header entry of another form", "dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise damaged(f"has the dtype {brief(dtype)}", f"one of {', '.join(DTYPE_BYTES)}")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise damaged(
            f"has the shape {brief(shape)} and the offsets {brief(offsets)}", "lists of sizes, two offsets"
        )
    length = math.prod(shape) * DTYPE_BYTES[dtype]
    begin, end = offsets
    if end - begin != length:
        raise damaged(f"takes {end - begin} bytes", f"{length} bytes for {dtype} {shape}")
    return TensorLocation(path, dtype, tuple(shape), start + begin, length)


def _sizes(value: Any) -> bool:
    """Whether this is a list of sizes that a tensor can have; their product then is quickly computed."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    )


def _check_coverage(path: Path, tensors: Mapping[str, TensorLocation], start: int, size: int) -> None:
    """As the format demands, tensors lie side by side and fill the file: no overlap, hole, cut or rest."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].length)):
        if tensor.offset != end:
            wrong = "overlaps another tensor" if tensor.offset < end else "does not begin where another ends"
            raise CheckpointError(
                f"{path}: the tensor {name!r} {wrong}", "tensors side by side", _FETCH_AGAIN
            )
        end += tensor.length
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes", f"{end} bytes, by its header", _FETCH_AGAIN)


def _unreadable(path: str | Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {error.strerror or error}",
        "a readable file",
        "check the path, or fetch it again",
    )
