"""ONNX Runtime on the CPU and on CUDA. No tensor passes through the host between graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hywu_runtime.codec import show
from hywu_runtime.errors import BundleError, DeviceError, EngineError

if TYPE_CHECKING:
    from hywu_runtime.backends import DeviceTensor
    from hywu_runtime.bundle import Weight

_DTYPES = {
    "tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(float16)": "float16", "tensor(float)": "float32",
}  # fmt: skip
INTEGER_PRODUCTS = ".ort-cpu.onnx"
"""Ends the names of graphs whose INT8 products ONNX Runtime may compute in integers. In others these would
saturate on CPUs that have AVX2 but not VNNI, which add two of them in 16 bits."""
_ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, which NumPy lacks


def missing(name: str) -> str | None:
    """Why ``ort-cpu`` or ``ort-cuda`` cannot be used, or None."""
    try:
        import onnxruntime
    except ImportError as error:
        return f"onnxruntime cannot be imported ({error})"
    providers = onnxruntime.get_available_providers()
    if name == "ort-cuda" and "CUDAExecutionProvider" not in providers:
        have = ", ".join(providers)
        return f"onnxruntime {onnxruntime.__version__} has {have}, not CUDA (onnxruntime-gpu has it)"
    return None


class OrtTensor:
    """An OrtValue; on the CPU over memory that NumPy holds, so that the host writes and reads it in place."""

    def __init__(self, shape: Sequence[int], dtype: str, cuda: int | None):
        import onnxruntime

        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self._host: npt.NDArray[Any] | None = None
        if math.prod(self.shape) * self.dtype.itemsize > 2**46:
            raise _no_memory(self.shape, dtype)
        try:
            if cuda is None:
                self._host = np.zeros(self.shape, self.dtype)
                self.value = onnxruntime.OrtValue.ortvalue_from_numpy(self._host)
            else:
                self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                    list(self.shape), self.dtype, "cuda", cuda
                )
                self.wipe()
        except MemoryError:
            raise _no_memory(self.shape, dtype) from None
        except Exception as error:
            raise _failure(error, "a buffer cannot be made") from None

    def write(self, array: npt.NDArray[Any]) -> None:
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"{array.dtype} {array.shape} written to {self.dtype} {self.shape}")
        if self._host is not None:
            np.copyto(self._host, array)
        else:
            self.value.update_inplace(np.asarray(array, order="C"))

    def read(self) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = self._host.copy() if self._host is not None else self.value.numpy()
        return host

    def wipe(self) -> None:
        if self._host is not None:
            self._host.fill(0)
        else:
            self.value.update_inplace(np.zeros(self.shape, self.dtype))

    def finite(self) -> bool | None:
        return None if self._host is None else bool(np.isfinite(self._host).all())


class OrtBinding:
    """An IO binding; holds its tensors alive."""

    def __init__(self, session: Any, label: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]):
        self._session, self._label = session, label
        self._held = (dict(inputs), dict(outputs))
        self._binding = session.io_binding()
        try:
            for name, tensor in inputs.items():
                self._binding.bind_ortvalue_input(name, tensor.value)
            for name, tensor in outputs.items():
                self._binding.bind_ortvalue_output(name, tensor.value)
        except Exception as error:
            raise _failure(error, f"graph {label} does not take its tensors") from None

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise _failure(error, f"graph {self._label} failed") from None


class OrtSession:
    """A graph loaded by ONNX Runtime."""

    def __init__(self, session: Any, label: str, weights: object):
        self._session, self._label = session, label
        self._weights = weights  # ONNX Runtime uses this memory without a copy

    def bind(self, inputs: Mapping[str, DeviceTensor], outputs: Mapping[str, DeviceTensor]) -> OrtBinding:
        """See :class:`hywu_runtime.backends.Session`.

        Raises:
            BundleError: the graph is not what the manifest says.
        """
        for side, given, values in (
            ("input", inputs, self._session.get_inputs()),
            ("output", outputs, self._session.get_outputs()),
        ):
            found = {v.name: v for v in values}
            for name in sorted(found.keys() | given.keys()):
                if name not in given or name not in found or not _takes(found[name], given[name]):
                    raise BundleError(
                        f"{self._label} has for {side} {show(name)}: {_words(found.get(name))}",
                        f"The manifest says {_words(given.get(name))}",
                        "Export the bundle again",
                    )
        return OrtBinding(self._session, self._label, inputs, outputs)

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Runs once on arrays of the host; the outputs have the shapes that the graph gives them.

        Raises:
            EngineError: the graph does not take the arrays, or fails.
        """
        names = [value.name for value in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, dict(inputs))))
        except Exception as error:
            raise _failure(error, f"graph {self._label} failed") from None


def _takes(value: Any, tensor: DeviceTensor) -> bool:
    """Whether a graph's input or output, with names for dynamic axes, is of the tensor's dtype and shape."""
    return (
        _DTYPES.get(value.type) == tensor.dtype.name
        and len(value.shape) == len(tensor.shape)
        and all(a == b for a, b in zip(value.shape, tensor.shape) if isinstance(a, int))
    )


def _words(value: Any) -> str:
    """A tensor, or a graph's input or output, for messages."""
    if value is None:
        return "nothing"
    dtype = value.dtype.name if isinstance(value, OrtTensor) else value.type
    return f"{dtype} [{', '.join(map(str, value.shape))}]"


class _Sequence:
    """Bindings, one after another."""

    def __init__(self, bindings: Sequence[OrtBinding]):
        self._bindings = tuple(bindings)

    def run(self) -> None:
        for binding in self._bindings:
            binding.run()


@dataclass(frozen=True)
class _Mark:
    seconds: float

    def since(self, earlier: _Mark) -> float:
        return self.seconds - earlier.seconds


class OnnxRuntime:
    """The backends ``ort-cpu`` and ``ort-cuda``. What is asked for is done when the call returns."""

    target = None
    copies_states = False

    def __init__(self, name: str, device: int, threads: int | None):
        self.name = name
        self._cuda = device if name == "ort-cuda" else None
        self._threads = threads

    def allocate(self, shape: Sequence[int], dtype: str) -> OrtTensor:
        """See :class:`hywu_runtime.backends.Backend`. Raises DeviceError where there is no memory."""
        return OrtTensor(shape, dtype, self._cuda)

    def sequence(
        self, bindings: Sequence[OrtBinding], copies: Sequence[tuple[OrtTensor, OrtTensor]]
    ) -> _Sequence:
        """See :class:`hywu_runtime.backends.Backend`; without states to copy there are no copies."""
        assert not copies
        return _Sequence(bindings)

    def enter(self) -> None: ...

    def mark(self) -> _Mark:
        return _Mark(time.perf_counter())

    def wait(self) -> None: ...

    def load(self, file: Path, weights: Mapping[str, Weight], stage: int = 0) -> OrtSession:
        """See :class:`hywu_runtime.backends.Backend`.

        Buffers are all on the backend's own device: ONNX Runtime copies what a session on another one reads
        and makes.

        Raises:
            BundleError: the graph is damaged or does not suit ONNX Runtime.
            DeviceError: CUDA cannot be used.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, with more words than the log has
        # Each session has threads of its own. Waiting for work in a loop, as they do after a run by default,
        # those of one graph would take the cores from the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not file.name.endswith(INTEGER_PRODUCTS):
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
        providers: list[Any] = ["CPUExecutionProvider"]
        if self._cuda is not None:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": stage_device(self._cuda, stage)}))
        values = {name: _external(weight) for name, weight in weights.items()}
        if values:
            options.add_external_initializers(list(values), [value for value, _ in values.values()])
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        except Exception as error:
            raise BundleError(
                f"{file.name} cannot be loaded: {_first_line(error)}",
                "Expected an ONNX graph that ONNX Runtime takes",
                "Check the bundle with verify=True (`hywu inspect --verify`), and copy or export it again",
            ) from None
        if self._cuda is not None and "CUDAExecutionProvider" not in session.get_providers():
            raise DeviceError(
                f"CUDA device {self._cuda} cannot be used by ONNX Runtime",
                "Expected a GPU with its driver, CUDA and cuDNN",
                'Check `hywu doctor`, or use backend="ort-cpu"',
            )
        return OrtSession(session, file.name, (values, weights))


def stage_device(device: int, stage: int) -> int:
    """The GPU of a stage: ``device + stage`` where the machine has so many, otherwise ``device``.

    How many there are is known where cuda-python is installed; without it one is used.
    """
    if stage == 0:
        return device
    try:
        from hywu_runtime.backends import cuda

        code, count = cuda.runtime().cudaGetDeviceCount()
    except (ImportError, OSError, RuntimeError):
        return device
    return device + stage if not int(code) and device + stage < count else device


def _external(weight: Weight) -> tuple[Any, npt.NDArray[Any]]:
    """An OrtValue over a mapped weight, and the array that must live as long."""
    import onnxruntime

    if weight.dtype == "bfloat16":
        array: npt.NDArray[Any] = weight.data.view("<u2").reshape(weight.shape)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16), array
    array = weight.data.view(np.dtype(weight.dtype)).reshape(weight.shape)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array), array


def _first_line(error: Exception) -> str:
    return show(str(error).strip().split("\n")[0], 300)[1:-1]


def _failure(error: Exception, what: str) -> EngineError:
    return EngineError(
        f"ONNX Runtime: {what}: {_first_line(error)}",
        "Expected it to run",
        "Check the bundle with verify=True; if memory ran out, use a smaller size, batch, or low_memory=True",
    )


def _no_memory(shape: Sequence[int], dtype: str) -> DeviceError:
    return DeviceError(
        f"There is no memory for a tensor {dtype} {list(shape)}",
        "Expected the buffers to fit",
        "Use a smaller size or batch",
    )
