"""CUDA through cuda-python: memory, one stream, events and captured graphs. Nothing else touches the driver.

The module is ``cuda.bindings.runtime`` since cuda-python 12.8, and ``cuda.cudart`` before (JetPack 6).
"""

from __future__ import annotations

import contextlib
import importlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hywu_runtime.errors import DeviceError, EngineError, HywuError

ALIGNMENT = 256  # bytes; what TensorRT asks of an address
PINNED = 16 * 2**20  # larger arrays are written from pageable memory, which waits for the copy
_MODULES = ("cuda.bindings.runtime", "cuda.cudart")
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_BROKEN = range(700, 720)  # illegal address, launch failure, …: the process can use the GPU no more


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine: its name and its compute capability, as ``8.6``."""

    name: str
    capability: str


def runtime() -> Any:
    """The module of the CUDA runtime. Raises ImportError where neither name can be imported."""
    try:
        return importlib.import_module(_MODULES[0])
    except ImportError as error:
        try:
            return importlib.import_module(_MODULES[1])
        except ImportError:
            raise error from None


def version() -> str:
    """The version of the CUDA runtime inside cuda-python, as ``13.0``; raises ImportError."""
    code, number = runtime().cudaRuntimeGetVersion()
    return "of unknown version" if int(code) else f"{number // 1000}.{number % 1000 // 10}"


def find_gpu(device: int = 0) -> Gpu:
    """GPU number ``device``.

    Raises:
        DeviceError: there is no driver, or no such GPU.
    """
    cuda = runtime()
    code, count = cuda.cudaGetDeviceCount()
    if int(code) or not count:
        found = _words(cuda, code) if int(code) else "the driver finds none"
        if cuda.cudaDriverGetVersion() == (0, 0):
            found = f"no NVIDIA driver is installed ({found})"
        raise DeviceError(
            f"No GPU can be used: {found}",
            "Expected an NVIDIA GPU with its driver",
            "Check `nvidia-smi`, or use --backend ort-cpu",
        )
    if device >= count:
        raise DeviceError(
            f"There is no GPU {device}", f"Expected a number below {count}", "Choose another `device`"
        )
    attributes = cuda.cudaDeviceAttr
    numbers = []
    for attribute in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        code, number = cuda.cudaDeviceGetAttribute(getattr(attributes, attribute), device)
        _check(cuda, code, "its compute capability cannot be read")
        numbers.append(number)
    code, properties = cuda.cudaGetDeviceProperties(device)
    _check(cuda, code, "its name cannot be read")
    name = properties.name
    name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return Gpu(name.rstrip("\0"), f"{numbers[0]}.{numbers[1]}")


class Stream:
    """The one stream of a backend. Work is queued; it is done, and its errors are raised, in :meth:`wait`."""

    def __init__(self, device: int = 0):
        """Raises DeviceError where the GPU cannot be used."""
        self.cuda = runtime()
        self.call("the GPU cannot be chosen", self.cuda.cudaSetDevice, device)
        self.device = device
        self.handle = int(
            self.call(
                "no stream can be made", self.cuda.cudaStreamCreateWithFlags, self.cuda.cudaStreamNonBlocking
            )
        )

    def call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls the CUDA runtime. ``what`` is said to be wrong if it fails.

        Raises:
            DeviceError: memory ran out, or the GPU does not answer.
            EngineError: what ran before has failed.
        """
        code, *results = function(*arguments)
        _check(self.cuda, code, what)
        return results[0] if results else None

    def enter(self) -> None:
        """Makes the GPU that of the calling thread."""
        self.call("the GPU cannot be chosen", self.cuda.cudaSetDevice, self.device)

    def wait(self) -> None:
        """Until all that was queued is done."""
        self.call("the graphs that were running failed", self.cuda.cudaStreamSynchronize, self.handle)

    def allocate(self, size: int) -> Memory:
        """``size`` bytes on the GPU."""
        return Memory(self, size)

    def copy(self, target: int, source: int, size: int, kind: str) -> None:
        """Queues a copy; ``kind`` is ``HostToDevice``, ``DeviceToHost`` or ``DeviceToDevice``."""
        direction = getattr(self.cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self.call(
            "a copy cannot be made", self.cuda.cudaMemcpyAsync, target, source, size, direction, self.handle
        )

    def fill(self, target: int, size: int) -> None:
        """Queues a fill with zeros."""
        self.call("memory cannot be wiped", self.cuda.cudaMemsetAsync, target, 0, size, self.handle)

    def capture(self, work: Callable[[], object]) -> CapturedGraph:
        """What ``work`` queues, as a graph that can be launched; nothing of it is run.

        Raises:
            EngineError: it does something that cannot be captured.
        """
        what = "the step cannot be captured"
        mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call(what, self.cuda.cudaStreamBeginCapture, self.handle, mode)
        try:
            work()
        except BaseException:
            code, graph = self.cuda.cudaStreamEndCapture(self.handle)  # the stream must leave the capture
            if not int(code) and graph is not None:
                self.cuda.cudaGraphDestroy(graph)
            raise
        graph = self.call(what, self.cuda.cudaStreamEndCapture, self.handle)
        try:
            return CapturedGraph(self, self.call(what, self.cuda.cudaGraphInstantiate, graph, 0))
        finally:
            self.cuda.cudaGraphDestroy(graph)


class Memory:
    """Bytes on the GPU at a fixed address, a multiple of 256; freed with the object."""

    def __init__(self, stream: Stream, size: int):
        self.size = size
        self.address = int(stream.call(
            f"there is no memory for {size} bytes on the GPU", stream.cuda.cudaMalloc, max(size, 1)
        ))  # fmt: skip
        self.free = weakref.finalize(self, stream.cuda.cudaFree, self.address)
        if self.address % ALIGNMENT:
            raise DeviceError(
                f"The driver gave memory at {self.address:#x}",
                f"Expected a multiple of {ALIGNMENT}, which TensorRT needs",
                "Update the driver",
            )


class CapturedGraph:
    """A captured graph, ready to be launched."""

    def __init__(self, stream: Stream, executable: Any):
        self._stream, self._executable = stream, executable
        weakref.finalize(self, stream.cuda.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        """Queues it."""
        cuda = self._stream.cuda
        self._stream.call(
            "the step cannot be launched", cuda.cudaGraphLaunch, self._executable, self._stream.handle
        )


class Event:
    """A point in the queue."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._event = stream.call("no event can be made", stream.cuda.cudaEventCreate)
        weakref.finalize(self, stream.cuda.cudaEventDestroy, self._event)

    def record(self) -> None:
        """Puts it after what is queued now."""
        stream = self._stream
        stream.call("an event cannot be recorded", stream.cuda.cudaEventRecord, self._event, stream.handle)

    def wait(self) -> None:
        """Until the queue has come to it."""
        stream = self._stream
        stream.call("the graphs that were running failed", stream.cuda.cudaEventSynchronize, self._event)

    def since(self, earlier: Event) -> float:
        """Seconds of the GPU from an earlier event to this one; both must have been reached."""
        cuda = self._stream.cuda
        milliseconds = self._stream.call(
            "a time cannot be read", cuda.cudaEventElapsedTime, earlier._event, self._event
        )
        return float(milliseconds) / 1000


class CudaTensor:
    """See :class:`hywu_runtime.backends.DeviceTensor`. Writes are queued; small ones from pinned memory."""

    def __init__(self, stream: Stream, shape: Sequence[int], dtype: str):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._stream = stream
        self._size = math.prod(self.shape) * self.dtype.itemsize
        try:
            self._memory = stream.allocate(self._size)
        except DeviceError as error:
            raise DeviceError(
                f"There is no memory for a tensor {dtype} {list(shape)}: {error.wrong}",
                error.expected,
                error.remedy,
            ) from None
        self._staging: _Pinned | None = None
        stream.fill(self.address, self._size)

    @property
    def address(self) -> int:
        return self._memory.address

    def write(self, array: npt.NDArray[Any]) -> None:
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"{array.dtype} {array.shape} written to {self.dtype} {self.shape}")
        if self._size > PINNED:
            source = np.ascontiguousarray(array)
            self._stream.copy(self.address, source.ctypes.data, self._size, "HostToDevice")
            self._stream.wait()  # `source` may go
            return
        if self._staging is None:
            self._staging = _Pinned(self._stream, self._size)
        self._staging.copied.wait()  # the last write may still be queued
        self._staging.view[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._stream.copy(self.address, self._staging.address, self._size, "HostToDevice")
        self._staging.copied.record()

    def read(self) -> npt.NDArray[Any]:
        host = np.empty(self.shape, self.dtype)
        self._stream.copy(host.ctypes.data, self.address, self._size, "DeviceToHost")
        self._stream.wait()
        return host

    def wipe(self) -> None:
        self._stream.fill(self.address, self._size)
        if self._staging is not None:
            self._staging.copied.wait()
            self._staging.view.fill(0)

    def copy_from(self, other: CudaTensor) -> None:
        """Queues a copy of a tensor of the same size, on the device."""
        self._stream.copy(self.address, other.address, self._size, "DeviceToDevice")

    def finite(self) -> bool | None:
        """None: there is no looking without a kernel of our own or a copy to the host."""
        return None


class _Pinned:
    """Page-locked memory of the host, and the event after the last copy from it."""

    def __init__(self, stream: Stream, size: int):
        import ctypes

        self.address = int(stream.call("there is no pinned memory", stream.cuda.cudaMallocHost, max(size, 1)))
        weakref.finalize(self, stream.cuda.cudaFreeHost, self.address)
        memory: Any = (ctypes.c_uint8 * size).from_address(self.address)
        self.view = np.frombuffer(memory, np.uint8)
        self.copied = Event(stream)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Passes over an error of the device where another one is being raised already."""
    with contextlib.suppress(HywuError):
        yield


def _check(cuda: Any, code: Any, what: str) -> None:
    number = int(code)
    if number == 0:
        return
    with contextlib.suppress(Exception):
        cuda.cudaGetLastError()  # or the next call would report it again
    words = f"{what[0].upper()}{what[1:]}: {_words(cuda, code)}"
    if number == _OUT_OF_MEMORY:
        raise DeviceError(
            words,
            "Expected the graphs and buffers to fit",
            "Use a smaller size or batch, low_memory=True, or free memory of the GPU",
        )
    if number in _BROKEN:
        remedy = "Start the process again; if it happens again, build the engine again"
        raise EngineError(words, "Expected the graphs to run", remedy)
    raise DeviceError(words, "Expected a GPU that answers", "Check `nvidia-smi` and `hywu doctor`")


def _words(cuda: Any, code: Any) -> str:
    failed, text = cuda.cudaGetErrorString(code)
    text = "" if int(failed) else text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return f"CUDA error {int(code)}, {text}"
