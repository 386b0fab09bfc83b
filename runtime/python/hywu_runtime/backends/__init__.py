"""What runs graphs.

A backend loads graphs and makes device tensors; a session binds tensors to a graph's inputs and outputs once,
and the binding runs as often as it is asked. Addresses never change while a binding lives, so a
device may capture it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from hywu_runtime.codec import show
from hywu_runtime.errors import DeviceError, InputError

if TYPE_CHECKING:
    from hywu_runtime.bundle import Weight

ORDER = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu")
_log = logging.getLogger(__name__)


class DeviceTensor(Protocol):
    """A buffer of fixed shape, dtype and address on the backend's device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def write(self, array: npt.NDArray[Any]) -> None:
        """Copies an array of exactly this shape and dtype to the device."""

    def read(self) -> npt.NDArray[Any]:
        """A copy on the host."""

    def wipe(self) -> None:
        """Fills the buffer with zeros."""

    def finite(self) -> bool | None:
        """Whether all numbers are finite; None where looking would take a copy to the host."""


class Binding(Protocol):
    """A graph with its inputs and outputs bound."""

    def run(self) -> None:
        """Runs the graph; returns when the outputs are there."""


class Session(Protocol):
    """A loaded graph."""

    def bind(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> Binding:
        """Binds every input and output by the graph's names."""


class Backend(Protocol):
    """Runs graphs on one device."""

    @property
    def name(self) -> str: ...

    def load(self, file: Path, weights: Mapping[str, Weight]) -> Session:
        """Loads a graph; ``weights`` are its linked initializers."""

    def allocate(self, shape: Sequence[int], dtype: str) -> DeviceTensor:
        """A new buffer of zeros."""


def available_backends() -> dict[str, str | None]:
    """Every backend, best first, with the reason why it cannot be used here, or None."""
    from hywu_runtime.backends.onnxruntime import missing

    reasons: dict[str, str | None] = {name: missing(name) for name in ("ort-cuda", "ort-cpu")}
    later = "this version of hywu_runtime runs ONNX Runtime only"
    return {name: reasons.get(name, later) for name in ORDER}


def create_backend(name: str = "auto", device: int | None = None, threads: int | None = None) -> Backend:
    """The backend called ``name``, or with ``auto`` the best that is there.

    Args:
        name: ``auto`` or one of ``ORDER``.
        device: index of the GPU; None is the first.
        threads: CPU threads for a graph; None leaves it to the backend.
    Raises:
        DeviceError: it is not there.
        InputError: there is no such backend.
    """
    from hywu_runtime.backends.onnxruntime import OnnxRuntime

    if name != "auto" and name not in ORDER:
        raise InputError(
            f"There is no backend {show(name)}",
            f"Expected auto or one of {', '.join(ORDER)}",
            "Choose one of these",
        )
    for label, number, least in (("threads", threads, 1), ("device", device, 0)):
        if number is not None and (
            isinstance(number, bool) or not isinstance(number, int) or not least <= number <= 4096
        ):
            raise InputError(
                f"`{label}` is {show(number)}",
                f"Expected an integer from {least} to 4096, or None",
                "Correct it",
            )
    backends = available_backends()
    if name == "auto":
        usable = [candidate for candidate, reason in backends.items() if reason is None]
        if not usable:
            raise DeviceError(
                "No backend can be used",
                "; ".join(f"{n}: {r}" for n, r in backends.items()),
                "Install onnxruntime",
            )
        name = usable[0]
        _log.info("backend %s chosen among %s", name, ", ".join(usable))
    elif backends[name] is not None:
        usable = [candidate for candidate, reason in backends.items() if reason is None]
        raise DeviceError(
            f"Backend {name} cannot be used: {backends[name]}",
            f"Usable here: {', '.join(usable) or 'none'}",
            'Choose one of these, or backend="auto"',
        )
    return OnnxRuntime(name, device or 0, threads)
