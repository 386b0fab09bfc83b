"""Exports, and says what that took: time, the process's largest memory, new bytes.

    python -m tools.measure_export BUNDLE --base DIR --targets to_q,to_v --link-weights
    python -m tools.measure_export BUNDLE --generator DIR --link-weights

The result is JSON on stdout.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path

import click

from hywu_export import ExportOptions, export
from hywu_export.bundle.sources import SafetensorsIndex

_folder = click.Path(path_type=Path)


@click.command(help=__doc__)
@click.argument("bundle", type=_folder)
@click.option("--base", type=_folder)
@click.option("--generator", type=_folder)
@click.option("--targets", default="", help="Module patterns, separated by commas.")
@click.option("--max-rank", default=16, show_default=True)
@click.option("--link-weights", is_flag=True)
@click.option("--stages", default=1, show_default=True)
def main(
    bundle: Path,
    base: Path | None,
    generator: Path | None,
    targets: str,
    max_rank: int,
    link_weights: bool,
    stages: int,
) -> None:
    options = ExportOptions(
        targets=tuple(filter(None, targets.split(","))),
        max_rank=max_rank,
        link_weights=link_weights,
        stages=stages,
    )
    marks: list[tuple[str, float, float]] = []

    def progress(what: str, done: int, total: int) -> None:
        marks.append((what, time.process_time(), _peak()))
        print(f"{done}/{total} {what}", file=sys.stderr)

    start = time.perf_counter()
    export(bundle, base, generator, options, progress)
    seconds = time.perf_counter() - start
    stages = {
        what: {"cpu_seconds": round(after - before, 1), "peak_bytes": int(peak)}
        for (what, before, _), (_, after, peak) in pairwise(marks)
    }
    measured = {
        **_checkpoint([folder for folder in (base, generator) if folder is not None]),
        "new_bytes": sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
        "peak_bytes": int(_peak()),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "stages": stages,
    }
    print(json.dumps(measured, indent=1))


def _checkpoint(folders: list[Path]) -> dict[str, int]:
    """Size of the weights in ``folders``, from the headers of their files."""
    files = [file for folder in folders for file in folder.rglob("*.safetensors")]
    tensors = [tensor for file in files for tensor in SafetensorsIndex.from_file(file).values()]
    return {
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "checkpoint_bytes": sum(tensor.length for tensor in tensors),
    }


def _peak() -> float:
    """The largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
