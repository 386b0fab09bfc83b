"""The process that compiles one graph: ``python -m hywu_export.engines.worker FD``, a request on stdin.

A process of its own, because a builder cannot be interrupted while it compiles (TensorRT-RTX does so for
minutes in one step), keeps memory, may be ended by the system for taking too much, and exists once.
The request is one line of JSON. Answers are lines of JSON on the descriptor FD; the last one has ``done`` or
``failed``. Stdin closed means: stop.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_PIECE = 16 << 20  # bytes of a plan written at a time
_PARENT_DIED = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Compiles what the request says."""
    ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    answers = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    request = json.loads(sys.stdin.readline())
    with open(request["log"], "w", encoding="utf-8", errors="replace") as log:
        answer = _answer(request, log, answers)
    _say(answers, answer)
    os._exit(0)  # nothing is left to do, and libraries have their own ideas about how to leave


def _answer(request: dict[str, Any], log: TextIO, answers: TextIO) -> dict[str, Any]:
    from hywu_export.engines.tensorrt import BuilderFailed, Cancelled, ParserFailed
    from hywu_runtime.errors import HywuError

    try:
        return {"done": _compile(request, log, answers)}
    except ParserFailed as error:
        return {"failed": "parser", "problems": [vars(problem) for problem in error.problems]}
    except BuilderFailed as error:
        return {"failed": "builder", "errors": error.errors}
    except Cancelled:
        return {"failed": "cancelled"}
    except HywuError as error:
        parts = [error.wrong, error.expected, error.remedy]
        return {"failed": "refused", "class": type(error).__name__, "parts": parts}
    except OSError as error:
        return {"failed": "system", "errno": error.errno, "error": str(error)}
    except Exception as error:
        return {"failed": "internal", "error": f"{type(error).__name__}: {error}"}


def _compile(request: dict[str, Any], log: TextIO, answers: TextIO) -> dict[str, Any]:
    from hywu_export.engines.tensorrt import Settings, TensorRT

    stop = threading.Event()
    threading.Thread(target=_wait_for_end, args=(stop,), daemon=True).start()
    last = 0.0

    def progress(phase: str, done: float) -> bool:
        nonlocal last
        if time.monotonic() - last > 0.1:
            last = time.monotonic()
            _say(answers, {"phase": phase, "progress": done})
        return not stop.is_set()

    start = time.monotonic()
    _say(answers, {"phase": "Parsing", "progress": 0.0})
    tensorrt = TensorRT(request["backend"], log)
    network = tensorrt.parse(Path(request["model"]))
    cache = request.get("timing_cache")
    plan = tensorrt.compile(
        network,
        request["profile"],
        Settings.from_dict(request["settings"]),
        Path(cache) if cache is not None else None,
        progress,
    )
    with open(request["plan"], "xb") as file:
        for piece in _pieces(plan):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return {
        "version": tensorrt.version,
        "network_layers": network.num_layers,
        "seconds": time.monotonic() - start,
        "cpu_seconds": time.process_time(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "inspection": tensorrt.inspect(plan) if request["inspect"] else None,
    }


def _pieces(plan: memoryview) -> Iterator[memoryview]:
    for start in range(0, plan.nbytes, _PIECE):
        yield plan[start : start + _PIECE]


def _wait_for_end(stop: threading.Event) -> None:
    while os.read(0, 1):
        pass
    stop.set()


def _say(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
