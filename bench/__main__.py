"""Runs the peers in pairs with this project's edits, in turn, and reports ratios pair by pair.

    python -m bench --subject demo --subject 860m --subject generator [--rounds 5] [--peer NAME] [--json FILE]

Each round, both edit with a LoRA that the last round did not have. First what both make is compared: times of
different pictures are not compared. The models are made in ``out/bench`` (860m: 4.3 GB).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.generators import make_generator
from bench.peers import GENERATORS, PEERS
from bench.subjects import ROOT, make
from bench.workers import Worker
from hywu_export.benchmark.plots import milliseconds

MOST_LEVELS = 2  # by which pictures may differ: diffusers rounds elsewhere
NARROW = {"int8"}
"""Peers whose pictures differ: their ranges are not calibrated here."""
REFERENCE = "winograd"
"""This project, as it is exported for CPUs."""
REFERENCES = {
    "batch-four-sets": "batch-one-set",
    "batch-one-set": "low-rank",
    "merged": "low-rank",
}
"""What peers of this project itself are compared with: they differ in one thing."""


@click.command(help=__doc__)
@click.option(
    "--subject", "names", multiple=True, type=click.Choice(["demo", "860m", "generator"]), default=["demo"]
)
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(PEERS)))
@click.option("--reference", type=click.Choice(list(PEERS)), help="What peers are compared with.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--side", type=int, help="Of the picture, in pixels (demo: 128, 860m: 256).")
@click.option("--steps", type=int, help="Of an edit (8).")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "out" / "bench")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where all numbers go.")
def main(
    names: tuple[str, ...],
    peers: tuple[str, ...],
    reference: str | None,
    rounds: int,
    side: int | None,
    steps: int | None,
    threads: int,
    out: Path,
    file: Path | None,
) -> None:
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": _machine(), "threads": threads}
    for name in names:
        if name == "generator":
            found[name] = _generator(out / name, rounds, threads)
            continue
        subject = make(name, out, side, steps, threads)
        print(f"\n{name}: {subject.side}x{subject.side}, {subject.steps} steps, {threads} threads\n")
        found[name] = {"side": subject.side, "steps": subject.steps, "peers": {}}
        print(f"{'':16}{'step':>9}{'ratio':>8}{'edit':>9}{'ratio':>8}{'change':>10}{'ratio':>9}{'peak':>8}")
        for peer in peers or [p for p in PEERS if p != REFERENCE]:
            result = compare(subject, reference or REFERENCES.get(peer, REFERENCE), peer, rounds)
            found[name]["peers"][peer] = result
            _show(peer, result)
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n")


def _generator(out: Path, rounds: int, threads: int) -> dict[str, Any]:
    subject = make_generator(out, threads)
    print(f"\ngenerator: {threads} threads\n")
    peers = {}
    for peer in [p for p in GENERATORS if p != "generator"]:
        peers[peer] = compare(subject, "generator", peer, rounds)
        _show(peer, peers[peer])
    return {"peers": peers}


def compare(subject: Any, reference: str, peer: str, rounds: int) -> dict[str, Any]:
    """Times of both in every round, the medians, and the ratios of the peer's over the reference's."""
    with Worker(reference, subject) as ours, Worker(peer, subject) as other:
        for worker in (ours, other):
            worker.edit(0)
            worker.edit(1)
        levels = _difference(ours, other)
        if levels is not None and levels > MOST_LEVELS and not {peer, reference} & NARROW:
            raise click.ClickException(
                f"{peer} makes another picture than {reference}: {levels} levels apart"
            )
        times: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
        for number in range(rounds):
            pair = [("ours", ours), ("peer", other)]
            for key, worker in pair if number % 2 == 0 else pair[::-1]:
                times[key].append(_with_change(worker.edit(number % 2)))
        medians, own = _medians(times["peer"]), _medians(times["ours"])
        ratios = {
            key: statistics.median(p[key] / o[key] for p, o in zip(times["peer"], times["ours"]))
            for key in times["peer"][0]
            if key != "change" and all(o.get(key, 0) > 0 for o in times["ours"])
        }
        if "change" in medians and "change" in own:
            ratios["change"] = medians["change"] / own["change"]
        return {
            "reference": reference,
            "levels_apart": levels,
            "medians": medians,
            "reference_medians": own,
            "ratios": ratios,
            "peak_bytes": other.peak_bytes(),
            "reference_peak_bytes": ours.peak_bytes(),
            "load": other.load_seconds,
            "rounds": times,
        }


def _with_change(times: dict[str, float]) -> dict[str, float]:
    """``change``: the cost of new deltas, swap + first step - steady step."""
    if "swap" not in times:
        return times
    return times | {"change": times["swap"] + times["first"] - times["steady"]}


def _medians(times: list[dict[str, float]]) -> dict[str, float]:
    """The change is at least the swap: the first step saves nothing, times only scatter."""
    found = {key: statistics.median(t[key] for t in times) for key in times[0]}
    return found | ({"change": max(found["change"], found["swap"])} if "change" in found else {})


def _difference(first: Worker, second: Worker) -> int | None:
    """By how many levels the pictures of the last edits differ."""
    one, two = first.picture(), second.picture()
    return None if one is None or two is None else int(np.abs(np.int16(one) - np.int16(two)).max())


def _show(peer: str, result: dict[str, Any]) -> None:
    line = f"{peer:16}"
    for key, width in (("steady", 9), ("edit", 9), ("change", 10)):
        value, ratio = result["medians"].get(key), result["ratios"].get(key)
        line += f"{milliseconds(value) if value is not None else '-':>{width}}"
        line += f"{f'{ratio:.2f}' if ratio is not None else '-':>{9 if key == 'change' else 8}}"
    print(f"{line}{result['peak_bytes'] / 1e9:>6.2f}GB", flush=True)
    mine = dict.fromkeys(("steady", "edit", "change"), "")
    mine |= {key: milliseconds(value) for key, value in result["reference_medians"].items()}
    print(
        f"  {result['reference']:14}{mine['steady']:>9}{mine['edit']:>17}{mine['change']:>18}{'':9}"
        f"{result['reference_peak_bytes'] / 1e9:>6.2f}GB",
        flush=True,
    )


def _machine() -> dict[str, Any]:
    from importlib.metadata import version

    from hywu_export.benchmark.machine import Machine

    packages = ("torch", "diffusers", "peft", "onnxruntime", "numpy")
    return {
        "record": Machine().record(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "load_before": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(main())
