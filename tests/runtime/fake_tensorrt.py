"""Stand-ins for CUDA and TensorRT: host memory is the GPU's, ONNX Runtime is what runs a plan.

They are as unforgiving as the real ones. Nothing that is queued on the stream happens before somebody waits
for it, so that a buffer that is reused too early shows; addresses must be allocated ones, and multiples of
256; what has not run once cannot be captured; scratch memory is overwritten by whoever runs.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from hywu_export.bundle import BundleAddition
from hywu_runtime.manifest import Engine, Manifest

GPU, CAPABILITY = "Made-up GPU", "8.9"
VERSIONS = {"tensorrt": "10.3.0", "tensorrt-rtx": "1.7.1.116"}
SCRATCH = 1000  # bytes that every context asks for
ERRORS = {
    1: "invalid argument",
    2: "out of memory",
    35: "CUDA driver version is insufficient for CUDA runtime version",
    100: "no CUDA-capable device is detected",
    700: "an illegal memory access was encountered",
    900: "operation not permitted when stream is capturing",
}


class Cuda(types.ModuleType):
    """``cuda.bindings.runtime``. ``failing``: function name to the error that it gives from now on."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )

    def __init__(self) -> None:
        super().__init__("cuda.bindings.runtime")
        self.failing: dict[str, int] = {}
        self.capability = CAPABILITY
        self.blocks: dict[int, tuple[Any, int]] = {}  # device memory: address to (owner, size)
        self.pinned: dict[int, Any] = {}
        self.misaligned = False
        self.queue: list[Callable[[], object]] = []
        self.recording: list[Callable[[], object]] | None = None
        self.captures = self.launches = 0
        self.broken = 0  # the sticky error of work that failed
        self._handles = itertools.count(7000)
        self._events: dict[int, Any] = {}
        self._graphs: dict[int, list[Callable[[], object]]] = {}
        self.to_device: list[int] = []  # sizes of copies from the host

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("cuda") and callable(value) and name in self.failing:
            code = self.failing[name]
            return lambda *_: (code, None)
        return value

    # devices
    def cudaGetDeviceCount(self) -> Any:
        return 0, 1

    def cudaDriverGetVersion(self) -> Any:
        return 0, 13000

    def cudaRuntimeGetVersion(self) -> Any:
        return 0, 13050

    def cudaDeviceGetAttribute(self, attribute: int, _: int) -> Any:
        return 0, int(self.capability.split(".")[attribute - 75])

    def cudaGetDeviceProperties(self, _: int) -> Any:
        return 0, SimpleNamespace(name=GPU.encode() + b"\0\0")

    def cudaSetDevice(self, _: int) -> Any:
        return (0,)

    def cudaGetErrorString(self, code: int) -> Any:
        return 0, ERRORS[code].encode()

    def cudaGetLastError(self) -> Any:
        return (0,)

    # memory
    def cudaMalloc(self, size: int) -> Any:
        owner = np.full(size + 512, 0xAB, np.uint8)
        address = (owner.ctypes.data + 255) // 256 * 256 + (16 if self.misaligned else 0)
        self.blocks[address] = (owner, size)
        return 0, address

    def cudaFree(self, address: int) -> Any:
        self._drain()
        del self.blocks[address]
        return (0,)

    def cudaMallocHost(self, size: int) -> Any:
        owner = np.zeros(size, np.uint8)
        self.pinned[owner.ctypes.data] = owner
        return 0, owner.ctypes.data

    def cudaFreeHost(self, address: int) -> Any:
        self._drain()
        del self.pinned[address]
        return (0,)

    def holds(self, address: int, size: int) -> bool:
        """Whether bytes lie in device memory that is allocated."""
        return any(a <= address and address + size <= a + s for a, (_, s) in self.blocks.items())

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, _: int) -> Any:
        device = {1: [target], 2: [source], 3: [target, source]}[kind]
        if not all(self.holds(address, size) for address in device):
            return (1,)
        if kind == 1:
            self.to_device.append(size)
        return self._put(lambda: ctypes.memmove(target, source, size))

    def cudaMemsetAsync(self, target: int, value: int, size: int, _: int) -> Any:
        if not self.holds(target, size):
            return (1,)
        return self._put(lambda: ctypes.memset(target, value, size))

    # the stream
    def _put(self, work: Callable[[], object]) -> Any:
        (self.queue if self.recording is None else self.recording).append(work)
        return (0,)

    def _drain(self, until: int | None = None) -> None:
        while self.queue and (until is None or self._events[until] is None):
            work = self.queue.pop(0)
            if not self.broken:
                work()

    def cudaStreamCreateWithFlags(self, _: int) -> Any:
        return 0, next(self._handles)

    def cudaStreamSynchronize(self, _: int) -> Any:
        if self.recording is not None:
            return (900,)
        self._drain()
        return (self.broken,)

    def cudaEventCreate(self) -> Any:
        handle = next(self._handles)
        self._events[handle] = 0.0
        return 0, handle

    def cudaEventDestroy(self, event: int) -> Any:
        self._events.pop(event)
        return (0,)

    def cudaEventRecord(self, event: int, _: int) -> Any:
        def reach() -> None:
            if event in self._events:  # not destroyed meanwhile
                self._events[event] = time.perf_counter()

        self._events[event] = None
        return self._put(reach)

    def cudaEventSynchronize(self, event: int) -> Any:
        self._drain(until=event)
        return (self.broken,)

    def cudaEventElapsedTime(self, start: int, end: int) -> Any:
        return 0, 1000 * (self._events[end] - self._events[start])

    # graphs
    def cudaStreamBeginCapture(self, _: int, __: int) -> Any:
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, _: int) -> Any:
        recorded, self.recording = self.recording, None
        handle = next(self._handles)
        self._graphs[handle] = recorded or []
        return 0, handle

    def cudaGraphInstantiate(self, graph: int, _: int) -> Any:
        self.captures += 1
        handle = next(self._handles)
        self._graphs[handle] = list(self._graphs[graph])
        return 0, handle

    def cudaGraphLaunch(self, graph: int, _: int) -> Any:
        self.launches += 1
        self.queue += self._graphs[graph]
        return (0,)

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self._graphs[graph]
        return (0,)

    cudaGraphExecDestroy = cudaGraphDestroy


class Named:
    """A member of an enumeration: what the runtime looks at is its name."""

    def __init__(self, name: str):
        self.name = name


class ILogger:
    """The base of loggers."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)


class Library(types.ModuleType):
    """``tensorrt`` or ``tensorrt_rtx``."""

    ILogger = ILogger
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, backend: str, cuda: Cuda):
        super().__init__(backend.replace("-", "_"))
        self.__version__ = VERSIONS[backend]
        self.backend, self.cuda = backend, cuda
        self.contexts: list[Context] = []
        self.capturable = True
        self.strategies: list[Any] = []
        self.caches_given = 0

    def Runtime(self, logger: Any) -> Runtime:
        return Runtime(self, logger)


class Runtime:
    def __init__(self, library: Library, logger: Any):
        self.library, self.logger = library, logger

    def deserialize_cuda_engine(self, data: Any) -> PlanEngine | None:
        def refuse(message: str) -> None:
            self.logger.log(ILogger.Severity.ERROR, message)

        try:
            plan = json.loads(bytes(data))
        except ValueError:
            return refuse("Error Code 1: Serialization (Serialization assertion header.size failed.)")
        if plan["version"] != self.library.__version__:
            return refuse("Error Code 6: API Usage (the plan file is not compatible with this version)")
        if plan["capability"] != self.library.cuda.capability:
            return refuse("Error Code 6: API Usage (the plan file is generated on an incompatible device)")
        return PlanEngine(self.library, plan, self.logger)


class PlanEngine:
    """A plan: an ONNX file that is run as it is."""

    def __init__(self, library: Library, plan: Mapping[str, Any], logger: Any):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(plan["onnx"], options, providers=["CPUExecutionProvider"])
        self.library, self.plan, self.logger = library, plan, logger
        self.inputs = {v.name: v for v in self.session.get_inputs()}
        self.outputs = {v.name: v for v in self.session.get_outputs()}
        self._names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, i: int) -> str:
        return self._names[i]

    def get_tensor_mode(self, name: str) -> Named:
        return Named("INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_location(self, name: str) -> Named:
        return Named("HOST" if name in self.plan.get("host", ()) else "DEVICE")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        value = (self.inputs | self.outputs)[name]
        return tuple(d if isinstance(d, int) else -1 for d in value.shape)

    def get_tensor_dtype(self, name: str) -> Named:
        kind = (self.inputs | self.outputs)[name].type
        names = {"uint8": "UINT8", "int64": "INT64", "int32": "INT32", "float": "FLOAT", "float16": "HALF"}
        return Named(names[kind.removeprefix("tensor(").removesuffix(")")])

    def get_tensor_profile_shape(self, name: str, _: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.plan["profile"][name]]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.library)

    def create_execution_context(self, how: Any) -> Context:
        if self.library.backend == "tensorrt-rtx":
            assert isinstance(how, RuntimeConfig)
            assert how.strategy == "user"
            self.library.strategies.append(how.dynamic_shapes_kernel_specialization_strategy)
        else:
            assert how == "user"
        context = Context(self, how)
        self.library.contexts.append(context)
        return context


class RuntimeConfig:
    def __init__(self, library: Library):
        self.library, self.strategy, self.cache = library, None, None
        self.dynamic_shapes_kernel_specialization_strategy = "lazy"

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        self.library.caches_given += 1
        return True


class RuntimeCache:
    MAGIC = b"kernels:"

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, data: bytes) -> bool:
        if not data.startswith(self.MAGIC):
            return False
        self.kernels = set(data[len(self.MAGIC) :].decode().split())
        return True

    def serialize(self) -> bytes:
        return self.MAGIC + " ".join(sorted(self.kernels)).encode()


class Context:
    def __init__(self, engine: PlanEngine, config: Any):
        self.engine, self.config = engine, config
        self.shapes: dict[str, tuple[int, ...]] = {
            name: shape for name in engine.inputs if -1 not in (shape := engine.get_tensor_shape(name))
        }
        self.out_shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.warm = False
        self.compiled = 0

    @property
    def cuda(self) -> Cuda:
        return self.engine.library.cuda

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, 0)
        if not all(a <= s <= b for a, s, b in zip(low, shape, high)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % 256 or not self.cuda.holds(address, 1):
            return False
        self.addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self.addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name) or self.out_shapes.get(name) or self.engine.get_tensor_shape(name)

    def infer_shapes(self) -> list[str]:
        unset = [name for name in self.engine.inputs if name not in self.shapes]
        if not unset:
            zeros = {
                name: np.zeros(shape, _dtype(self.engine.inputs[name].type))
                for name, shape in self.shapes.items()
            }
            results = self.engine.session.run(list(self.engine.outputs), zeros)
            self.out_shapes = {name: result.shape for name, result in zip(self.engine.outputs, results)}
        return unset

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        assert size >= SCRATCH
        assert self.cuda.holds(address, size)
        self.scratch = (address, size)

    def is_stream_capturable(self, _: int) -> bool:
        return self.engine.library.capturable

    def execute_async_v3(self, _: int) -> bool:
        ready = (
            self.scratch is not None
            and self.addresses.keys() >= self.engine.inputs.keys() | self.engine.outputs
        )
        if not ready or (self.cuda.recording is not None and not self.warm):
            self.engine.logger.log(ILogger.Severity.ERROR, "enqueueV3: Error Code 1: not ready")
            return False
        if not self.warm and isinstance(self.config, RuntimeConfig) and self.config.cache is not None:
            self.config.cache.kernels.add(Path(self.engine.plan["onnx"]).stem)
        self.warm = True
        self.cuda._put(self._run)
        return True

    def _run(self) -> None:
        assert self.scratch is not None
        ctypes.memset(self.scratch[0], 0xFF, SCRATCH)
        arrays = {
            name: _view(self.addresses[name], shape, _dtype(self.engine.inputs[name].type)).copy()
            for name, shape in self.shapes.items()
        }
        results = self.engine.session.run(list(self.engine.outputs), arrays)
        for name, result in zip(self.engine.outputs, results):
            if not self.cuda.holds(self.addresses[name], result.nbytes):
                self.cuda.broken = 700
                return
            _view(self.addresses[name], result.shape, result.dtype)[...] = result


def _dtype(kind: str) -> np.dtype[Any]:
    name = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype("float32" if name == "float" else name)


def _view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)


class Machine:
    """A machine with a GPU, TensorRT and TensorRT-RTX."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.cuda = Cuda()
        self.patch = patch
        self.libraries = {backend: Library(backend, self.cuda) for backend in VERSIONS}
        patch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)
        for library in self.libraries.values():
            patch.setitem(sys.modules, library.__name__, library)

    def without(self, module: str) -> None:
        """Makes a module one that cannot be imported."""
        self.patch.setitem(sys.modules, module, None)


def add_engine(
    bundle: Path,
    key: str = "key",
    backend: str = "tensorrt",
    variant: str | None = None,
    shapes: Mapping[str, tuple[int, int, int]] | None = None,
    graphs: tuple[str, ...] | None = None,
    plan: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Manifest:
    """Adds an engine whose plans name the bundle's graphs.

    Args:
        shapes: by axis; None is the limits of the bundle.
        plan: what stands in the plans instead.
        changes: of the manifest's entry.
    """
    manifest = Manifest.read(bundle)
    own = manifest.variants[variant].graphs if variant is not None else {}
    files = {name: own.get(name, graph.file) for name, graph in manifest.graphs.items()}
    files = {name: file for name, file in files.items() if graphs is None or name in graphs}
    if shapes is None:
        shapes = {
            name: (axis.min or 1, axis.min or 1, axis.max or 1)
            for name, axis in manifest.axes.items()
            if axis.of is None
        }
    with BundleAddition(bundle, f"engines/{key}") as addition:
        for name, file in files.items():
            profile = {}
            for value in manifest.graphs[name].inputs:
                corners = [[_size(manifest, shapes, d, i) for d in value.shape] for i in range(3)]
                profile[value.name] = corners
            content = {
                "version": VERSIONS[backend], "capability": CAPABILITY, "onnx": str(bundle / file),
                "profile": profile, **(plan or {}),
            }  # fmt: skip
            addition.write(f"{name}.plan", [json.dumps(content).encode()])
        engine = Engine(
            backend=backend,  # type: ignore[arg-type]
            version=VERSIONS[backend],
            compute_capabilities=(CAPABILITY,),
            shapes=shapes,
            graphs={name: f"engines/{key}/{name}.plan" for name in files},
            sources={file: manifest.files[file].sha256 for file in files.values()},
            variant=variant,
        )
        engine = replace(engine, **changes)
        return addition.commit(lambda m: replace(m, engines={**m.engines, key: engine}))


def _size(manifest: Manifest, shapes: Mapping[str, tuple[int, int, int]], dimension: Any, corner: int) -> int:
    if isinstance(dimension, int):
        return dimension
    axis = manifest.axes[dimension]
    return shapes[axis.of][corner] // (axis.divide or 1) if axis.of is not None else shapes[dimension][corner]
