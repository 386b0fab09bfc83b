"""Running ``hywu`` in this process, and what is true of every refusal."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from hywu_export.cli import hywu


def run(*arguments: object, code: int | None = 0) -> Result:
    """Runs a command line; the exit code must be ``code``, if one is given."""
    result = CliRunner().invoke(hywu, [str(argument) for argument in arguments])
    if code is not None:
        assert result.exit_code == code, result.stderr or result.stdout
    return result


def answer(*arguments: object, code: int = 0) -> Any:
    """The object that a command prints with ``--json``."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def check_refusal(code: int, stdout: str, stderr: str) -> str:
    """Bad input: exit code 2, a message of three parts, nothing else. Returns the message."""
    assert code == 2, (code, stderr)
    lines = stderr.rstrip("\n").split("\n")
    starts = ("Error: ", "  expected: ", "  to do:    ")
    assert len(lines) == 3, stderr
    for line, start in zip(lines, starts):
        assert line.startswith(start), stderr
        assert len(line) > len(start)
    assert stdout == ""
    return stderr


def refused(*arguments: object) -> str:
    """The message with which a command line is refused, see `check_refusal`."""
    result = run(*arguments, code=None)
    return check_refusal(result.exit_code, result.stdout, result.stderr)


def picture(path: Path, width: int = 24, height: int = 16, mode: str = "RGB", **options: Any) -> Path:
    """Writes a colourful picture in the format of the suffix."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    image.convert(mode).save(path, **options)
    return path


def names(folder: Path) -> set[str]:
    """What lies in a folder, hidden files too."""
    return set(os.listdir(folder))


def copy_tree(source: Path, target: Path, changed: Sequence[str] = ()) -> Path:
    """A copy of hard links, but for the files (by relative path) that are to be changed."""
    import shutil

    def link(file: str, to: str) -> None:
        if os.path.relpath(file, source) in changed:
            shutil.copyfile(file, to)
        else:
            os.link(os.path.realpath(file), to)

    shutil.copytree(source, target, copy_function=link)
    return target
