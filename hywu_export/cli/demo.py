"""``hywu demo``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import click

from hywu_export.cli.common import Command, progress_bar, require_toolchain
from hywu_runtime.errors import InputError


@click.command(cls=Command)
@click.option(
    "--out", metavar="DIR", default="out", show_default=True, help="Where the bundle and the pictures go."
)
def demo(out: str) -> None:
    """Export the demo pair and edit photographs with it.

    This needs the checkout of the project: the pair and the photographs are not installed.
    """
    here = Path.cwd()
    if not (here / "demo" / "run.py").is_file():
        raise InputError(
            f"There is no demo in {here}",
            "Expected a checkout of the project, with demo/run.py",
            "Change to the checkout and run `hywu demo` there",
        )
    require_toolchain()
    sys.path.insert(0, str(here))
    with progress_bar() as show:
        import_module("demo.run").run(Path(out), show)
