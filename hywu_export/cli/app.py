"""The group of commands: loading them when they are asked for, and turning errors into exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from hywu_export.cli.common import COMMON, Settings, libraries_quiet
from hywu_runtime import __version__
from hywu_runtime.errors import HywuError

INTERRUPTED = 130  # as a shell reports a process that SIGINT ended

COMMANDS = (
    "demo", "export", "calibrate", "build", "edit", "bench", "plan", "inspect", "deltas", "verify", "doctor",
)  # fmt: skip
"""In the order of ``hywu --help``; command ``x`` is the object ``x`` of the module ``hywu_export.cli.x``."""


class Application(click.Group):
    """A group whose commands are imported when they are looked up."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"hywu_export.cli.{cmd_name}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS:
            raise click.UsageError(f"There is no command {args[0]!r}. Expected {', '.join(COMMANDS)}.", ctx)
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> NoReturn:
        """Runs a command line and exits: 0, 2 for bad input, 3 and 4 from verify, 1 for anything else."""
        settings = Settings()
        extra |= {"standalone_mode": False, "obj": settings, "prog_name": "hywu"}
        try:
            with libraries_quiet(settings):
                code = super().main(args, **extra)
                sys.stdout.flush()
        except BrokenPipeError:
            # The reader has gone, which is its right. Python would complain again when it flushes at exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            click.echo("Interrupted.", err=True)
            code = INTERRUPTED
        except Exception as error:
            code = _report(error, settings.debug)
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: Exception, debug: bool) -> int:
    """Says on stderr what went wrong; the exit code."""
    if debug:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if isinstance(error, HywuError):
        click.echo(describe(error), err=True)
        return error.exit_code
    text = " ".join(f"{type(error).__name__}: {error}".split())
    hint = "" if debug else " (run again with --debug for the traceback)"
    click.echo(f"Internal error: {text[:500]}{hint}", err=True)
    return 1


def describe(error: HywuError) -> str:
    """The parts of an error's message, each on a line of its own."""
    lines = [f"Error: {error.wrong}"]
    if error.expected:
        lines.append(f"  expected: {error.expected.removeprefix('Expected ')}")
    if error.remedy:
        lines.append(f"  to do:    {error.remedy}")
    return "\n".join(lines)


@click.command(
    cls=Application,
    params=list(COMMON),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hywu")
def hywu() -> None:
    """Image editors with per-request weight deltas: exported as bundles, run without PyTorch."""


def main() -> NoReturn:
    """The entry point ``hywu``."""
    hywu.main()
