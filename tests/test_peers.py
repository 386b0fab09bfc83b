"""`python -m bench`: what it compares, and what its report says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
import pytest
from click.testing import CliRunner

from bench import __main__ as peers
from bench import report

Times = dict[str, float]


class Worker:
    """In the place of a process: times in turn, and a picture of one colour."""

    times: ClassVar[dict[str, list[Times]]] = {}
    colours: ClassVar[dict[str, int | None]] = {}
    order: ClassVar[list[str]] = []

    def __init__(self, peer: str, subject: Any):
        self.peer, self.load_seconds = peer, 0.0
        self.left: Iterator[Times] = iter(self.times[peer])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None: ...

    def edit(self, number: int) -> Times:
        self.order.append(self.peer)
        return dict(next(self.left))

    def picture(self) -> np.ndarray | None:
        colour = self.colours[self.peer]
        return None if colour is None else np.full((2, 2, 3), colour, np.uint8)

    def peak_bytes(self) -> int:
        return 10**9


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> type[Worker]:
    monkeypatch.setattr(peers, "Worker", Worker)
    monkeypatch.setattr(Worker, "order", [])
    return Worker


def edit(steady: float, first: float = 2.0, swap: float = 0.5) -> Times:
    return {"swap": swap, "first": first, "steady": steady, "edit": 4 * steady}


def test_ratios_are_of_pairs_and_warm_ups_do_not_count(
    worker: type[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = [edit(100.0), edit(100.0)]
    monkeypatch.setattr(
        worker,
        "times",
        {
            "winograd": [*warm, edit(1.0), edit(2.0), edit(4.0)],
            "peft": [*warm, edit(2.0), edit(6.0), edit(8.0)],
        },
    )
    monkeypatch.setattr(worker, "colours", {"winograd": 7, "peft": 9})
    found = peers.compare(None, "winograd", "peft", rounds=3)
    assert found["levels_apart"] == 2
    assert found["ratios"]["steady"] == 2.0  # of 2, 3 and 2, not 6 over 2
    assert found["medians"]["steady"] == 6.0
    assert found["reference_medians"]["change"] == 0.5  # the first step saves nothing
    assert worker.order[4:] == ["winograd", "peft", "peft", "winograd", "winograd", "peft"]


def test_other_pictures_are_not_timed(worker: type[Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "times", {"winograd": [edit(1.0)] * 3, "peft": [edit(1.0)] * 3})
    monkeypatch.setattr(worker, "colours", {"winograd": 7, "peft": 10})
    with pytest.raises(click.ClickException, match="3 levels apart"):
        peers.compare(None, "winograd", "peft", rounds=1)


def result(steady: float, reference: str = "winograd") -> dict[str, Any]:
    return {
        "reference": reference,
        "medians": {"steady": steady},
        "reference_medians": {"steady": 1.0},
        "ratios": {"steady": steady},
        "peak_bytes": 2_000_000_000,
        "reference_peak_bytes": 1_500_000_000,
    }


def test_a_report_of_several_files(tmp_path: Path) -> None:
    files = []
    for number, found in enumerate(
        ({"peft": result(3.0), "hotswap": result(0.5)}, {"peft": result(4.0)}, {"peft": result(5.0, "int8")})
    ):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps({"demo": {"peers": found}}))
    ran = CliRunner().invoke(report.main, [*map(str, files), "--plots", str(tmp_path / "plots")])
    assert ran.exit_code == 0, ran.output
    rows = [line for line in ran.output.splitlines() if line.startswith("| diffusers")]
    assert rows == [
        "| diffusers + PEFT | 4.00 s | 1.00 s | 4.00 | 2.00 GB | 1.50 GB |",
        "| diffusers, hotswap | 500 ms | 1.00 s | 0.50 | 2.00 GB | 1.50 GB |",
        "| diffusers + PEFT, beside INT8 | 5.00 s | 1.00 s | 5.00 | 2.00 GB | 1.50 GB |",
    ]
    plot = (tmp_path / "plots" / "demo-steady.svg").read_text()
    assert "4.00 ×" in plot
    assert "beside INT8" not in plot
