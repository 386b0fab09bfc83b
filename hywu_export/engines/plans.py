"""The first bytes of a plan file: whether it is one, is whole, and who made it.

The layout is not documented; it was read off plans of TensorRT-RTX. What is not recognised says nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from hywu_export.engines.devices import RTX_CAPABILITIES

_HEADER = struct.Struct("<4s4xI4xQ4B4sI")
_MAGIC = {b"vtrt": "tensorrt-rtx", b"ftrt": "tensorrt"}
_ANY = 1 << 6  # of the bits of compute capabilities: later ones too


@dataclass(frozen=True)
class PlanHeader:
    """What the header says. ``size`` and ``version`` are None where the layout is another.

    Attributes:
        backend: who made it.
        size: bytes that the file should have.
        version: of the backend, four numbers.
        compute_capabilities: of TensorRT-RTX: the GPUs that it was made for.
    """

    backend: str
    size: int | None
    version: str | None
    compute_capabilities: tuple[str, ...]


def read_header(path: Path) -> PlanHeader | None:
    """The header of a plan file; None if it is no plan."""
    with path.open("rb") as file:
        data = file.read(_HEADER.size)
    backend = _MAGIC.get(data[:4])
    if backend is None:
        return None
    if len(data) < _HEADER.size:
        return PlanHeader(backend, None, None, ())
    magic, _, size, *numbers, again, bits = _HEADER.unpack(data)
    if backend != "tensorrt-rtx" or again != magic:
        return PlanHeader(backend, None, None, ())
    found = tuple(c for n, c in enumerate(RTX_CAPABILITIES) if bits & 1 << n)
    return PlanHeader(backend, size, ".".join(map(str, numbers)), found if not bits & _ANY else ())
