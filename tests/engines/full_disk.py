"""The worker, on a disk that is full when a plan is written."""

from __future__ import annotations

import builtins
import errno
from typing import Any

from hywu_export.engines import worker

_open = builtins.open


class _Full:
    def __init__(self, file: Any):
        self._file = file

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def _open_full(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
    file = _open(path, mode, *more, **named)
    return _Full(file) if mode == "xb" else file


if __name__ == "__main__":
    builtins.open = _open_full  # type: ignore[assignment]
    worker.main()
