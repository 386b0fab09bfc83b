"""The tables of docs/performance.md, and its plots, from what ``python -m bench --json`` wrote.

    python -m bench.report FILE.json … [--plots docs/performance]

Prints Markdown; of what several files measured, the last counts. A plot has a bar for each peer: its time
over that of this project's edits, so that what is right of the line is slower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import click

from hywu_export.benchmark.plots import milliseconds

NAMES = {
    "low-rank": "this project, without Winograd",
    "int8": "this project, INT8",
    "merged": "without Winograd, merged",
    "peft": "diffusers + PEFT",
    "hotswap": "diffusers, hotswap",
    "compiled": "diffusers, hotswap, compiled",
    "ort-adapter": "ONNX Runtime LoraAdapter",
    "new-session": "merged, new session",
    "batch-one-set": "batch 4, one set",
    "batch-four-sets": "batch 4, four sets",
    "generator-eager": "PyTorch eager",
    "generator-plain": "without constants",
}
FIGURES = {"steady": "a step", "edit": "a whole edit", "swap": "bringing deltas in", "change": "new deltas"}


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--plots", type=click.Path(path_type=Path), help="The folder that SVG files go to.")
def main(files: tuple[Path, ...], plots: Path | None) -> None:
    found = [json.loads(file.read_text()) for file in files]
    for name in ("demo", "860m", "generator"):
        peers = {
            title(peer, result): result
            for measured in found
            for peer, result in measured.get(name, {"peers": {}})["peers"].items()
        }
        if not peers:
            continue
        print(f"\n{name}\n\n{table(peers)}")
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            for key, figure in FIGURES.items():
                ratios = {
                    peer: result["ratios"][key]
                    for peer, result in peers.items()
                    if key in result["ratios"] and result["reference"] in ("winograd", "generator")
                    and not peer.startswith("batch")
                }  # fmt: skip
                if ratios:
                    (plots / f"{name}-{key}.svg").write_text(bars(ratios, f"{name}: {figure}, times ours"))


def title(peer: str, result: Mapping[str, Any]) -> str:
    """A row's name; what a peer is compared with is said where it is a narrow form of this project."""
    return NAMES[peer] + (", beside INT8" if result["reference"] == "int8" else "")


def table(peers: Mapping[str, Any]) -> str:
    """Medians, and the median of the ratios pair by pair, of every peer over its reference; by title."""
    keys = [key for key in FIGURES if any(key in result["medians"] for result in peers.values())]
    head = "".join(f" {FIGURES[key]} | ours beside it | ratio |" for key in keys)
    lines = [f"| |{head} peak memory | ours |", f"|---|{'---|' * (3 * len(keys) + 2)}"]
    for peer, result in peers.items():
        cells = ""
        for key in keys:
            theirs, ours = result["medians"].get(key), result["reference_medians"].get(key)
            if theirs is None or key not in result["ratios"]:
                cells += " | | |"
                continue
            cells += f" {milliseconds(theirs)} | {milliseconds(ours)} | {ratio(result['ratios'][key])} |"
        peaks = (f"{result[key] / 1e9:.2f} GB" for key in ("peak_bytes", "reference_peak_bytes"))
        lines.append(f"| {peer} |{cells} {' | '.join(peaks)} |")
    return "\n".join(lines)


def ratio(value: float) -> str:
    """With three figures."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def bars(ratios: Mapping[str, float], heading: str) -> str:
    """A bar for each ratio, on a logarithmic scale with a line at 1."""
    low = min(0.5, *ratios.values())
    high = max(4.0, *ratios.values())
    left, right, row = 230.0, 700.0, 30.0

    def x(value: float) -> float:
        share = math.log(value / low) / math.log(high / low)
        return left + share * (right - left)

    height = 50 + row * len(ratios)
    parts = [
        f'<rect width="800" height="{height}" fill="#fff"/>',
        f'<text x="16" y="24" font-weight="600">{escape(heading)}</text>',
        f'<line x1="{x(1):.1f}" y1="36" x2="{x(1):.1f}" y2="{height - 6}" stroke="#444"/>',
    ]
    for index, (name, value) in enumerate(ratios.items()):
        top = 44 + row * index
        start, end = sorted((x(1), x(value)))
        colour = "#b3541e" if value > 1 else "#2f6f4f"
        place = end + 6  # beside the line where a bar lies left of it: the names are there
        parts += [
            f'<text x="{left - 14}" y="{top + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{start:.1f}" y="{top}" width="{max(end - start, 1):.1f}" height="18" rx="2" '
            f'fill="{colour}"/>',
            f'<text x="{place:.1f}" y="{top + 14}">{ratio(value)} ×</text>',
        ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" font-family="sans-serif" '
        f'font-size="14" fill="#222">\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
