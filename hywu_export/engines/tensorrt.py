"""TensorRT and TensorRT-RTX. This module alone imports either, and Polygraphy over them.

Polygraphy chooses between the two once in a process, so a process compiles for one of them: see `worker`.
Symbols are looked up by name and may be missing: the same code serves TensorRT 10.3 to 11 and TensorRT-RTX 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

from hywu_runtime.errors import DeviceError

BackendName: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[BackendName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
OLDEST: dict[BackendName, tuple[int, int]] = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 7)}
_EXTRAS: dict[BackendName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
_SEVERITIES = ("F", "E", "W", "I", "V")  # of TensorRT's ILogger, from INTERNAL_ERROR to VERBOSE


@dataclass(frozen=True)
class Settings:
    """How an engine is compiled, besides its shapes; None and False leave TensorRT's own default.

    Attributes:
        compute_capabilities: TensorRT-RTX: the GPUs that it is for. TensorRT compiles for the one at hand.
        optimization_level: 0 to 5: how long the builder searches for faster kernels.
        workspace: memory that a kernel may use for intermediate results, MiB.
        version_compatible: later versions of TensorRT load it.
        hardware_compatible: other GPUs load it: of 8.0 and later (``ampere+``), or of the same capability.
        weight_streaming: weights may stay in host memory.
    """

    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace: int | None = None
    version_compatible: bool = False
    hardware_compatible: Literal["ampere+", "same"] | None = None
    weight_streaming: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The settings that differ from the default, as plain JSON values."""
        values = {key: value for key, value in asdict(self).items() if value not in (None, False, ())}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The reverse of :meth:`to_dict`."""
        return cls(**values | {"compute_capabilities": tuple(values.get("compute_capabilities", ()))})


@dataclass(frozen=True)
class ParserProblem:
    """What the ONNX parser has against a node."""

    node: str
    operator: str
    message: str


class ParserFailed(Exception):
    """The ONNX parser refused the graph: ``problems`` says why."""

    def __init__(self, problems: list[ParserProblem]):
        super().__init__(problems)
        self.problems = problems


class BuilderFailed(Exception):
    """The builder gave up: ``errors`` are the errors that it logged."""

    def __init__(self, errors: list[str]):
        super().__init__(errors)
        self.errors = errors


class Cancelled(Exception):
    """The progress monitor was told to stop."""


def module_version(backend: BackendName) -> str:
    """The version of an installed backend.

    Raises:
        DeviceError: it is not installed, or too old.
    """
    try:
        version = str(import_module(MODULES[backend]).__version__)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        hint = (
            "TensorRT comes with JetPack on a Jetson; elsewhere"
            if backend == "tensorrt"
            else "It needs neither a GPU nor a driver;"
        )
        raise DeviceError(
            f"The package {MODULES[backend]} cannot be imported ({' '.join(str(error).split())[:200]})",
            f"{hint} the extra `{_EXTRAS[backend]}` brings it",
            f"pip install 'hywu-export[{_EXTRAS[backend]}]', or write a script for the device with "
            "--emit-script FILE",
        ) from error
    oldest = OLDEST[backend]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < oldest:
        raise DeviceError(
            f"{MODULES[backend]} {version} is too old",
            f"Expected {oldest[0]}.{oldest[1]} or later",
            f"pip install --upgrade 'hywu-export[{_EXTRAS[backend]}]'",
        )
    return version


def parser_errors(model: bytes | Path) -> list[str]:
    """What TensorRT-RTX's ONNX parser has against a model; an empty list if nothing.

    ``model`` is a serialized model with all its weights, or an .onnx file whose external data lies beside it.

    Raises:
        DeviceError: ``tensorrt_rtx`` is not installed.
    """
    module_version("tensorrt-rtx")
    trt = import_module(MODULES["tensorrt-rtx"])
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
    errors = [
        f"{e.node_name()} ({e.node_operator()}): {e.desc()}"
        for e in map(parser.get_error, range(parser.num_errors))
    ]
    return errors if parsed or errors else ["the parser failed without saying why"]


class TensorRT:
    """One of the two, opened for this process.

    Args:
        backend: which.
        log: where everything that it says is written, one message after another.
    Raises:
        DeviceError: see :func:`module_version`.
    """

    def __init__(self, backend: BackendName, log: TextIO):
        self.backend, self.version = backend, module_version(backend)
        vars(import_module("polygraphy.config"))["USE_TENSORRT_RTX"] = backend == "tensorrt-rtx"
        import_module("polygraphy.logger").G_LOGGER.module_severity = 100  # what it says is in the log too
        self._trt = import_module(MODULES[backend])
        self.errors: list[str] = []
        self._logger = self._make_logger(log)
        self._builder = self._trt.Builder(self._logger)

    def symbol(self, enum: str, name: str) -> Any | None:
        """A member of an enumeration, or None where this version lacks it."""
        return getattr(getattr(self._trt, enum, None), name, None)

    def parse(self, model: Path | bytes) -> Any:
        """The network of an ONNX model whose external data lies where it says.

        Raises:
            ParserFailed: with every problem that the parser names.
        """
        typed = self.symbol("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
        network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        parser = self._trt.OnnxParser(network, self._logger)
        native = self.symbol("OnnxParserFlag", "NATIVE_INSTANCENORM")
        if native is not None:  # the plugin would tie the engine to one version, and is slower to compile
            parser.set_flag(native)
        parsed = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
        if not parsed or parser.num_errors:
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise ParserFailed(
                [ParserProblem(_text(e, "node_name"), _text(e, "node_operator"), e.desc()) for e in errors]
                or [ParserProblem("", "", "; ".join(self.errors) or "the parser does not say why")]
            )
        self._parser = parser  # it owns weights that the network refers to
        return network

    def compile(
        self,
        network: Any,
        profile: dict[str, Any],
        settings: Settings,
        timing_cache: Path | None = None,
        progress: Callable[[str, float], bool] = lambda phase, done: True,
    ) -> memoryview:
        """The serialized engine of a network.

        Args:
            profile: smallest, best and largest shape of every input whose shape is not fixed.
            timing_cache: TensorRT: measured kernels are read from this file, and written to it.
            progress: is told the phase and the part that is done, 0 to 1; False stops the builder at the
                next step, of which a phase may have few.
        Raises:
            BuilderFailed: the builder gave up, or this version lacks something that ``settings`` ask for.
            Cancelled: ``progress`` said so.
        """
        monitor = self._make_monitor(progress)
        try:
            config = self._config(network, profile, settings, timing_cache, monitor)
        except import_module("polygraphy.exception").PolygraphyException as error:
            raise BuilderFailed([*self.errors, str(error)]) from error
        plan = self._builder.build_serialized_network(network, config)
        if monitor.stopped:
            raise Cancelled
        if plan is None:
            raise BuilderFailed(self.errors)
        if timing_cache is not None:
            _write_cache(config.get_timing_cache(), timing_cache)
        self._plan = plan  # the memory that the result shows
        return memoryview(plan)

    def inspect(self, plan: memoryview) -> str | None:
        """What the engine inspector says about an engine, JSON; None where it cannot be loaded.

        Loading needs a GPU that the engine was compiled for.
        """
        runtime = self._trt.Runtime(self._logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            return None
        form = self.symbol("LayerInformationFormat", "JSON")
        text: str = engine.create_engine_inspector().get_engine_information(form)
        return text

    def _config(
        self, network: Any, profile: dict[str, Any], settings: Settings, cache: Path | None, monitor: Any
    ) -> Any:
        shapes = import_module("polygraphy.backend.trt").Profile()
        for name, (low, best, high) in profile.items():
            shapes.add(name, low, best, high)
        arguments: dict[str, Any] = {
            "profiles": [shapes],
            "profiling_verbosity": self.symbol("ProfilingVerbosity", "DETAILED"),
            "progress_monitor": monitor,
            "builder_optimization_level": settings.optimization_level,
            "version_compatible": settings.version_compatible or None,
            "weight_streaming": settings.weight_streaming or None,
        }
        if settings.hardware_compatible is not None:
            level = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}[
                settings.hardware_compatible
            ]
            arguments["hardware_compatibility_level"] = self._required("HardwareCompatibilityLevel", level)
        if settings.workspace is not None:
            pool = self._required("MemoryPoolType", "WORKSPACE")
            arguments["memory_pool_limits"] = {pool: settings.workspace << 20}
        if self.backend == "tensorrt-rtx":
            create = import_module("polygraphy.backend.tensorrt_rtx").CreateConfigRTX
            capabilities = [tuple(map(int, c.split("."))) for c in settings.compute_capabilities]
            arguments["compute_capabilities"] = capabilities or None
        else:
            create = import_module("polygraphy.backend.trt").CreateConfig
            if cache is not None and cache.exists():
                arguments["load_timing_cache"] = str(cache)
        return create(**arguments)(self._builder, network)

    def _required(self, enum: str, name: str) -> Any:
        symbol = self.symbol(enum, name)
        if symbol is None:
            raise BuilderFailed([f"{MODULES[self.backend]} {self.version} has no {enum}.{name}"])
        return symbol

    def _make_logger(self, log: TextIO) -> Any:
        errors = self.errors

        class Logger(self._trt.ILogger):  # type: ignore[misc, name-defined]
            def log(self, severity: Any, message: str) -> None:
                if int(severity) < 2:
                    errors.append(message)
                with contextlib.suppress(OSError, ValueError):  # an exception here would end the process
                    log.write(f"[{_SEVERITIES[min(int(severity), 4)]}] {message}\n")

        return Logger()

    def _make_monitor(self, progress: Callable[[str, float], bool]) -> Any:
        class Monitor(self._trt.IProgressMonitor):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.stopped = False
                self._phases: dict[str, list[Any]] = {}  # name → [parent, steps, steps done]

            def phase_start(self, name: str, parent: str | None, steps: int) -> None:
                self._phases[name] = [parent, max(steps, 1), 0]
                self._tell(name)

            def step_complete(self, name: str, step: int) -> bool:
                if name in self._phases:
                    self._phases[name][2] = step + 1
                return self._tell(name)

            def phase_finish(self, name: str) -> None:
                self._phases.pop(name, None)

            def _tell(self, name: str) -> bool:
                # Of the outermost phase the part that is done, and of its current step what that step says.
                inner, done = 0.0, 0.0
                current: str | None = name
                while current in self._phases:
                    parent, steps, complete = self._phases[current]
                    inner = min((complete + inner) / steps, 1.0)
                    current, done = parent, inner
                self.stopped = self.stopped or not progress(name, done)
                return not self.stopped

        return Monitor()


def _text(error: Any, method: str) -> str:
    """A text of a parser's error; versions before 10 lack some."""
    return str(getattr(error, method)()) if hasattr(error, method) else ""


def _write_cache(cache: Any, path: Path) -> None:
    """Puts the timing cache in the place of the old one, in one step."""
    staged = path.with_name(f".{path.name}.partial")
    staged.write_bytes(memoryview(cache.serialize()))
    staged.replace(path)
