"""hywu-edit beside `hywu edit`, and hywu-bench."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PHOTO = ROOT / "demo" / "photos" / "coffee.jpg"
SMALL = ["--size", "64x64"]


@pytest.fixture(scope="module")
def tool(executable: Callable[[str], Path], onnxruntime_library: Path) -> Callable[..., Any]:
    def run(name: str, *arguments: object, code: int = 0) -> Any:
        environment = {**os.environ, "HYWU_ONNXRUNTIME_LIBRARY": str(onnxruntime_library)}
        result = subprocess.run(
            [executable(name), *map(str, arguments)], capture_output=True, text=True, env=environment
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result

    return run


def python(*arguments: object) -> None:
    command = [Path(sys.executable).parent / "hywu", "edit", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


@pytest.mark.slow
def test_hywu_edit_writes_the_picture_of_hywu_edit(tool: Any, demo_bundle: Path, tmp_path: Path) -> None:
    flags = [
        "--steps", 3, "--seed", 7, "--guidance", 5, "--guidance", "image=1.3", "--negative-prompt", "ugly",
        "--delta-strength", 0.8, "--threads", 2, *SMALL,
    ]  # fmt: skip
    ours, theirs = tmp_path / "cpp.png", tmp_path / "python.png"
    deltas, other = tmp_path / "cpp.safetensors", tmp_path / "python.safetensors"
    result = tool(
        "hywu-edit",
        demo_bundle,
        PHOTO,
        "make it sepia",
        *flags,
        "--out",
        ours,
        "--save-deltas",
        deltas,
        "--json",
    )
    python(demo_bundle, PHOTO, "make it sepia", *flags, "--out", theirs, "--save-deltas", other)
    np.testing.assert_array_equal(pixels(ours), pixels(theirs))
    assert deltas.read_bytes() == other.read_bytes()
    report = json.loads(result.stdout)
    assert report.keys() == {"out", "width", "height", "seed", "backend", "deltas", "seconds"}
    assert report["seconds"].keys() == {"total", "load", "graphs", "steps"}
    assert (report["width"], report["height"], len(report["seconds"]["steps"])) == (64, 64, 3)
    again = tmp_path / "again.png"
    tool(
        "hywu-edit",
        demo_bundle,
        PHOTO,
        "make it sepia",
        *flags,
        "--out",
        again,
        "--deltas",
        other,
        "--low-memory",
    )
    np.testing.assert_array_equal(pixels(again), pixels(ours))


def test_hywu_edit_refuses_bad_input_with_code_2(tool: Any, toy: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        result = tool("hywu-edit", *arguments, code=2)
        assert result.stdout == ""
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        return str(result.stderr)

    out = ["--out", tmp_path / "x.png"]
    assert "Expected BUNDLE PHOTO PROMPT" in refused(toy)
    assert "There is no option --step" in refused(toy, PHOTO, "x", "--step", 3)
    assert "lacks its value" in refused(toy, PHOTO, "x", "--steps")
    assert "--steps" in refused(toy, PHOTO, "x", "--steps", "three", *out)
    assert "--seed" in refused(toy, PHOTO, "x", "--seed", -1, *out)
    assert "--size" in refused(toy, PHOTO, "x", "--size", "64x", *out)
    assert "given twice" in refused(toy, PHOTO, "x", "--steps", 1, "--steps", 2)
    assert "no known picture suffix" in refused(toy, PHOTO, "x", "--out", tmp_path / "x.txt")
    (tmp_path / "folder.png").mkdir()
    assert "is a directory" in refused(toy, PHOTO, "x", "--out", tmp_path / "folder.png")
    assert "there is no folder" in refused(toy, PHOTO, "x", "--out", tmp_path / "none" / "x.png")
    assert "is also" in refused(toy, tmp_path / "x.png", "x", *out)
    assert "No bundle can be read" in refused(tmp_path, PHOTO, "x", *out)
    assert "nowhere.jpg" in refused(toy, "nowhere.jpg", "x", *out)
    assert "--save-deltas was given beside --deltas" in refused(
        toy, PHOTO, "x", *out, "--deltas", "a", "--save-deltas", tmp_path / "b"
    )
    assert "'region' is missing" in refused(toy, PHOTO, "x", *out)
    assert "The bundle has no engine 'x'" in refused(toy, PHOTO, "x", *out, "--engine", "x")
    assert "not understood" in refused(toy, PHOTO, "x", *out, "--source", "base")
    assert not (tmp_path / "x.png").exists()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    refused(toy, tmp_path / "broken.png", "x", *out)


def test_help_and_version(tool: Any) -> None:
    text = tool("hywu-edit", "--help").stdout
    for flag in ("--steps", "--seed", "--delta-strength", "--variant", "--engine", "--save-deltas"):
        assert flag in text
    assert "ort-cpu" in tool("hywu-edit", "--version").stdout
    assert "--runs" in tool("hywu-bench", "--help").stdout


def test_hywu_bench(tool: Any, demo_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    result = tool(
        "hywu-bench",
        demo_bundle,
        *SMALL,
        "--runs",
        3,
        "--warm-up",
        1,
        "--threads",
        2,
        "--json",
        "--out",
        file,
    )
    report = json.loads(result.stdout)
    assert json.loads(file.read_text()) == report
    assert report["schema"] == "hywu.bench/1"
    assert (report["backend"], report["threads"], report["runs"]) == ("ort-cpu", 2, 3)
    stages = report["stages"]
    assert {"text_encoder", "generator", "step", "image_decoder", "edit", "generate_call"} <= stages.keys()
    schema = json.loads((ROOT / "hywu_export" / "benchmark" / "bench.schema.json").read_text())
    jsonschema.validate(report, schema)
    assert stages["first_step"]["count"] + stages["steady_step"]["count"] == stages["step"]["count"]
    for stage in stages.values():
        assert stage["min"] <= stage["p50"] <= stage["p90"] <= stage["p95"] <= stage["p99"] <= stage["max"]
    whole = ("edit", "generate_call", "first_step", "steady_step")
    parts = sum(stages[s]["mean"] * stages[s]["count"] for s in stages if s not in whole)
    assert 0.5 < parts / (stages["edit"]["mean"] * 3) <= 1.01
    assert report["cold"]["first_edit"] > report["cold"]["load"] > 0
    assert "stable" in report["warm_up"]
