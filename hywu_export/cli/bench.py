"""``hywu bench``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import Command, check_output, progress_bar, size_text, source_option, table
from hywu_runtime.errors import InputError

if TYPE_CHECKING:
    from hywu_export.benchmark.measure import Case

_NUMBERS = ("batch", "steps", "threads")
_SWEPT = (*_NUMBERS, "size", "variant")


@click.command(cls=Command, short_help="Measure each stage of an edit, and the cost of new deltas.")
@click.argument("bundle")
@click.option("--backend", metavar="NAME", default="auto", show_default=True, help="See `hywu doctor`.")
@click.option("--variant", metavar="NAME", help="A precision variant of the bundle.")
@click.option("--engine", metavar="KEY", help="One of the bundle's engines.  [default: the newest that fits]")
@click.option("--device", type=int, metavar="N", help="Index of the GPU.")
@click.option("--threads", type=int, metavar="N", help="CPU threads.")
@click.option("--low-memory", is_flag=True, help="Hold one stage of the model in memory at a time.")
@click.option("--steps", type=int, metavar="N", help="Steps of the scheduler.  [default: 20, or near]")
@click.option("--scheduler", metavar="NAME", help="One of the bundle's schedulers.  [default: its first]")
@click.option("--batch", type=int, metavar="N", default=1, show_default=True, help="Photos in one edit.")
@click.option("--size", metavar="WxH", help="Size of the picture.  [default: the bundle's]")
@click.option("--photo", metavar="FILE", help="Edit this photo.  [default: a gradient]")
@click.option("--prompt", metavar="TEXT", default="make it sepia", show_default=True, help="The instruction.")
@click.option(
    "--sweep", "sweeps", metavar="NAME=A,B", multiple=True,
    help="Measure every value: batch, size, steps, threads, variant; repeat for all combinations.",
)  # fmt: skip
@click.option(
    "--duration",
    type=float,
    metavar="S",
    default=10.0,
    show_default=True,
    help="Seconds of edits to measure.",
)
@click.option(
    "--compare", metavar="OLD.json", multiple=True, help="Compare with earlier figures; repeat for a history."
)
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the figures, schema hywu.bench/1; - prints them."
)
@click.option("--report", metavar="FILE", help="Write a page with plots.")
@source_option
def bench(
    bundle: str, backend: str, variant: str | None, engine: str | None, device: int | None,
    threads: int | None, low_memory: bool, steps: int | None, scheduler: str | None, batch: int,
    size: str | None, photo: str | None, prompt: str, sweeps: tuple[str, ...], duration: float,
    compare: tuple[str, ...], json_file: str | None, report: str | None, sources: dict[str, str],
) -> None:  # fmt: skip
    """Measure each stage of an edit with BUNDLE, and what new deltas cost.

    \b
    hywu bench out/bundle --steps 20 --json now.json --report now.html
    hywu bench out/bundle --sweep batch=1,4 --sweep size=256x256,512x512
    """
    import json

    from hywu_export.benchmark import files, html
    from hywu_export.benchmark.measure import Case, sweep

    for path in (json_file, report):
        if path is not None and path != "-":
            check_output(Path(path), Path(bundle))
    old = [(Path(path).stem, files.read(path)) for path in compare]
    case = Case(
        backend, variant, engine, device, threads, low_memory, steps, scheduler, batch,
        size, prompt, photo, duration, sources,
    )  # fmt: skip
    cases = _cases(case, sweeps)
    with progress_bar() as show:
        result = sweep(bundle, cases, show)
    if json_file is not None and json_file != "-":
        files.write(json_file, result)
    if report is not None:
        files.write_text(report, html.render(result, old))
    if json_file == "-":
        click.echo(json.dumps(result, indent=1, allow_nan=False))
        return
    click.echo(_text(result))
    for name, earlier in old:
        click.echo(_comparison(name, earlier, result))
    for warning in result["warnings"]:
        click.echo(f"Warning: {warning}", err=True)


def _cases(case: Case, sweeps: tuple[str, ...]) -> list[tuple[dict[str, Any], Case]]:
    """Every combination of the values that are swept, with the case that it is."""
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        name, equals, values = text.partition("=")
        if not equals or not all(values.split(",")) or name in axes:
            raise InputError(
                f"--sweep {text!r} is not understood", "Expected NAME=A,B with each NAME once", "Correct it"
            )
        if name not in _SWEPT:
            why = (
                "; the rank is fixed when a bundle is exported: measure one of each" if name == "rank" else ""
            )
            raise InputError(
                f"--sweep cannot vary {name!r}{why}", f"Expected {', '.join(_SWEPT)}", "Choose one of these"
            )
        axes[name] = values.split(",")
    readers: Mapping[str, Callable[[str], Any]] = {
        "size": str,
        "variant": lambda value: None if value in ("none", "fp32") else value,
    }
    cases = []
    for combination in itertools.product(*axes.values()):
        changes: dict[str, Any] = {}
        shown: dict[str, Any] = {}
        for name, value in zip(axes, combination):
            changes[name] = shown[name] = readers.get(name, _number)(value)
            if name == "variant":
                shown[name] = value
        cases.append((shown, replace(case, **changes)))
    return cases


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{text!r} is no number", "Expected whole numbers", "Correct --sweep") from None


def _text(result: Mapping[str, Any]) -> str:
    from hywu_export.benchmark.html import headline
    from hywu_export.benchmark.plots import milliseconds as ms

    lines = [headline(result), ""]
    columns = ("p50", "p90", "p95", "p99", "mean")
    rows = [
        (
            name.replace("_", " "),
            n["count"],
            *(ms(n[c]).rjust(9) for c in columns),
            f"{n['variation']:.1%}".rjust(7),
        )
        for name, n in result["stages"].items()
    ]
    lines.append(table(rows, ("stage", "count", *(c.rjust(9) for c in columns), "spread".rjust(7))))
    facts: list[tuple[object, ...]] = [("edits per second", f"{result['edits_per_second']:.3g}")]
    change = result["delta_change"]
    if "with_generate" in change:
        facts.append(("new deltas, generated", ms(change["with_generate"]["p50"])))
    if "without_generate" in change:
        cost = f"{ms(change['without_generate']['p50'])}, {change['of_a_step']:.1%} of a step"
        facts.append(("new deltas, given", cost))
    overhead = result["delta_overhead"]
    known = "ratio" in overhead
    facts.append(
        ("deltas in a step", f"{overhead['ratio']:+.1%}" if known else f"not measured: {overhead['skipped']}")
    )
    for meter in result["energy"]:
        facts.append(
            (
                f"energy of the {meter['of']}",
                f"{meter['joules_per_edit']:.3g} J an edit, {meter['watts']:.1f} W",
            )
        )
    facts.append(("peak memory", size_text(result["peak_memory"])))
    if "memory_used" in result.get("device", {}):
        facts.append(("GPU memory", size_text(result["device"]["memory_used"])))
    cold = result["cold"]
    facts.append(("first edit", f"{ms(cold['first_edit'])}, of which {ms(cold['load'])} loading graphs"))
    lines += ["", table(facts)]
    if "sweep" in result:
        cells = [
            (
                *(case["values"].values()),
                ms(case["result"]["stages"]["edit"]["p50"]).rjust(9),
                f"{case['result']['edits_per_second']:.3g}".rjust(8),
            )
            for case in result["sweep"]
        ]
        header = (*result["sweep"][0]["values"], "edit p50".rjust(9), "edits/s".rjust(8))
        lines += ["", table(cells, header)]
    return "\n".join(lines)


def _comparison(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    from hywu_export.benchmark.files import differences, ratios
    from hywu_export.benchmark.plots import milliseconds as ms

    rows = [
        (stage.replace("_", " "), ms(before).rjust(9), ms(after).rjust(9), f"{after / before:.3f}".rjust(10))
        for stage, (before, after) in ratios(old, new).items()
        if before > 0
    ]
    lines = ["", f"beside {name}, p50", table(rows, ("stage", "then".rjust(9), "now".rjust(9), "now / then"))]
    lines += [f"  differs: {text}" for text in differences(old, new)]
    return "\n".join(lines)
