"""TensorRT and TensorRT-RTX: compiled graphs on buffers that never move.

Deltas, like all tensors, are written by one graph where the next one reads them. Work is queued on one
stream; the calls of a step are captured in one CUDA graph, which serves all steps of all requests of the
same sizes.
"""

from __future__ import annotations

import importlib
import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hywu_runtime.backends import cuda
from hywu_runtime.codec import show
from hywu_runtime.engines import Target
from hywu_runtime.errors import DeviceError, EngineError, HywuError, InputError
from hywu_runtime.files import write_atomically

if TYPE_CHECKING:
    from hywu_runtime.backends import DeviceTensor
    from hywu_runtime.bundle import Weight

CACHE_NAME = "runtime.cache"
_DTYPES = {"UINT8": "uint8", "INT32": "int32", "INT64": "int64", "HALF": "float16", "FLOAT": "float32"}
_NOT_RTX = ("8.7", "9.0", "10.0", "10.1", "10.3", "11.0")  # compute capabilities that TensorRT-RTX leaves out
_NO_GPU = ("cudaError 35", "driver version is insufficient", "no CUDA-capable")  # in what TensorRT logs
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Library:
    module: str
    label: str
    extra: str


_LIBRARIES = {
    "tensorrt": _Library("tensorrt", "TensorRT", "tensorrt"),
    "tensorrt-rtx": _Library("tensorrt_rtx", "TensorRT-RTX", "rtx"),
}


def missing(name: str, device: int = 0) -> str | None:
    """Why ``tensorrt`` or ``tensorrt-rtx`` cannot be used, or None. Says what was found."""
    library = _LIBRARIES[name]
    install = f"pip install 'hywu-export[{library.extra},cuda]'"
    try:
        found = f"{library.label} {importlib.import_module(library.module).__version__}"
    except (ImportError, OSError, RuntimeError) as error:  # the last two where libraries are missing
        return f"{library.label} cannot be imported ({_one_line(error)}): {install}"
    try:
        found += f" and CUDA runtime {cuda.version()} are installed"
    except (ImportError, OSError, RuntimeError) as error:
        return f"{found} is installed, cuda-python cannot be imported ({_one_line(error)}): {install}"
    try:
        gpu = cuda.find_gpu(device)
    except DeviceError as error:
        return f"{found}, but {error.wrong[0].lower()}{error.wrong[1:]}"
    if name == "tensorrt-rtx" and gpu.capability in _NOT_RTX:
        return f"{found}, but {gpu.name} has compute capability {gpu.capability}, on which it does not run"
    return None


class TensorRt:
    """The backends ``tensorrt`` and ``tensorrt-rtx``. One device, one stream, one block of scratch memory."""

    copies_states = True  # so that one captured graph serves the first, the odd and the even steps

    def __init__(self, name: str, device: int = 0):
        """Raises DeviceError where the GPU cannot be used."""
        self.name = name
        self.label = _LIBRARIES[name].label
        self._trt = importlib.import_module(_LIBRARIES[name].module)
        gpu = cuda.find_gpu(device)
        self.target = Target(name, str(self._trt.__version__), gpu.capability, gpu.name)
        self.stream = cuda.Stream(device)
        self.log = _make_log(self._trt)
        self._runtime = self._trt.Runtime(self.log)
        if self._runtime is None:
            self.fail(DeviceError, f"{self.label} cannot be started", "a driver that suits it", "Update it")
        self._scratch: cuda.Memory | None = None
        self._caches: dict[Path, _RuntimeCache] = {}

    def allocate(self, shape: Sequence[int], dtype: str) -> cuda.CudaTensor:
        """See :class:`hywu_runtime.backends.Backend`. Raises DeviceError where there is no memory."""
        return cuda.CudaTensor(self.stream, shape, dtype)

    def load(self, file: Path, weights: Mapping[str, Weight], stage: int = 0) -> TensorRtSession:
        """Loads a plan file; linked weights are inside it already.

        Raises:
            EngineError: it is damaged, or of another version or GPU.
            DeviceError: the GPU cannot be used, or has no memory left.
        """
        self.log.messages.clear()
        engine = None
        try:
            with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                engine = self._runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:
            self.log.messages.append(_one_line(error))
        if engine is None:
            self.fail(
                EngineError,
                f"The plan {file.parent.name}/{file.name} cannot be loaded",
                f"a whole plan of {self.label} {self.target.version} for a GPU of {self.target.capability}",
                "Build the engine again with `hywu build`",
            )
        return TensorRtSession(self, engine, file)

    def sequence(
        self, bindings: Sequence[TensorRtBinding], copies: Sequence[tuple[cuda.CudaTensor, cuda.CudaTensor]]
    ) -> _Sequence:
        """See :class:`hywu_runtime.backends.Backend`."""
        return _Sequence(self, tuple(bindings), tuple(copies))

    def enter(self) -> None:
        self.stream.enter()

    def mark(self) -> cuda.Event:
        event = cuda.Event(self.stream)
        event.record()
        return event

    def wait(self) -> None:
        """Waits for the stream, and keeps what TensorRT-RTX has compiled meanwhile."""
        self.stream.wait()
        for cache in self._caches.values():
            cache.save()

    def make_context(self, engine: Any, file: Path) -> Any:
        """An execution context whose scratch memory is ours to give."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.log.messages.clear()
        if self.name == "tensorrt-rtx":
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # A captured graph keeps the kernels that it saw, so they must be the specialised ones.
            kinds = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
            path = file.parent / CACHE_NAME
            if path not in self._caches:
                self._caches[path] = _RuntimeCache(path, config)
            self._caches[path].give(config)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(strategy)
        if context is None:
            self.fail(
                EngineError, f"{file.name} cannot be prepared", "memory for it", "Use a smaller size or batch"
            )
        return context

    def scratch(self, size: int) -> cuda.Memory:
        """A block of at least ``size`` bytes. Graphs run one after another, so they share the largest one."""
        if self._scratch is None or self._scratch.size < size:
            self._scratch = self.stream.allocate(size)  # who has the smaller one keeps it
        return self._scratch

    def fail(self, kind: type[HywuError], wrong: str, expected: str, remedy: str) -> NoReturn:
        """Raises an error with what TensorRT has logged; DeviceError if it was the GPU's fault."""
        logged = self.log.messages[0] if self.log.messages else ""
        words = " ".join(self.log.messages)
        if any(sign in words for sign in _NO_GPU):
            kind, expected = DeviceError, "an NVIDIA GPU with a driver that suits this version"
            remedy = "Update the driver, or use --backend ort-cpu"
            logged = next(m for m in self.log.messages if "CUDA" in m or "cudaError" in m)
        elif "out of memory" in words.lower() or "OutOfMemory" in words:
            kind, expected = DeviceError, "the graphs to fit the GPU's memory"
            remedy = "Use a smaller size or batch, or low_memory=True"
        raise kind(f"{wrong}: {show(logged, 300)[1:-1]}" if logged else wrong, f"Expected {expected}", remedy)


class TensorRtSession:
    """A plan that was loaded."""

    def __init__(self, backend: TensorRt, engine: Any, file: Path):
        self._backend, self._engine, self._file = backend, engine, file

    def bind(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> TensorRtBinding:
        """See :class:`hywu_runtime.backends.Session`.

        Raises:
            EngineError: the plan is not what the manifest says, or refuses an address.
            InputError: it was not built for these sizes.
        """
        backend, engine = self._backend, self._engine
        self._check_signature(inputs, outputs)
        context = backend.make_context(engine, self._file)
        tensors = {**inputs, **outputs}
        for name, tensor in inputs.items():
            if -1 in engine.get_tensor_shape(name) and not context.set_input_shape(name, tensor.shape):
                low, _, high = (list(shape) for shape in engine.get_tensor_profile_shape(name, 0))
                raise InputError(
                    f"{self._file.name} does not take {show(name)} of shape {list(tensor.shape)}",
                    f"It was built for {low} to {high}",
                    "Use a size within it, or build an engine with other `--shapes` and `--batch`",
                )
        for name, tensor in tensors.items():
            address = getattr(tensor, "address", None)
            if (
                not isinstance(address, int)
                or address % cuda.ALIGNMENT
                or not context.set_tensor_address(name, address)
                or context.get_tensor_address(name) != address
            ):
                raise EngineError(
                    f"{self._file.name} does not take address {address} for {show(name)}",
                    f"Expected memory of the GPU at a multiple of {cuda.ALIGNMENT}",
                    "Use buffers of this backend",
                )
        unknown = context.infer_shapes()
        wrong = [name for name in outputs if tuple(context.get_tensor_shape(name)) != outputs[name].shape]
        if unknown or wrong:
            name = [*unknown, *wrong][0]
            self._mismatch(name, list(context.get_tensor_shape(name)), tensors.get(name))
        size = context.update_device_memory_size_for_shapes()
        scratch = backend.scratch(size) if size else None
        if scratch is not None:
            context.set_device_memory(scratch.address, scratch.size)
        return TensorRtBinding(backend, context, self._file.name, (self, tensors, scratch))

    def _check_signature(
        self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]
    ) -> None:
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {name: engine.get_tensor_mode(name).name for name in names}
        for mode, given in (("INPUT", inputs), ("OUTPUT", outputs)):
            own = {name for name in names if found[name] == mode}
            for name in sorted(own | given.keys()):
                if name not in own or name not in given:
                    self._mismatch(name, "nothing" if name not in own else mode.lower(), given.get(name))
                shape, dtype = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name).name
                tensor = given[name]
                fits = len(shape) == len(tensor.shape) and all(
                    a in (-1, b) for a, b in zip(shape, tensor.shape)
                )
                on_device = engine.get_tensor_location(name).name == "DEVICE"
                if not fits or not on_device or _DTYPES.get(dtype) != tensor.dtype.name:
                    where = "" if on_device else " in host memory"
                    self._mismatch(name, f"{dtype} {list(shape)}{where}", tensor)

    def _mismatch(self, name: str, found: object, tensor: DeviceTensor | None) -> NoReturn:
        said = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise EngineError(
            f"{self._file.name} has for {show(name)}: {found}",
            f"The manifest says {said}",
            "Build the engine again with `hywu build`",
        )


class TensorRtBinding:
    """An execution context with its addresses; holds tensors and scratch memory alive."""

    def __init__(self, backend: TensorRt, context: Any, label: str, held: object):
        self._backend, self.context, self._label = backend, context, label
        self._held = held

    def run(self) -> None:
        """Queues the graph."""
        self._backend.log.messages.clear()
        if not self.context.execute_async_v3(self._backend.stream.handle):
            self._backend.fail(
                EngineError,
                f"Graph {self._label} failed",
                "it to run",
                "Build the engine again with `hywu build`",
            )


class _Sequence:
    """The calls of one step, and copies after them. Captured when it runs for the second time.

    The first time TensorRT may still allocate and compile, which cannot be captured.
    """

    def __init__(
        self,
        backend: TensorRt,
        bindings: tuple[TensorRtBinding, ...],
        copies: tuple[tuple[cuda.CudaTensor, cuda.CudaTensor], ...],
    ):
        self._backend, self._bindings, self._copies = backend, bindings, copies
        self._graph: cuda.CapturedGraph | None = None
        self._warm = False
        self._capture = bool(bindings)

    def run(self) -> None:
        if self._capture and self._warm:
            self._capture = False
            self._graph = self._captured()
        if self._graph is not None:
            self._graph.launch()
        else:
            self._queue()
            self._warm = True

    def _queue(self) -> None:
        for binding in self._bindings:
            binding.run()
        for source, target in self._copies:
            target.copy_from(source)

    def _captured(self) -> cuda.CapturedGraph | None:
        """The step as one graph; None where it cannot be captured, which is slower and no error."""
        stream = self._backend.stream
        try:
            for binding in self._bindings:
                capturable = getattr(binding.context, "is_stream_capturable", None)
                if capturable is not None and not capturable(stream.handle):
                    raise EngineError("a graph of it does not allow it")
            return stream.capture(self._queue)
        except (EngineError, DeviceError) as error:
            _log.warning("the step is queued graph by graph, not captured: %s", error.wrong)
            return None


class _RuntimeCache:
    """What TensorRT-RTX compiled for this GPU, beside the engine: read if it is there, written when it grew.

    It makes the next start faster and nothing else, so that whatever goes wrong with it is only logged.
    """

    def __init__(self, path: Path, config: Any):
        self._path = path
        self._cache = config.create_runtime_cache()
        self._stored = b""
        self._grown = False
        try:
            data = path.read_bytes()
            if data and self._cache.deserialize(data):
                self._stored = data
            else:
                _log.info("%s is not for this GPU and version, and is made anew", path)
        except FileNotFoundError:
            pass
        except Exception as error:
            _log.info("%s cannot be read: %s", path, error)

    def give(self, config: Any) -> None:
        """Lets a context that is made with ``config`` use it."""
        config.set_runtime_cache(self._cache)
        self._grown = True

    def save(self) -> None:
        """Writes it if there may be something new in it."""
        if not self._grown:
            return
        self._grown = False
        try:
            data = bytes(self._cache.serialize())
            if data != self._stored:
                write_atomically(self._path, lambda file: file.write(data))
                self._stored = data
        except Exception as error:
            _log.info("%s cannot be written: %s", self._path, error)


def _make_log(trt: Any) -> Any:
    """A logger of TensorRT's kind that passes on to :mod:`logging` and keeps errors for messages."""

    class Log(trt.ILogger):  # type: ignore[misc]  # its base is known when the library is
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.messages.append(" ".join(message.split()))
                del self.messages[:-20]
                _log.debug("TensorRT: %s", message)
            elif severity == trt.ILogger.Severity.WARNING:
                _log.debug("TensorRT: %s", message)

    return Log()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
