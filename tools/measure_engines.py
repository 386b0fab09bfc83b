"""Builds engines of a bundle's variants, and says what each took: a row of a table for every graph.

    python -m tools.measure_engines BUNDLE --variant fp16 --variant bf16 --compute-capability 75 \
        --compute-capability 80,86,89,120

Every variant is built for every list of compute capabilities, with the default shapes. Each graph is compiled
in a process of its own; *memory* is the largest resident set of that process. Prints a table in Markdown.
"""

from __future__ import annotations

from pathlib import Path

import click

from hywu_export.cli.common import size_text
from hywu_export.engines import BuildOptions, build
from hywu_export.engines.devices import parse_capabilities
from hywu_runtime.errors import HywuError


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--variant", "variants", multiple=True, help="A variant, or fp32 for the bundle's own graphs.")
@click.option("--compute-capability", "lists", multiple=True, default=("80,86,89,120",), show_default=True)
@click.option("--graph", "graphs", multiple=True)
def main(bundle: Path, variants: tuple[str, ...], lists: tuple[str, ...], graphs: tuple[str, ...]) -> None:
    click.echo("| variant | for | graph | CPU seconds | seconds | size | memory | products |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for variant in variants:
        for text in lists:
            options = BuildOptions(
                compute_capabilities=parse_capabilities(text),
                variant=None if variant == "fp32" else variant,
                graphs=graphs,
            )
            try:
                report = build(bundle, options).report
            except HywuError as error:
                click.echo(f"| {variant} | {text} | refused: {error} |")
                continue
            for graph, of in report["graphs"].items():
                products = ", ".join(f"{count} {dtype}" for dtype, count in of.get("products", {}).items())
                cells = [f"{of['cpu_seconds']:.1f}", f"{of['seconds']:.1f}", size_text(of["plan_bytes"])]
                cells += [size_text(of["peak_bytes"]), products or "none"]
                click.echo(f"| {variant} | {text} | {graph} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
