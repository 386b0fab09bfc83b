"""``hywu verify``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import (
    Command,
    json_option,
    plural,
    print_json,
    progress_bar,
    require_toolchain,
    source_option,
    table,
)

if TYPE_CHECKING:
    from hywu_export.verify import Check, Report
    from hywu_export.verify.measures import TensorCheck

EXIT_CODES = {None: 0, "shape": 3, "value": 4}


@click.command(cls=Command, short_help="Compare BUNDLE with its checkpoints, and its variants and engines.")
@click.argument("bundle")
@click.option("--base", metavar="DIR", help="The base that the bundle was exported from.")
@click.option("--generator", metavar="DIR", help="The generator that the bundle was exported from.")
@click.option(
    "--variant",
    "variants",
    metavar="NAME",
    multiple=True,
    help="This variant; repeat for more.  [default: all]",
)
@click.option(
    "--engine", "engines", metavar="KEY", multiple=True, help="This engine; repeat for more.  [default: all]"
)
@click.option(
    "--photo", type=click.Path(path_type=Path), metavar="FILE", help="The photo of the whole edits."
)
@click.option("--prompt", metavar="TEXT", help="The instruction of the whole edits.")
@source_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context, bundle: str, base: str | None, generator: str | None, variants: tuple[str, ...],
    engines: tuple[str, ...], photo: Path | None, prompt: str | None, sources: dict[str, str], as_json: bool,
) -> None:  # fmt: skip
    """Compare BUNDLE: its graphs with torch, its variants and engines with its graphs, and whole edits.

    With the checkpoints, every graph is compared with the module that it was traced from, and an edit with
    that of the diffusers pipeline. Each variant, and each engine that this machine can run, is compared
    with the bundle's own FP32 graphs on what these see in real edits, with deltas and without.

    Exits with 3 if a shape is wrong, with 4 if a value is.
    """
    if base is not None or generator is not None:
        require_toolchain()
    from hywu_export.verify import verify as compare

    chosen = {"variants": variants, "engines": engines} if variants or engines else {}
    with progress_bar() as show:
        report = compare(
            bundle, base, generator, show, photo=photo, prompt=prompt, sources=sources, **chosen
        )  # fmt: skip
    if as_json:
        print_json(_plain(report))
    else:
        click.echo(_text(report))
    ctx.exit(EXIT_CODES[report.failure])


def _plain(report: Report) -> dict[str, Any]:
    return {
        "ok": report.failure is None,
        "failure": report.failure,
        "checks": [
            {
                "part": check.part,
                "name": check.name,
                "failure": check.failure,
                "worst": check.worst.tensor,
                "tensors": [_plain_tensor(tensor) for tensor in check.tensors],
            }
            for check in report.checks
        ],
        "notes": list(report.notes),
        "not_run": [{"part": part.part, "reason": part.reason} for part in report.not_run],
    }


def _plain_tensor(tensor: TensorCheck) -> dict[str, Any]:
    return {
        "tensor": tensor.tensor,
        "failure": tensor.failure,
        "tolerance": {"kind": tensor.tolerance.kind, "limit": tensor.tolerance.limit},
        **tensor.measure.to_json(),
        "sizes": dict(tensor.sizes),
        "detail": tensor.detail,
    }


def _text(report: Report) -> str:
    rows = [_row(check) for check in report.checks]
    lines = []
    if rows:
        header = ("", "part", "graph", "largest", "mean", "SQNR", "PSNR", "")
        lines += [table(rows, header, indent=0), ""]
        lines += [
            "Of each graph its worst tensor: differences in units of its largest value, or in levels of a"
        ]
        lines += ["picture; ratios in dB.", ""]
    lines += [f"not run: {part.part}: {part.reason}" for part in report.not_run]
    lines += [f"note: {note}" for note in report.notes]
    failed = sum(check.failure is not None for check in report.checks)
    count = len(rows)
    if failed:
        verdict = f"{failed} of {plural(count, 'check')} failed"
    else:
        verdict = (
            f"{'all ' * (count > 1)}{plural(count, 'check')} passed" if count else "nothing was compared"
        )
    return "\n".join([*lines, verdict])


def _row(check: Check) -> tuple[str, ...]:
    worst = check.worst
    measure, failed = worst.measure, worst.failure is not None
    numbers = ("", "", "", "")
    if math.isnan(measure.largest):
        numbers = ("not finite", "", "", "")
    elif measure.count and measure.largest == 0:
        numbers = ("equal", "", "", "")
    elif measure.count:
        picture = worst.tolerance.kind in ("levels", "psnr_db")
        largest = f"{measure.largest:.0f}" if picture else f"{measure.relative:.1e}"
        mean = f"{measure.mean:.1e}" if picture else f"{measure.mean / (measure.peak or 1):.1e}"
        numbers = (largest, mean, f"{measure.sqnr_db:.1f}", f"{measure.psnr_db:.1f}")
    return ("FAIL" if failed else "ok", check.part, check.name, *numbers, _finding(worst))


def _finding(worst: TensorCheck) -> str:
    """What was allowed, and if that was not met, where."""
    if worst.failure is None:
        return str(worst.tolerance)
    where = ", ".join(f"{axis} {size}" for axis, size in worst.sizes.items())
    at = f" at {where}" if where else ""
    if worst.failure == "shape":
        return f"{worst.tensor}: wrong shape: {worst.detail}{at}"
    return f"{worst.tensor}: {worst.detail or f'expected {worst.tolerance}'}{at}"
