"""``hywu doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import click

from hywu_export.cli.common import Command, json_option, print_json, size_text, table

_RUNTIME = ("numpy", "pillow", "onnxruntime", "safetensors", "tokenizers", "click")
_EXPORT = ("torch", "diffusers", "transformers", "accelerate", "onnx", "onnx-ir", "onnxscript")
_IMPORT_NAMES = {"pillow": "PIL", "onnx-ir": "onnx_ir"}
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # either gives the module onnxruntime
_OLDEST_PYTHON = (3, 10)


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``needed``: the runtime cannot work without it."""

    part: str
    name: str
    ok: bool
    detail: str
    needed: bool = False


@click.command(cls=Command, short_help="Show what is installed here and what is missing.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what is installed here, what could be used, and what is missing.

    Exits with 1 only if the runtime itself cannot work.
    """
    findings = [*_system(), *_packages(), *_backends(), *_gpu()]
    works = all(finding.ok for finding in findings if finding.needed)
    if as_json:
        print_json({"ok": works, "findings": [asdict(finding) for finding in findings]})
    else:
        rows = [
            ("ok" if f.ok else "MISSING" if f.needed else "missing", f.part, f.name, f.detail)
            for f in findings
        ]
        click.echo(table(rows, indent=0))
        click.echo(
            "\nThe runtime works." if works else "\nThe runtime cannot work before what is MISSING is there."
        )
    ctx.exit(0 if works else 1)


def _system() -> Iterator[Finding]:
    oldest = ".".join(map(str, _OLDEST_PYTHON))
    supported = sys.version_info >= _OLDEST_PYTHON
    detail = f"{platform.python_version()}{'' if supported else f', needs {oldest}'}"
    yield Finding("system", "Python", supported, detail, needed=True)
    yield Finding("system", "platform", True, f"{platform.system()} {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("system", "CPU", True, f"{_cpu_name()}, {cores} of {os.cpu_count()} threads")
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * size
    yield Finding("system", "memory", True, f"{size_text(pages * size)}, {size_text(free)} free")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _packages() -> Iterator[Finding]:
    for package in _RUNTIME:
        yield _package("runtime", package, "pip install hywu-export", needed=True)
    for package in _EXPORT:
        yield _package("export", package, "pip install 'hywu-export[export]'")


def _package(part: str, name: str, remedy: str, needed: bool = False) -> Finding:
    module = _IMPORT_NAMES.get(name, name.replace("-", "_"))
    if importlib.util.find_spec(module) is None:
        return Finding(part, name, False, remedy, needed)
    return Finding(part, name, True, _version(name), needed)


def _version(name: str) -> str:
    for distribution in _ONNXRUNTIMES if name == "onnxruntime" else (name,):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "installed, of unknown version"


def _backends() -> Iterator[Finding]:
    from hywu_runtime.backends import available_backends

    backends = available_backends()
    usable = [name for name, reason in backends.items() if reason is None]
    yield Finding(
        "backend",
        "any",
        bool(usable),
        _auto(usable),
        needed=True,
    )
    for name, reason in backends.items():
        yield Finding("backend", name, reason is None, reason or "can be used")


def _auto(usable: list[str]) -> str:
    """What ``--backend auto`` takes."""
    from hywu_runtime.backends import COMPILED

    plain = [name for name in usable if name not in COMPILED]
    engines = [name for name in usable if name in COMPILED]
    if not plain:
        return "none can be used"
    also = f"{' or '.join(engines)} where a bundle has an engine for it, else " if engines else ""
    return f"auto takes {also}{plain[0]}"


def _gpu() -> Iterator[Finding]:
    yield Finding("gpu", "driver", *_driver())
    yield _package("gpu", "tensorrt", "pip install 'hywu-export[tensorrt]'")
    yield _package("gpu", "tensorrt-rtx", "pip install 'hywu-export[rtx]'")
    yield _cuda_python()


def _cuda_python() -> Finding:
    from hywu_runtime.backends import cuda

    try:
        return Finding("gpu", "cuda-python", True, f"CUDA runtime {cuda.version()}")
    except (ImportError, OSError, RuntimeError):
        return Finding("gpu", "cuda-python", False, "pip install 'hywu-export[cuda]'")


def _driver() -> tuple[bool, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return False, "no nvidia-smi: no NVIDIA driver, or not on the PATH"
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"nvidia-smi does not answer ({error})"
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode or not lines:
        return False, f"nvidia-smi finds no GPU ({(answer.stdout + answer.stderr).strip()[:200]})"
    return True, "; ".join(lines)
