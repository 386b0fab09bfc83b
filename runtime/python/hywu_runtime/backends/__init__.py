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
    from hywu_runtime.engines import Target

COMPILED = ("tensorrt", "tensorrt-rtx")
ORDER = (*COMPILED, "ort-cuda", "ort-cpu")
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
    """A graph with its inputs and outputs bound, or several as one unit."""

    def run(self) -> None:
        """Runs the graph, or queues it: whatever the backend is asked to do afterwards sees its outputs."""


class Mark(Protocol):
    """A point in a backend's work."""

    def since(self, earlier: Any) -> float:
        """Seconds from an earlier mark; both lie before a `wait`."""


class Session(Protocol):
    """A loaded graph."""

    def bind(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> Binding:
        """Binds every input and output by the graph's names."""


class Backend(Protocol):
    """Runs graphs on one device."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> Target | None:
        """What engines must have been built for; None where ONNX graphs run as they are."""

    @property
    def copies_states(self) -> bool:
        """Whether a carried state stays in one buffer, into which each step's result is copied; otherwise the
        steps write two buffers in turn."""

    def load(self, file: Path, weights: Mapping[str, Weight], stage: int = 0) -> Session:
        """Loads a graph, or a plan of it; ``weights`` are its linked initializers.

        A backend that can use several devices runs stage k on the k-th from its own on, if there is one.
        """

    def allocate(self, shape: Sequence[int], dtype: str) -> DeviceTensor:
        """A new buffer of zeros."""

    def sequence(self, bindings: Sequence[Any], copies: Sequence[tuple[Any, Any]]) -> Binding:
        """Bindings of this backend as one unit, and copies (source, target) of its tensors after them."""

    def enter(self) -> None:
        """Called by a thread before it uses the backend."""

    def mark(self) -> Mark:
        """A mark after what was asked for so far."""

    def wait(self) -> None:
        """Until all is done that was asked for. Raises what went wrong with it."""


def available_backends(device: int = 0) -> dict[str, str | None]:
    """Every backend, best first, with the reason why it cannot be used here, or None."""
    from hywu_runtime.backends import onnxruntime, tensorrt

    reasons = {name: tensorrt.missing(name, device) for name in COMPILED}
    return reasons | {name: onnxruntime.missing(name) for name in ORDER if name not in COMPILED}


def create_backend(name: str = "auto", device: int | None = None, threads: int | None = None) -> Backend:
    """The backend called ``name``, or with ``auto`` the best that runs ONNX graphs as they are.

    Args:
        name: ``auto`` or one of ``ORDER``.
        device: index of the GPU; None is the first.
        threads: CPU threads for a graph; None leaves it to the backend.
    Raises:
        DeviceError: it is not there.
        InputError: there is no such backend.
    """
    from hywu_runtime.backends import onnxruntime, tensorrt

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
    if name == "auto":
        reasons = {plain: onnxruntime.missing(plain) for plain in ORDER if plain not in COMPILED}
        usable = [candidate for candidate, reason in reasons.items() if reason is None]
        if not usable:
            raise DeviceError(
                "No backend can be used",
                "; ".join(f"{n}: {r}" for n, r in reasons.items()),
                "Install onnxruntime",
            )
        name = usable[0]
        _log.info("backend %s chosen among %s", name, ", ".join(usable))
    elif name in COMPILED:
        reason = tensorrt.missing(name, device or 0)
        if reason is not None:
            raise DeviceError(
                f"Backend {name} cannot be used: {reason}",
                f"Expected an NVIDIA GPU with its driver, {name.replace('-', '_')} and cuda-python",
                _instead(name),
            )
        return tensorrt.TensorRt(name, device or 0)
    elif (reason := onnxruntime.missing(name)) is not None:
        raise DeviceError(
            f"Backend {name} cannot be used: {reason}",
            f"Usable here: {', '.join(_usable()) or 'none'}",
            'Choose one of these, or backend="auto"',
        )
    return onnxruntime.OnnxRuntime(name, device or 0, threads)


def _usable() -> list[str]:
    return [name for name, reason in available_backends().items() if reason is None]


def _instead(name: str) -> str:
    """What to do where a backend of engines cannot be used."""
    other = [candidate for candidate in _usable() if candidate != name]
    plain = other[-1] if other else None
    return f"Use --backend {plain}, which works here" if plain else "See `hywu doctor`"
