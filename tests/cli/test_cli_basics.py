"""What is common to all commands: help, speed, exit codes, what goes where."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from cli_tools import run

import hywu_runtime
from hywu_export.cli import app
from hywu_runtime.errors import EngineError, InputError

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "hywu_export.cli")
COMMANDS = [["--help"], *([name, "--help"] for name in app.COMMANDS)]
COMMANDS += [["deltas", name, "--help"] for name in ("generate", "show", "convert", "blend")]

SPEED = """
import json, sys, time
start = time.perf_counter()
from hywu_export.cli import main
sys.argv = ["hywu", *json.loads(sys.argv[1])]
try:
    main()
except SystemExit as end:
    seconds = time.perf_counter() - start
    print(json.dumps({"code": end.code, "seconds": seconds, "modules": sorted(sys.modules)}))
"""


def environment() -> dict[str, str]:
    paths = (ROOT, Path(hywu_runtime.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_help_is_instant(arguments: list[str]) -> None:
    reports = []
    for _ in range(3):
        output = subprocess.run(
            [sys.executable, "-c", SPEED, json.dumps(arguments)],
            capture_output=True, check=True, text=True, env=environment(), cwd=ROOT,
        )  # fmt: skip
        assert "Usage: hywu" in output.stdout
        assert output.stderr == ""
        reports.append(json.loads(output.stdout.splitlines()[-1]))
    assert reports[0]["code"] == 0
    assert min(report["seconds"] for report in reports) < 0.3
    loaded = {name.partition(".")[0] for name in reports[0]["modules"]}
    heavy = {
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "numpy",
        "PIL",
        "tokenizers",
    }
    assert loaded.isdisjoint(heavy)


def test_every_command_says_what_it_does() -> None:
    listed = run("--help").stdout
    for name in app.COMMANDS:
        command = app.hywu.get_command(click.Context(app.hywu), name)
        assert command is not None
        assert command.help
        assert f"\n  {name} " in listed
        assert "--debug" in run(name, "--help").stdout or name == "deltas"
    assert "..." not in listed.partition("Commands:")[2]


def test_version() -> None:
    assert run("--version").stdout == f"hywu, version {hywu_runtime.__version__}\n"


def test_entry_point() -> None:
    line = next(
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("hywu = ")
    )
    module, _, name = line.partition('"')[2].rstrip('"').partition(":")
    assert getattr(importlib.import_module(module), name) is app.main


@pytest.mark.parametrize(
    "arguments",
    [["foo"], ["edit"], ["edit", "b", "p", "x", "--steps", "many"], ["export"], ["inspect", "b", "--ghost"]],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: hywu")
    assert "Traceback" not in result.stderr


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """``hywu doctor`` raises what is put into this list."""
    errors: list[BaseException] = []

    def fail() -> None:
        raise errors[0]

    monkeypatch.setattr(importlib.import_module("hywu_export.cli.doctor"), "_system", fail)
    return errors


@pytest.mark.parametrize(("error", "code"), [(InputError("a", "b", "c"), 2), (EngineError("a", "b", "c"), 1)])
def test_error_in_three_parts(failing: list[BaseException], error: Exception, code: int) -> None:
    failing.append(error)
    result = run("doctor", code=code)
    assert result.stderr == "Error: a\n  expected: b\n  to do:    c\n"
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["doctor", "--debug"], ["--debug", "doctor"]])
def test_debug_shows_the_traceback(failing: list[BaseException], arguments: list[str]) -> None:
    failing.append(InputError("a", "b", "c"))
    result = run(*arguments, code=2)
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("Error: a\n  expected: b\n  to do:    c\n")


def test_unexpected_error(failing: list[BaseException]) -> None:
    failing.append(RuntimeError("boom\nand more"))
    result = run("doctor", code=1)
    assert result.stderr == (
        "Internal error: RuntimeError: boom and more (run again with --debug for the traceback)\n"
    )


def test_interrupt(failing: list[BaseException]) -> None:
    failing.append(KeyboardInterrupt())
    result = run("doctor", code=130)
    assert result.stderr.strip() == "Interrupted."


def test_no_toolchain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # makes its import fail
    result = run("export", "--base", tmp_path, "--out", tmp_path / "out", code=2)
    assert "torch" in result.stderr
    assert "pip install 'hywu-export[export]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_reader_that_goes_away() -> None:
    """As in ``hywu --help | head -1``."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [*COMMAND, "doctor"], stdout=write, stderr=subprocess.PIPE,
        env=environment(), cwd=ROOT, text=True,
    )  # fmt: skip
    os.close(write)
    assert process.stderr == ""
    assert process.returncode == 1


def test_interrupted_process(bundle: Path, tmp_path: Path) -> None:
    from cli_tools import names, picture

    photo = picture(tmp_path / "photo.png", 400, 400)
    process = subprocess.Popen(
        [*COMMAND, "edit", bundle, photo, "a cat", "--out", "out.png", "--size",
         "128", "--steps", "12", "--scheduler", "heun", "-v"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=tmp_path, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert "backend" in process.stderr.readline()  # it is at work
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in stderr
    assert stdout == ""
    assert names(tmp_path) == {"photo.png"}


def test_doctor() -> None:
    from cli_tools import answer

    report = answer("doctor")
    assert report["ok"]
    found = {(one["part"], one["name"]): one for one in report["findings"]}
    assert found["backend", "ort-cpu"]["ok"]
    assert found["runtime", "numpy"]["detail"] == importlib.import_module("numpy").__version__
    assert not found["backend", "tensorrt"]["ok"]
    text = run("doctor").stdout
    assert len(text.splitlines()) == len(report["findings"]) + 2
    assert text.endswith("The runtime works.\n")


def test_doctor_without_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    import hywu_runtime.backends

    monkeypatch.setattr(
        hywu_runtime.backends, "available_backends", lambda: {"ort-cpu": "gone", "ort-cuda": "gone"}
    )
    assert "MISSING" in run("doctor", code=1).stdout


def test_progress_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hywu_export.cli.common import progress_bar

    with progress_bar() as show:
        show("piece", 1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar() as show:
        for total in (2, 3):
            for done in range(total + 1):
                show(f"piece {done}", done, total)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("100%") == 2
    assert "piece 3" in captured.err


def test_demo_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cli_tools import refused

    monkeypatch.chdir(tmp_path)
    assert "checkout" in refused("demo")
    assert not list(tmp_path.iterdir())


def test_demo_in_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "__init__.py").touch()
    (tmp_path / "demo" / "run.py").write_text(
        "def run(out, progress):\n    progress('x', 0, 1)\n    print(out)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "demo"]:
        monkeypatch.delitem(sys.modules, name)
    assert run("demo", "--out", "there").stdout == "there\n"
    for name in [name for name in sys.modules if name.partition(".")[0] == "demo"]:
        monkeypatch.delitem(sys.modules, name)
