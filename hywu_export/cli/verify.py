"""``hywu verify``."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import (
    Command,
    json_option,
    plural,
    print_json,
    progress_bar,
    require_toolchain,
    table,
)

if TYPE_CHECKING:
    from hywu_export.verify import EditCheck, OutputCheck, Report

EXIT_CODES = {None: 0, "shape": 3, "value": 4}


@click.command(cls=Command, short_help="Compare BUNDLE with its checkpoints.")
@click.argument("bundle")
@click.option("--base", metavar="DIR", help="The base that the bundle was exported from.")
@click.option("--generator", metavar="DIR", help="The generator that the bundle was exported from.")
@json_option
@click.pass_context
def verify(ctx: click.Context, bundle: str, base: str | None, generator: str | None, as_json: bool) -> None:
    """Compare BUNDLE with its checkpoints: every graph with torch, a whole edit with diffusers.

    Exits with 3 if a shape is wrong, with 4 if a value is.
    """
    require_toolchain()
    from hywu_export.verify import verify as compare

    with progress_bar() as show:
        report = compare(bundle, base, generator, show)
    if as_json:
        print_json(_plain(report))
    else:
        click.echo(_text(report))
    ctx.exit(EXIT_CODES[report.failure])


def _plain(report: Report) -> dict[str, Any]:
    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        "ok": report.failure is None,
        "failure": report.failure,
        "outputs": [{key: finite(value) for key, value in asdict(check).items()} for check in report.outputs],
        "edit": None if report.edit is None else asdict(report.edit),
    }


def _text(report: Report) -> str:
    rows = [
        ("ok" if check.failure is None else "FAIL", check.graph, check.output, _finding(check))
        for check in report.outputs
    ]
    if report.edit is not None:
        rows.append(
            (
                "ok" if report.edit.failure is None else "FAIL",
                "whole edit",
                "picture",
                _edit_finding(report.edit),
            )
        )
    failed = sum(row[0] == "FAIL" for row in rows)
    verdict = (
        f"{failed} of {plural(len(rows), 'check')} failed" if failed else f"all {len(rows)} checks passed"
    )
    return f"{table(rows, indent=0)}\n\n{verdict}"


def _finding(check: OutputCheck) -> str:
    levels = float(check.tolerance).is_integer()
    if check.failure == "shape":
        return f"wrong shape: {check.detail}{_at(check)}"
    if check.failure == "value":
        size = f"{check.difference:.0f} levels" if levels else f"{check.difference:.2g} of the largest value"
        return f"differs by up to {size}{_at(check)}"
    return "within 1 level" if levels else f"within {check.tolerance:g} of the largest value"


def _at(check: OutputCheck) -> str:
    return f" at {', '.join(f'{axis} {size}' for axis, size in check.sizes.items())}" if check.sizes else ""


def _edit_finding(edit: EditCheck) -> str:
    if edit.failure == "shape":
        return "the picture has another size than the pipeline's"
    quality = (
        "equal"
        if edit.psnr is None
        else f"PSNR {edit.psnr:.1f} dB, at most {plural(edit.difference, 'level')} apart"
    )
    return f"{quality} ({edit.sampler}, {plural(edit.steps, 'step')}, {edit.size[0]}x{edit.size[1]})"
