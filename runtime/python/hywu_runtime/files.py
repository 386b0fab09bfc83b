"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from hywu_runtime.errors import InputError


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls ``write`` with a temporary sibling of ``path`` that then takes its place.

    Raises:
        InputError: the directory cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:64]}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}",
            "Expected a writable directory with room",
            "Choose another path, or free some space",
        ) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
