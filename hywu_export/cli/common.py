"""What commands share: options, checks of arguments, and what the terminal shows while they work."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hywu_runtime.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from hywu_export.deltas.catalogue import Resolved

F = TypeVar("F", bound=Callable[..., Any])
Progress = Callable[[str, int, int], None]


@dataclass
class Settings:
    """What the common options say; the object of click's context."""

    debug: bool = False
    verbose: int = 0

    @property
    def log_level(self) -> int:
        return {0: logging.WARNING, 1: logging.INFO}.get(self.verbose, logging.DEBUG)


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    settings = ctx.ensure_object(Settings)
    settings.debug = settings.debug or value


def _set_verbose(ctx: click.Context, _: click.Parameter, value: int) -> None:
    settings = ctx.ensure_object(Settings)
    settings.verbose = max(settings.verbose, value)
    logging.getLogger().setLevel(settings.log_level)


COMMON: tuple[click.Parameter, ...] = (
    click.Option(
        ["-v", "--verbose"], count=True, expose_value=False, is_eager=True, callback=_set_verbose,
        help="Log what happens to stderr; -vv also what libraries say.",
    ),
    click.Option(
        ["--debug"], is_flag=True, expose_value=False, is_eager=True, callback=_set_debug,
        help="Show tracebacks.",
    ),
)  # fmt: skip
"""Options of ``hywu`` and of every command."""


class _Scale(click.ParamType):  # type: ignore[type-arg]  # not generic in every click
    """``X``, the guidance scale called ``text``, or ``NAME=X``."""

    name = "[NAME=]X"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, equals, number = str(value).rpartition("=")
        try:
            return (name if equals else "text"), float(number)
        except ValueError:
            raise InputError(
                f"The guidance {value!r} is no scale", "Expected a number, or NAME=NUMBER", "Correct it"
            ) from None


SCALE = _Scale()


class Command(click.Command):
    """A command that also has the common options."""

    def __init__(self, *args: Any, **extra: Any):
        super().__init__(*args, **extra)
        self.params += COMMON


class CommandGroup(click.Group):
    """A group of commands that have the common options."""

    command_class = Command


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def source_option(function: F) -> F:
    """``--source ID=DIR`` as a mapping ``sources``."""
    return click.option(
        "--source", "sources", metavar="ID=DIR", multiple=True, callback=_parse_sources,
        help="Where the checkpoint of a source with linked weights is; repeat for each.",
    )(function)  # fmt: skip


def _parse_sources(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not (name and equals and folder) or name in sources:
            raise InputError(
                f"--source {value!r} is not understood", "Expected ID=DIR, each ID once", "Correct it"
            )
        sources[name] = folder
    return sources


def weighted(text: str) -> tuple[str, float]:
    """``FILE:WEIGHT``, or ``FILE`` with weight 1."""
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return file, float(weight)
    except ValueError:
        return text, 1.0


def lora_report(lora: Resolved, weight: float = 1.0) -> dict[str, Any]:
    """What was found in a LoRA file, for ``--json``."""
    return {
        "file": str(lora.path),
        "spelling": lora.spelling,
        "modules": len(lora.pairs),
        "rank": lora.rank,
        "weight": weight,
    }


def lora_line(report: Mapping[str, Any]) -> str:
    """The same for people."""
    weight = "" if report["weight"] == 1 else f", weight {report['weight']:g}"
    what = f"{report['spelling']}, {plural(report['modules'], 'module')}, rank {report['rank']}{weight}"
    return f"{report['file']}: {what}"


def check_output(path: Path, *others: Path) -> None:
    """Refuses, before any work is done, an output that cannot be written, or that is one of the ``others``.

    Raises:
        InputError: naming the path.
    """
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a directory" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise InputError(
            f"{path} {wrong}", "Expected the path of a file in a folder that exists", "Correct the path"
        )
    for other in others:
        if path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other)):
            raise InputError(
                f"{path} is to be written, and is also {other}",
                "Expected another path for the result",
                "Choose another one",
            )


def require_toolchain() -> None:
    """Imports the packages of the extra ``export``, and keeps their progress bars off the terminal.

    Raises:
        UnsupportedError: naming the package.
    """
    for package in ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise UnsupportedError(
                f"The package {package} cannot be imported ({error})",
                "Expected the toolchain, which this command needs and the runtime does not",
                "pip install 'hywu-export[export]'",
            ) from error
    for package in ("diffusers", "transformers"):
        import_module(f"{package}.utils.logging").disable_progress_bar()


@contextmanager
def libraries_quiet(settings: Settings) -> Iterator[None]:
    """Logs go to stderr, one line each; those of libraries, and warnings, only if they were asked for.

    The variables are read by libraries when they are imported, which is later. Nothing is ever fetched.
    """
    variables = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    root, handler = logging.getLogger(), _Echo(settings)
    level = root.level
    root.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = handler.warning
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(level)


class _Echo(logging.Handler):
    """Log records on stderr, as a user wants to read them."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings

    def filter(self, record: logging.LogRecord) -> bool:
        own = record.name.startswith("hywu")
        return record.levelno >= self.settings.log_level and (own or self.settings.verbose > 1)

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"{record.levelname.capitalize()}: {record.getMessage()}", err=True)

    def warning(self, message: Warning | str, *where: Any, **_: Any) -> None:
        if self.settings.verbose > 1:
            click.echo(f"Warning: {message}", err=True)


@contextmanager
def progress_bar(time_left: bool = False) -> Iterator[Progress]:
    """``show(what, done, total)`` draws a bar on stderr if that is a terminal, and does nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    bars: list[Any] = []

    def show(what: str, done: int, total: int) -> None:
        if bars and bars[0].length != total:  # another piece of work: a bar of its own
            bars.pop().__exit__(None, None, None)
        if not bars:
            bars.append(
                click.progressbar(
                    length=total,
                    file=sys.stderr,
                    item_show_func=lambda item: item,
                    show_eta=time_left,
                    width=30,
                )
            )
            bars[0].__enter__()
        bars[0].update(done - bars[0].pos, what)

    try:
        yield show
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; numbers that JSON lacks are null already."""
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def printable(text: object) -> str:
    """Text from a file without what would move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = (), indent: int = 2) -> str:
    """Columns side by side: numbers to the right, texts to the left."""
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = [list(header), *cells] if header else cells
    widths = [max(map(len, column)) for column in zip(*lines)]
    numbers = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(widths))]
    return "\n".join(
        " " * indent
        + "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numbers)
        ).rstrip()
        for line in lines
    )


def size_text(size: float) -> str:
    """Bytes for people, in powers of 1000: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def time_text(seconds: float) -> str:
    """Seconds for people: ``0.42 s``, ``12.3 s``, ``3 min 05 s``."""
    if seconds >= 60:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def plural(count: int, word: str) -> str:
    """``1 graph``, ``2 graphs``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
