"""Sets of low-rank weight deltas: in memory, in files, combined.

A target module has ``<module>.lora_A`` ``[D, r, in]`` (convolution ``[D, r, in, kh, kw]``, experts
``[D, E, r, in]``) and ``<module>.lora_B`` ``[D, out, r]`` (experts ``[D, E, out, r]``), any scale already in
B. D is 1, one set for the batch, or the batch, one set per sample.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hywu_runtime.codec import show
from hywu_runtime.errors import DeltaError
from hywu_runtime.files import write_atomically
from hywu_runtime.manifest import DeltaSpec

METADATA = {"hywu.deltas": "1"}
Array = npt.NDArray[np.float32]


class Deltas(Mapping[str, Array]):
    """An immutable mapping of tensor name to float32 array, see the module.

    Args:
        tensors: name to floating-point array; converted to float32.
    Raises:
        DeltaError: a name does not end in ``.lora_A`` or ``.lora_B``, or a tensor is not floating-point with
            3 to 8 axes, none empty.
    """

    def __init__(self, tensors: Mapping[str, npt.NDArray[Any]]):
        self._tensors: dict[str, Array] = {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not name.endswith((".lora_A", ".lora_B")):
                raise DeltaError(
                    f"A delta is called {show(name)}",
                    "Expected names that end in `.lora_A` or `.lora_B`",
                    "Convert an adapter with `hywu deltas convert`",
                )
            array = np.asarray(tensor)
            if array.dtype.kind != "f":
                raise DeltaError(
                    f"Delta {show(name)} has dtype {array.dtype}",
                    "Expected floating-point numbers",
                    "Store it as float32",
                )
            if not 3 <= array.ndim <= 8 or 0 in array.shape:
                raise _malformed_shape(name, array.shape)
            self._tensors[name] = np.ascontiguousarray(array, np.float32)

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Deltas({len(self) // 2} targets, rank {self.rank}, batch {self.batch})"

    @property
    def rank(self) -> int:
        """The largest rank among the targets; 0 for an empty set."""
        return max((t.shape[_rank_axis(n, t)] for n, t in self.items()), default=0)

    @property
    def batch(self) -> int:
        """D: 1, or the number of samples; 0 for an empty set."""
        return max((t.shape[0] for t in self.values()), default=0)

    @classmethod
    def load(cls, path: str | Path) -> Deltas:
        """Reads a delta file; FP16 and BF16 become float32.

        Raises:
            DeltaError: not a readable delta file.
        """
        from safetensors import deserialize, safe_open

        try:
            with safe_open(path, framework="numpy") as stream:
                metadata = stream.metadata() or {}
            entries: list[Any] = deserialize(Path(path).read_bytes())  # type: ignore[no-untyped-call]
        except Exception as error:  # safetensors' own exception among others
            raise DeltaError(
                f"{path} cannot be read as deltas: {error}",
                "Expected a safetensors file",
                "Check the path, or write the file again",
            ) from None
        if metadata.get("hywu.deltas") != METADATA["hywu.deltas"]:
            raise DeltaError(
                f"{path} is not marked as a delta file of version 1",
                "Expected the metadata `hywu.deltas` = `1`",
                "Convert a LoRA file with `hywu deltas convert`",
            )
        return cls({name: _to_array(name, entry) for name, entry in sorted(entries, key=lambda e: e[0])})

    def save(self, path: str | Path) -> None:
        """Writes a delta file, whole or not at all; equal sets give equal bytes.

        Raises:
            InputError: the file cannot be written.
        """
        from safetensors.numpy import save

        data = save(dict(sorted(self.items())), metadata=METADATA)
        write_atomically(path, lambda stream: stream.write(data))

    @staticmethod
    def blend(parts: Sequence[tuple[Deltas, float]], max_rank: int | None = None) -> Deltas:
        """The weighted sum of sets, exactly: ranks are concatenated and each weight is folded into B.

        Args:
            parts: sets of the same targets, with finite weights.
            max_rank: the largest rank that the result may have, a bundle's ``deltas.rank``.
        Raises:
            DeltaError: nothing to blend, targets differ, batches differ, a weight is not finite, or the
                ranks add up to more than ``max_rank``.
        """
        if not parts:
            raise DeltaError("There is nothing to blend", "Expected at least one set of deltas", "Give one")
        first = parts[0][0]
        for deltas, weight in parts:
            if not math.isfinite(weight):
                raise DeltaError(
                    f"A blend has the weight {weight}", "Expected finite weights", "Correct the weight"
                )
            _same_names(set(first), set(deltas), "the first set of the blend")
        batch = max(deltas.batch for deltas, _ in parts)
        if any(deltas.batch not in (1, batch) for deltas, _ in parts):
            raise DeltaError(
                f"A blend mixes sets for {sorted({d.batch for d, _ in parts})} samples",
                f"Expected 1 or {batch} everywhere",
                "Use `select` or `stack`",
            )
        rank = sum(deltas.rank for deltas, _ in parts)
        if max_rank is not None and rank > max_rank:
            raise DeltaError(
                f"The blend has rank {rank}",
                f"The bundle takes up to rank {max_rank}",
                "Blend fewer or smaller sets, or export the bundle with a larger rank",
            )
        tensors: dict[str, Array] = {}
        for name in first:
            scales = [np.float32(1 if name.endswith(".lora_A") else weight) for _, weight in parts]
            pieces = [deltas[name] * scale for (deltas, _), scale in zip(parts, scales)]
            try:
                wide = [np.broadcast_to(piece, (batch, *piece.shape[1:])) for piece in pieces]
                tensors[name] = np.concatenate(wide, _rank_axis(name, pieces[0]))
            except ValueError:
                raise _shape_error(
                    name, [list(piece.shape) for piece in pieces], "equal shapes but for the rank"
                ) from None
        return Deltas(tensors)

    @staticmethod
    def stack(sets: Sequence[Deltas]) -> Deltas:
        """One set for a batch, sample i using ``sets[i]``; smaller ranks are padded with zeros.

        Raises:
            DeltaError: no set, a set that is for several samples, or sets whose targets or shapes differ.
        """
        if not sets:
            raise DeltaError(
                "There is nothing to stack", "Expected at least one set of deltas", "Give one for each sample"
            )
        for i, deltas in enumerate(sets):
            _same_names(set(sets[0]), set(deltas), "the first set")
            if any(tensor.shape[0] != 1 for tensor in deltas.values()):
                raise DeltaError(
                    f"Set {i} is for {deltas.batch} samples",
                    "Expected sets for one sample each",
                    "Use `select`",
                )
        tensors = {}
        for name in sets[0]:
            axis = _rank_axis(name, sets[0][name])
            try:
                rank = max(deltas[name].shape[axis] for deltas in sets)
                tensors[name] = np.concatenate([_pad(deltas[name], axis, rank) for deltas in sets])
            except (ValueError, IndexError):
                raise _shape_error(
                    name, [list(d[name].shape) for d in sets], "equal shapes but for the rank"
                ) from None
        return Deltas(tensors)

    def select(self, sample: int) -> Deltas:
        """The set of one sample, with D = 1.

        Raises:
            DeltaError: there is no such sample.
        """
        if not 0 <= sample < self.batch:
            raise DeltaError(
                f"There is no sample {sample}", f"The set is for {self.batch}", "Choose one of these"
            )
        tensors = {}
        for name, tensor in self.items():
            if tensor.shape[0] not in (1, self.batch):
                raise _shape_error(name, list(tensor.shape), "one D for all tensors")
            tensors[name] = tensor if tensor.shape[0] == 1 else tensor[sample : sample + 1]
        return Deltas(tensors)

    def pad(self, spec: DeltaSpec) -> Deltas:
        """The same deltas with every rank filled up with zeros to the bundle's, which changes nothing."""
        padded = {}
        for name, tensor in self.items():
            wanted = spec.tensors.get(name)
            axis = _rank_axis(name, tensor)
            if wanted is not None and len(wanted) == tensor.ndim - 1:
                tensor = _pad(tensor, axis, wanted[axis - 1])
            padded[name] = tensor
        return Deltas(padded)

    def check(self, spec: DeltaSpec, batch: int | None = None) -> None:
        """Checks that the set is exactly what a bundle takes; pad it first if its rank is smaller.

        Args:
            spec: the manifest's ``deltas``.
            batch: the number of samples; None accepts any.
        Raises:
            DeltaError: a missing, extra, mis-shaped or non-finite tensor, by name.
        """
        _same_names(set(spec.tensors), set(self), "this bundle")
        sizes = {tensor.shape[0] for tensor in self.values()}
        for name, shape in spec.tensors.items():
            if self[name].shape[1:] != shape:
                raise _shape_error(name, list(self[name].shape), f"[D, {', '.join(map(str, shape))}]")
            if not np.isfinite(self[name]).all():
                raise DeltaError(
                    f"Delta {show(name, 200)} has values that are not finite",
                    "Expected finite numbers",
                    "Generate or convert the deltas again",
                )
        if len(sizes) > 1:
            raise DeltaError(
                f"Deltas are for {sorted(sizes)} samples",
                "Expected one D for all tensors",
                "Use `stack` to make a set for a batch",
            )
        if batch is not None and sizes and sizes != {1} and sizes != {batch}:
            raise DeltaError(
                f"The deltas are for {self.batch} samples",
                f"Expected 1 or {batch}",
                "Use `stack` or `select`",
            )


def is_delta_file(path: str | Path) -> bool:
    """Whether ``path`` is a safetensors file that is marked as a delta file; what cannot be read is none."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as stream:
            return "hywu.deltas" in (stream.metadata() or {})
    except Exception:  # safetensors' own exception among others
        return False


def _rank_axis(name: str, tensor: Array) -> int:
    """The axis of the rank: B's last, A's first after D and, where there are any, after the experts."""
    if name.endswith(".lora_B"):
        return tensor.ndim - 1
    return 2 if tensor.ndim == 4 else 1


def _pad(tensor: Array, axis: int, rank: int) -> Array:
    if tensor.shape[axis] >= rank:
        return tensor
    widths = [(0, 0)] * tensor.ndim
    widths[axis] = (0, rank - tensor.shape[axis])
    return np.pad(tensor, widths)


def _to_array(name: str, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    """A tensor as safetensors gives it: dtype word, shape, bytes."""
    if len(entry["shape"]) > 8:  # more than NumPy takes, perhaps
        raise _malformed_shape(name, entry["shape"])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        words = np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16
        return words.view(np.float32).reshape(entry["shape"])
    dtypes = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    if entry["dtype"] not in dtypes:
        raise DeltaError(
            f"Delta {show(name, 200)} has dtype {entry['dtype']}",
            "Expected F32, F16, BF16 or F64",
            "Store it as float32",
        )
    return np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])


def _same_names(expected: set[str], found: set[str], whose: str) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if not missing and not extra:
        return
    parts = [
        f"{what} {_listed(names)}" for what, names in (("lack", missing), ("have the extra", extra)) if names
    ]
    nearest = difflib.get_close_matches(extra[0], missing[:2000], 1, 0.5) if extra and missing else []
    hint = f"; {show(extra[0], 120)} is nearest to {show(nearest[0], 120)}" if nearest else ""
    raise DeltaError(
        f"The deltas {' and '.join(parts)}",
        f"Expected the {len(expected)} tensors of {whose}, of which {len(expected & found)} are there{hint}",
        "Use deltas that were made for this model and its targets",
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(show(name, 200) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def _malformed_shape(name: str, shape: Sequence[int]) -> DeltaError:
    return DeltaError(
        f"Delta {show(name)} has shape {list(shape)}",
        "Expected [D, …] with 3 to 8 axes, none empty",
        "Add the leading axis D = 1 if it is missing",
    )


def _shape_error(name: str, found: object, expected: str) -> DeltaError:
    return DeltaError(
        f"Delta {show(name, 200)} has shape {found}",
        f"Expected {expected}",
        "Use deltas that were made for this model and its targets",
    )
