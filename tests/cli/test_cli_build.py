"""``hywu build``: what it says, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_tools import answer, refused, run

sys.path.append(str(Path(__file__).parents[1] / "engines"))
from quantized import model, write_model_bundle


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return write_model_bundle(tmp_path / "bundle", model())


@pytest.mark.rtx
def test_a_build_says_what_it_made(quantized: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    text = run("build", quantized, "--compute-capability", "89,86", "--batch", "1:2:4").stdout
    assert "compute capability 8.6, 8.9" in text
    assert "2 fp16, 1 int8" in text
    again = answer("build", quantized, "--compute-capability", "86,89", "--batch", "1:2:4")
    assert again["reused"]
    assert again["key"] in text
    assert again["key"] in run("inspect", quantized).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compute-capability", "99"], "no compute capability"),
        (["--compute-capability", "87"], "Jetson Orin"),
        (["--compute-capability", "90"], "H100"),
        (["--batch", "1:1:9"], "limits of the bundle"),
        (["--shapes", "64x64"], "no pictures"),
        (["--axis", "batch"], "--axis"),
        (["--axis", "ghost=1"], "no such axis"),
        (["--graph", "ghost"], "no graph 'ghost'"),
        (["--variant", "fp16"], "no variant"),
        (["--timing-cache", "cache"], "--timing-cache"),
        (["--hardware-compatible", "ampere+"], "--hardware-compatible"),
        (["--backend", "tensorrt", "--compute-capability", "87"], "--compute-capability"),
        (["--emit-script", "a", "--import", "b"], "exclude each other"),
        (["--import", "nothing"], "no folder with finished plans"),
        (["--log", "nowhere/build.log"], "cannot be written"),
    ],
)
def test_refusals(
    quantized: Path, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused("build", quantized, *arguments)
    assert not (quantized / "engines").exists()


def test_no_bundle(tmp_path: Path) -> None:
    assert "No bundle" in refused("build", tmp_path / "nothing")


def test_a_script(quantized: Path, tmp_path: Path) -> None:
    script = tmp_path / "build.sh"
    text = run("build", quantized, "--backend", "tensorrt", "--emit-script", script).stdout
    assert "--import OUT" in text
    assert script.stat().st_mode & 0o111
