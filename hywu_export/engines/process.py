"""Compiles a graph in a process of its own, and turns what that says into results, progress and errors."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hywu_runtime
from hywu_export.engines.failures import builder_error, crash_error, parser_error
from hywu_runtime import errors
from hywu_runtime.errors import EngineError, HywuError

_WORKER = ("-m", "hywu_export.engines.worker")
_GRACE = 2.0  # seconds that a cancelled builder has to reach its next step
_TICK = 0.5  # seconds between signs of life while a builder says nothing


@dataclass(frozen=True)
class Compiled:
    """What a process that compiled a graph measured of itself.

    Attributes:
        version: the backend's version.
        network_layers: layers of the network before anything was fused.
        seconds, cpu_seconds: on the clock, and on all cores together.
        peak_bytes: the process's largest resident set.
        inspection: what the engine inspector says, where the engine could be loaded.
    """

    version: str
    network_layers: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    inspection: str | None


def compile_graph(
    graph: str, request: Mapping[str, Any], progress: Callable[[str, float, float], None]
) -> Compiled:
    """Compiles one graph; see `worker` for what a request holds.

    An interrupt (Ctrl-C) is passed to the builder's progress monitor; a builder that does not reach its next
    step soon is ended. Either way the interrupt is raised here after the process has gone.

    Args:
        graph: the graph's name, for messages.
        progress: is told the builder's phase, the part that is done (0 to 1) and the seconds since the start,
            at least every half second.
    Raises:
        EngineError: the parser refused the graph, the builder gave up, or the process died.
    """
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, *_WORKER, str(write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[write],
            start_new_session=True,  # a terminal's Ctrl-C is for this process, which passes it on
            env=os.environ | {"PYTHONPATH": _python_path()},
        )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    try:
        answer = _listen(process, read, request, progress)
    except BaseException:
        _end(process)
        raise
    finally:
        os.close(read)
    if answer is None:
        stderr = process.stderr.read().decode(errors="replace") if process.stderr is not None else ""
        raise crash_error(graph, process.wait(), stderr)
    _end(process)
    if "done" in answer:
        return Compiled(**answer["done"])
    raise _error(graph, answer, Path(request["log"]))


def _listen(
    process: subprocess.Popen[bytes],
    descriptor: int,
    request: Mapping[str, Any],
    progress: Callable[[str, float, float], None],
) -> dict[str, Any] | None:
    """The process's last answer; None if it ended without one."""
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(dict(request)).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    start, phase, done = time.monotonic(), "Starting", 0.0
    for line in _lines(descriptor):
        if line is not None:
            answer: dict[str, Any] = json.loads(line)
            if "phase" not in answer:
                return answer
            phase, done = answer["phase"], max(done, answer["progress"])
        progress(phase, done, time.monotonic() - start)
    return None


def _lines(descriptor: int) -> Iterator[bytes | None]:
    """Lines as they come, until the end; None whenever a while has passed without one."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(_TICK):
                yield None
                continue
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                return
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tells the process to stop, and ends it if it does not."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stderr is not None:
        process.stderr.close()


def _error(graph: str, answer: dict[str, Any], log: Path) -> BaseException:
    kind = answer["failed"]
    if kind == "parser":
        return parser_error(graph, answer["problems"])
    if kind == "builder":
        return builder_error(graph, answer["errors"], log)
    if kind == "cancelled":
        return KeyboardInterrupt()
    if kind == "refused":
        error_class: type[HywuError] = getattr(errors, answer["class"], EngineError)
        return error_class(*answer["parts"])
    if kind == "system":
        return OSError(answer["errno"], answer["error"])
    return EngineError(
        f"Graph {graph!r} could not be compiled: {answer['error']}",
        "Expected the builder to work with this version",
        "Report it, with the log that --log FILE keeps",
    )


def _python_path() -> str:
    """Where the process finds these packages, installed or not."""
    here = [str(Path(__file__).parents[2]), str(Path(hywu_runtime.__file__).parents[1])]
    return os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
