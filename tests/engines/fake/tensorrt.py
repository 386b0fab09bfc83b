"""A module that looks like TensorRT and writes down what it is told, into the file that $CALLS names.

It compiles nothing. ``$TENSORRT_VERSION`` is its version: 11 lacks what TensorRT 11 removed.
"""

from __future__ import annotations

import enum
import json
import os
from typing import Any

__version__ = os.environ.get("TENSORRT_VERSION", "10.3.0")


def _say(*what: Any) -> None:
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(what, default=str) + "\n")


class ILogger:
    def log(self, severity: Any, message: str) -> None: ...


class Logger(ILogger):
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity


class IProgressMonitor: ...


if int(__version__.split(".")[0]) < 11:

    class NetworkDefinitionCreationFlag(enum.IntEnum):
        EXPLICIT_BATCH, STRONGLY_TYPED = range(2)


class OnnxParserFlag(enum.IntEnum):
    NATIVE_INSTANCENORM = 0


class BuilderFlag(enum.IntEnum):
    TF32, VERSION_COMPATIBLE, WEIGHT_STREAMING, REFIT, STRIP_PLAN = range(5)


class ProfilingVerbosity(enum.IntEnum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class HardwareCompatibilityLevel(enum.IntEnum):
    NONE, AMPERE_PLUS = range(2)


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class LayerInformationFormat(enum.IntEnum):
    ONELINE, JSON = range(2)


class DataType(enum.IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


float32, float16, int8, int32, bool, uint8, fp8, bfloat16, int64, int4 = DataType


class LayerType(enum.IntEnum):
    SHAPE = 0


class _Cache:
    def __init__(self, data: bytes):
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+measured"


class _Config:
    def __init__(self) -> None:
        self.__dict__["cache"] = None

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value
        _say("config", name, getattr(value, "name", type(value).__name__ if "monitor" in name else value))

    def set_flag(self, flag: BuilderFlag) -> None:
        _say("flag", flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        _say("clear", flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        _say("pool", pool.name, size)

    def create_timing_cache(self, data: bytes) -> _Cache:
        return _Cache(data)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        self.__dict__["cache"] = cache
        _say("timing cache", cache.data.decode())
        return True

    def get_timing_cache(self) -> Any:
        return self.cache

    def add_optimization_profile(self, profile: Any) -> int:
        _say("profile", profile.shapes)
        return 0


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes[name] = [list(shape) for shape in shapes]

    def get_shape(self, name: str) -> Any:
        return self.shapes.get(name, [])

    def __bool__(self) -> bool:
        return True


class _Tensor:
    def __init__(self, name: str, shape: tuple[int, ...]):
        self.name, self.shape, self.is_shape_tensor, self.dtype = name, shape, False, float32


class _Network:
    num_layers = 3

    def __init__(self) -> None:
        self.inputs: list[_Tensor] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]

    def __iter__(self) -> Any:
        return iter(())


class Builder:
    def __init__(self, logger: ILogger):
        self.logger = logger

    def create_network(self, flags: int = 0) -> _Network:
        _say("network", flags)
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        for step in range(2):
            if not monitor.step_complete("Building engine", step):
                return None
        monitor.phase_finish("Building engine")
        self.logger.log(Logger.Severity.INFO, "built")
        return b"ftrt" + bytes(200)


class OnnxParser:
    num_errors = 0

    def __init__(self, network: _Network, logger: ILogger):
        self.network = network

    def set_flag(self, flag: OnnxParserFlag) -> None:
        _say("parser flag", flag.name)

    def parse_from_file(self, path: str) -> bool:
        import onnx

        for value in onnx.load(path).graph.input:
            shape = tuple(d.dim_value if not d.dim_param else -1 for d in value.type.tensor_type.shape.dim)
            self.network.inputs.append(_Tensor(value.name, shape))
        return True


class _Inspector:
    def get_engine_information(self, form: LayerInformationFormat) -> str:
        assert form is LayerInformationFormat.JSON
        tensor = {"Name": "x", "Dimensions": [1], "Format/Datatype": "Row major Int8 format"}
        half = {"Name": "a", "Dimensions": [1], "Format/Datatype": "Row major linear FP16 format"}
        metadata = "[ONNX Layer: m/DQ]\x1e[ONNX Layer: m/MatMul]"
        layers = [
            {"Name": "p", "LayerType": "gemm", "Inputs": [tensor], "Outputs": [half], "Metadata": metadata},
            {"Name": "a", "LayerType": "gemm", "Inputs": [half], "Outputs": [half],
             "Metadata": "[ONNX Layer: m/MatMul_2]"},
            {"Name": "b", "LayerType": "gemm", "Inputs": [half], "Outputs": [half],
             "Metadata": "[ONNX Layer: m/MatMul_3]\x1e[ONNX Layer: m/Add]"},
        ]  # fmt: skip
        return json.dumps({"Layers": layers, "Bindings": []})


class _Engine:
    def create_engine_inspector(self) -> _Inspector:
        return _Inspector()


class Runtime:
    def __init__(self, logger: ILogger): ...

    def deserialize_cuda_engine(self, plan: memoryview) -> _Engine:
        assert bytes(plan[:4]) == b"ftrt"
        return _Engine()
