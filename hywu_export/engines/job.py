"""The job behind ``hywu build``: a bundle's graphs become an engine of the bundle, or nothing happens."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from hywu_export.bundle.additions import BundleAddition
from hywu_export.bundle.staging import writing
from hywu_export.engines import devices
from hywu_export.engines.failures import no_gpu
from hywu_export.engines.process import Compiled, compile_graph
from hywu_export.engines.report import graph_report
from hywu_export.engines.shapes import Range, ShapeOptions, engine_shapes, profile
from hywu_export.engines.sources import (
    GraphSource,
    check_hashes,
    check_plain,
    check_signed,
    check_turing,
    graph_source,
    model_path,
)
from hywu_export.engines.tensorrt import BackendName, Settings, module_version
from hywu_runtime.bundle import Bundle
from hywu_runtime.errors import BundleError, InputError, UnsupportedError
from hywu_runtime.manifest import Engine, Manifest

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

DEFAULT_RTX = ("8.0", "8.6", "8.9", "12.0")
"""What TensorRT-RTX builds for if nothing is said: all but Turing, which slows the others down."""
_LARGE_LOG = 1 << 20  # bytes from which a log is compressed
_STEPS = 1000  # of the progress of one graph


@dataclass(frozen=True)
class BuildOptions:
    """What may be said about a build.

    Attributes:
        backend: the compiler.
        compute_capabilities: TensorRT-RTX: the GPUs; empty: `DEFAULT_RTX`. TensorRT takes the GPU at hand.
        variant: the precision; None: the bundle's own graphs.
        shapes: sizes of the axes.
        graphs: which ones; empty: all.
        settings: how to compile; its ``compute_capabilities`` are ignored.
        timing_cache: TensorRT: a file that keeps what was measured from build to build.
        sources: for linked weights, source id to the checkpoint's directory.
        log: the builder's log is also written here, and is here alone if the build fails.
        rebuild: compile even if the engine is there.
    """

    backend: BackendName = "tensorrt-rtx"
    compute_capabilities: tuple[str, ...] = ()
    variant: str | None = None
    shapes: ShapeOptions = field(default_factory=ShapeOptions)
    graphs: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    timing_cache: Path | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    rebuild: bool = False


@dataclass(frozen=True)
class Work:
    """A build that was checked: all that an engine is made from, and the key that follows."""

    bundle: Bundle
    options: BuildOptions
    sources: tuple[GraphSource, ...]
    shapes: dict[str, Range]
    settings: Settings

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of every file of the bundle that takes part."""
        names = dict.fromkeys(name for source in self.sources for name in source.files)
        return {name: self.bundle.manifest.files[name].sha256 for name in names}

    def profile(self, graph: str) -> dict[str, Any]:
        """Shapes of a graph's inputs."""
        return dict(profile(self.bundle.manifest, self.bundle.manifest.graphs[graph].inputs, self.shapes))

    def key(self, version: str, device: str | None) -> str:
        """The name of the engine: what it is for people, and a hash over all that it is made from."""
        linked = {
            f"{source}/{file}": self.bundle.manifest.sources[source].files[file].header_sha256
            for graph in self.sources
            for _, source, file in graph.linked
        }
        facts = {
            "backend": self.options.backend,
            "version": version,
            "device": device,
            "settings": self.settings.to_dict(),
            "variant": self.options.variant,
            "shapes": self.shapes,
            "graphs": {source.name: source.file for source in self.sources},
            "files": self.files,
            "linked": linked,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        variant = "".join(c if c.isalnum() or c in "-_" else "_" for c in self.options.variant or "fp32")
        return f"{self.options.backend}-{variant[:64]}-{digest[:12]}"


@dataclass(frozen=True)
class Built:
    """An engine of a bundle.

    Attributes:
        key: its name in the manifest.
        manifest: the bundle's manifest, with it.
        report: see ``docs/engines.md``.
        reused: it was there already.
    """

    key: str
    manifest: Manifest
    report: dict[str, Any]
    reused: bool


def build(
    bundle: str | Path, options: BuildOptions | None = None, progress: Progress = lambda *_: None
) -> Built:
    """Compiles graphs of a bundle and adds them to it as an engine.

    If the same engine is there already, it is returned at once. A build that fails or is killed leaves the
    bundle as it was.

    Args:
        progress: is told what is done, and how many of how many steps are.
    Raises:
        BundleError: the bundle is damaged, or cannot be written.
        InputError: sizes or names that the bundle does not have.
        UnsupportedError: a compute capability that is unknown, or cannot compute the variant.
        DeviceError: the backend is not installed, or needs a GPU that is not there.
        EngineError: the graph was refused, or could not be compiled.
    """
    work = plan_work(bundle, options or BuildOptions())
    options = work.options
    device, settings = _device(work)
    work = replace(work, settings=settings)
    version = module_version(options.backend)
    key = work.key(version, device.name if device is not None else None)
    manifest = work.bundle.manifest
    if key in manifest.engines and not options.rebuild:
        return Built(key, manifest, read_report(work.bundle, key), reused=True)
    check_hashes(work.bundle, list(work.files))
    with BundleAddition(work.bundle.root, f"engines/{key}") as addition:
        logs = addition.directory / "logs"
        with writing(addition.directory):
            logs.mkdir()
        try:
            inspect = device is not None
            reports = {
                source.name: _compile(work, source, addition, logs, inspect, _part(work, number, progress))
                for number, source in enumerate(work.sources)
            }
        finally:
            _keep_log(logs, work, options.log)
        engine = Engine(
            backend=options.backend,
            version=version,
            compute_capabilities=(device.capability,) if device else settings.compute_capabilities,
            shapes=work.shapes,
            graphs={source.name: f"engines/{key}/{plan_name(source.name)}" for source in work.sources},
            sources=work.files,
            variant=options.variant,
            device=device.name if device is not None else None,
            version_compatible=settings.version_compatible,
            hardware_compatible=settings.hardware_compatible == "ampere+",
            report=f"engines/{key}/report.json",
        )
        report = engine_report(key, engine, settings, reports)
        add_records(addition, report, logs, work)
        manifest = commit_engine(addition, key, engine)
    return Built(key, manifest, report, reused=False)


def commit_engine(addition: BundleAddition, key: str, engine: Engine) -> Manifest:
    """Puts an engine in its place. Stale ones of its backend and variant, which no runtime takes, go with it.

    Their entries leave the manifest first, so that the bundle is valid at every moment.

    Returns:
        the bundle's new manifest.
    Raises:
        BundleError: see `BundleAddition.commit`.
    """
    stale: list[str] = []

    def change(manifest: Manifest) -> Manifest:
        stale[:] = [
            other
            for other, one in manifest.engines.items()
            if (one.backend, one.variant) == (engine.backend, engine.variant)
            and manifest.stale(other) is not None
        ]
        folders = tuple(f"engines/{other}/" for other in stale)
        return replace(
            manifest,
            files={path: file for path, file in manifest.files.items() if not path.startswith(folders)},
            engines={k: e for k, e in manifest.engines.items() if k not in stale} | {key: engine},
        )

    manifest = addition.commit(change)
    for other in stale:
        log.info("engine %s is removed: what it was built from has changed", other)
        shutil.rmtree(addition.bundle / "engines" / other, ignore_errors=True)
    return manifest


def plan_work(bundle: str | Path, options: BuildOptions) -> Work:
    """Opens the bundle and checks what was asked for, as far as that needs no TensorRT.

    Raises:
        BundleError, InputError, UnsupportedError: see :func:`build`.
    """
    if options.backend == "tensorrt":
        if options.compute_capabilities:
            raise InputError(
                "--compute-capability is of no use to TensorRT",
                "TensorRT builds for the GPU of the machine that it runs on",
                "Leave it out (--hardware-compatible widens what loads an engine), or use tensorrt-rtx",
            )
    else:
        devices.check_rtx(options.compute_capabilities)
        _check_rtx_settings(options)
    opened = Bundle.open(bundle, sources=options.sources, links=False)
    manifest = opened.manifest
    unknown = next((name for name in options.graphs if name not in manifest.graphs), None)
    if unknown is not None:
        raise InputError(
            f"The bundle has no graph {unknown!r}", f"It has {', '.join(manifest.graphs)}", "Correct --graph"
        )
    names = [name for name in manifest.graphs if name in options.graphs or not options.graphs]
    sources = tuple(graph_source(opened, name, options.variant) for name in names)
    for source in sources:
        check_signed(source, options.variant)
        check_plain(source)
    if any(source.linked for source in sources):
        opened = Bundle.open(bundle, sources=options.sources)  # checks the checkpoints
    shapes = engine_shapes(manifest, names, options.shapes)
    settings = replace(options.settings, compute_capabilities=options.compute_capabilities)
    work = Work(opened, options, sources, shapes, settings)
    for name in names:
        work.profile(name)  # or an InputError
    return work


def engine_report(
    key: str, engine: Engine, settings: Settings, graphs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The report of an engine, plain JSON values."""
    return {
        "key": key,
        "backend": engine.backend,
        "version": engine.version,
        "compute_capabilities": list(engine.compute_capabilities),
        "device": engine.device,
        "variant": engine.variant,
        "shapes": {name: list(sizes) for name, sizes in engine.shapes.items()},
        "settings": {k: v for k, v in settings.to_dict().items() if k != "compute_capabilities"},
        "graphs": dict(graphs),
    }


def read_report(bundle: Bundle, key: str) -> dict[str, Any]:
    """The report of an engine that is there.

    Raises:
        BundleError: it has none that can be read.
    """
    path = bundle.manifest.engines[key].report
    try:
        value: dict[str, Any] = json.loads(bundle.file(path).read_bytes()) if path is not None else {}
        if value.get("graphs") is None:
            raise ValueError("no report")
    except (ValueError, AttributeError) as error:
        raise BundleError(
            f"Engine {key} has no report that can be read ({error})",
            f"Expected JSON at {path}",
            "Build it again with --rebuild",
        ) from None
    return value


def add_records(addition: BundleAddition, report: Mapping[str, Any], logs: Path, work: Work) -> None:
    """Adds the report and the builder's log to an engine, and removes the folder with its pieces."""
    addition.write(
        "report.json", [json.dumps(report, separators=(",", ":"), allow_nan=False).encode() + b"\n"]
    )
    paths = [logs / f"{source.name}.log" for source in work.sources]
    size = sum(path.stat().st_size for path in paths if path.exists())
    chunks = _log_chunks(work.sources, logs)
    if size > _LARGE_LOG:
        addition.write("build.log.gz", _compressed(chunks))
    else:
        addition.write("build.log", chunks)
    shutil.rmtree(logs)


def plan_name(graph: str) -> str:
    """The file of a graph's plan; graphs may have names that are none for files."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in graph)[:100].strip(".")
    suffix = "" if safe == graph else f"-{hashlib.sha256(graph.encode()).hexdigest()[:8]}"
    return f"{safe}{suffix}.plan"


def _compile(
    work: Work,
    source: GraphSource,
    addition: BundleAddition,
    logs: Path,
    inspect: bool,
    progress: Callable[[str, float, float], None],
) -> dict[str, Any]:
    """Compiles one graph into the addition; its report."""
    name, path = plan_name(source.name), logs / f"{source.name}.log"
    with model_path(work.bundle, source) as model, writing(addition.directory):
        request = {
            "backend": work.options.backend,
            "model": str(model),
            "plan": str(addition.directory / name),
            "log": str(path),
            "profile": work.profile(source.name),
            "settings": work.settings.to_dict(),
            "timing_cache": str(work.options.timing_cache.absolute()) if work.options.timing_cache else None,
            "inspect": inspect,
        }
        compiled: Compiled = compile_graph(source.name, request, progress)
    addition.adopt(name)
    return graph_report(
        source.model,
        path,
        compiled.inspection,
        (addition.directory / name).stat().st_size,
        seconds=round(compiled.seconds, 2),
        cpu_seconds=round(compiled.cpu_seconds, 2),
        peak_bytes=compiled.peak_bytes,
        network_layers=compiled.network_layers,
    )


def _part(work: Work, number: int, progress: Progress) -> Callable[[str, float, float], None]:
    """The progress of one graph as that of the build."""
    name, total = work.sources[number].name, _STEPS * len(work.sources)

    def tell(phase: str, done: float, seconds: float) -> None:
        progress(f"{name}: {phase}, {seconds:.0f} s", int(_STEPS * (number + done)), total)

    return tell


def _device(work: Work) -> tuple[devices.Gpu | None, Settings]:
    """The GPU that TensorRT builds for, or the capabilities of TensorRT-RTX; both can compute the graphs."""
    settings = work.settings
    if work.options.backend == "tensorrt":
        device = devices.gpu()
        if device is None:
            raise no_gpu()
        capabilities: Sequence[str] = (device.capability,)
    else:
        device = None
        capabilities = settings.compute_capabilities or DEFAULT_RTX
        settings = replace(settings, compute_capabilities=tuple(capabilities))
    check_turing_work(work, capabilities)
    return device, settings


def check_turing_work(work: Work, capabilities: Sequence[str]) -> None:
    """Raises UnsupportedError for graphs that compute capability 7.5, if it is asked for, cannot compute."""
    if devices.TURING not in capabilities:
        return
    for source in work.sources:
        check_turing(source, fp32=work.options.backend == "tensorrt")
    if len(capabilities) > 1:
        log.warning(
            "An engine for 7.5 and others may be slow on the others: better build one for 7.5 and one without"
        )


def _check_rtx_settings(options: BuildOptions) -> None:
    settings = options.settings
    for option, given in (
        ("--timing-cache", options.timing_cache is not None),
        ("--version-compatible", settings.version_compatible),
        ("--hardware-compatible", settings.hardware_compatible is not None),
    ):
        if given:
            raise UnsupportedError(
                f"TensorRT-RTX has no {option}",
                "Its engines hold no measured kernels, and --compute-capability names their GPUs",
                "Leave it out, or use --backend tensorrt",
            )


def _keep_log(logs: Path, work: Work, target: Path | None) -> None:
    if target is not None:
        with writing(target), target.open("wb") as file:
            file.writelines(_log_chunks(work.sources, logs))


def _log_chunks(sources: Sequence[GraphSource], logs: Path) -> Iterator[bytes]:
    for source in sources:
        path = logs / f"{source.name}.log"
        if path.exists():
            yield f"==== {source.name}: {source.file}\n".encode()
            with path.open("rb") as file:
                yield from iter(partial(file.read, 1 << 20), b"")


def _compressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """gzip, without the time in its header."""

    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    for chunk in chunks:
        yield compressor.compress(chunk)
    yield compressor.flush()
