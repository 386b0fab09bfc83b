"""Plans that were made elsewhere, by the script of `script`, become an engine of the bundle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hywu_export.bundle.additions import BundleAddition
from hywu_export.bundle.staging import writing
from hywu_export.engines.job import (
    BuildOptions,
    Built,
    Work,
    add_records,
    commit_engine,
    engine_report,
    plan_name,
    plan_work,
)
from hywu_export.engines.plans import PlanHeader, read_header
from hywu_export.engines.report import graph_report
from hywu_export.engines.script import FORMAT, SETTINGS
from hywu_export.engines.shapes import ShapeOptions
from hywu_export.engines.tensorrt import Settings
from hywu_runtime.errors import EngineError, HywuError, InputError
from hywu_runtime.manifest import Engine

_FACTS = {
    "version": re.compile(r"TensorRT version: ([\d.]+)"),
    "device": re.compile(r"Selected Device: (.+?)\s*$", re.MULTILINE),
    "capability": re.compile(r"Compute Capability: ([1-9]\d?\.\d)"),
}
"""What ``trtexec`` says at its start."""


def import_plans(bundle: str | Path, folder: str | Path) -> Built:
    """Checks what a script left in ``folder`` and adds it to the bundle.

    Raises:
        InputError: the folder is not one that a script left, or the script did not finish.
        EngineError: a plan is damaged, or was made from other graphs than the bundle now has.
    """
    folder = Path(folder)
    settings, options = _read_settings(folder)
    work = plan_work(bundle, options)
    work = replace(work, settings=replace(work.settings, compute_capabilities=options.compute_capabilities))
    _check_sources(work, settings)
    plans = {source.name: folder / plan_name(source.name) for source in work.sources}
    headers = {name: _check_plan(name, path, options) for name, path in plans.items()}
    facts = _facts(options.backend, plans, headers)
    key = work.key(facts["version"], facts.get("device"))
    with BundleAddition(work.bundle.root, f"engines/{key}") as addition:
        logs = addition.directory / "logs"
        reports = {}
        with writing(addition.directory):
            logs.mkdir()
            for source in work.sources:
                path = plans[source.name]
                addition.write(path.name, _chunks(path))
                log = logs / f"{source.name}.log"
                shutil.copyfile(_beside(path, ".log"), log)
                inspection = _beside(path, ".layers.json")
                text = (
                    inspection.read_text(encoding="utf-8", errors="replace") if inspection.exists() else None
                )
                reports[source.name] = graph_report(source.model, log, text, path.stat().st_size)
        engine = Engine(
            backend=options.backend,
            version=facts["version"],
            compute_capabilities=options.compute_capabilities or (facts["capability"],),
            shapes=work.shapes,
            graphs={name: f"engines/{key}/{path.name}" for name, path in plans.items()},
            sources=work.files,
            variant=options.variant,
            device=facts.get("device"),
            version_compatible=work.settings.version_compatible,
            hardware_compatible=work.settings.hardware_compatible == "ampere+",
            report=f"engines/{key}/report.json",
        )
        report = engine_report(key, engine, work.settings, reports)
        add_records(addition, report, logs, work)
        manifest = commit_engine(addition, key, engine)
    return Built(key, manifest, report, reused=False)


def _read_settings(folder: Path) -> tuple[dict[str, Any], BuildOptions]:
    path = folder / SETTINGS
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != FORMAT or value["backend"] not in ("tensorrt", "tensorrt-rtx"):
            raise ValueError("written by another version")
        axes = {str(name): ":".join(map(str, sizes)) for name, sizes in value["shapes"].items()}
        options = BuildOptions(
            backend=value["backend"],
            compute_capabilities=tuple(map(str, value["compute_capabilities"])),
            variant=value["variant"],
            shapes=ShapeOptions(axes=axes),
            graphs=tuple(map(str, value["graphs"])),
            settings=Settings.from_dict(value["settings"]),
        )
        if not isinstance(value["files"], dict):
            raise ValueError("`files` is no object")
    except OSError as error:
        raise InputError(
            f"{folder} is no folder with finished plans: {path.name} cannot be read ({error.strerror})",
            "Expected what the script of `hywu build --emit-script` leaves when it is done",
            "Give that folder, or run the script again",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not understood: {error}",
            "Expected what the script of `hywu build --emit-script` wrote",
            "Write the script again with this version, and run it",
        ) from error
    return value, options


def _check_sources(work: Work, settings: dict[str, Any]) -> None:
    now, then = work.files, settings["files"]
    for name in sorted({*now, *then}):
        if now.get(name) != then.get(name):
            raise EngineError(
                f"The plans were made from another {name} than the bundle has",
                f"Expected SHA-256 {now.get(name, 'no such file')}",
                "Write the script again, and run it with this bundle",
            )


def _check_plan(graph: str, path: Path, options: BuildOptions) -> PlanHeader:
    try:
        size, header = path.stat().st_size, read_header(path)
    except OSError as error:
        raise InputError(
            f"The plan of graph {graph!r} cannot be read: {path} ({error.strerror})",
            "Expected what the script leaves when it is done",
            "Run the script again",
        ) from error
    if header is None or header.backend != options.backend:
        wrong = "is no plan" if header is None else f"was made by {header.backend}"
    elif header.size is not None and header.size != size:
        wrong = f"has {size} bytes, where its header says {header.size}"
    elif header.compute_capabilities and header.compute_capabilities != options.compute_capabilities:
        wrong = f"is for compute capabilities {', '.join(header.compute_capabilities)}"
    else:
        return header
    raise EngineError(
        f"{path} {wrong}",
        f"Expected a whole plan of {options.backend}, as the script makes it",
        "Run the script again",
    )


def _facts(backend: str, plans: dict[str, Path], headers: dict[str, PlanHeader]) -> dict[str, str]:
    """Version, device and compute capability, which are the same for all plans."""
    found: dict[str, str] = {}
    for name, path in plans.items():
        log = _beside(path, ".log")
        try:
            text = log.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(
                f"The log of graph {name!r} cannot be read: {log} ({error.strerror})",
                "Expected what the script leaves when it is done",
                "Run the script again",
            ) from error
        facts = {key: match[1] for key, pattern in _FACTS.items() if (match := pattern.search(text))}
        if headers[name].version is not None:
            facts["version"] = str(headers[name].version)
        for key, value in facts.items():
            if found.setdefault(key, value) != value:
                raise _mixed(name, key, value, found[key])
    needed = ("version",) if backend == "tensorrt-rtx" else ("version", "device", "capability")
    missing = [key for key in needed if key not in found]
    if missing:
        raise EngineError(
            f"The logs do not say the {' and the '.join(missing)}",
            "Expected what trtexec prints when it starts",
            "Run the script again with trtexec of TensorRT 10.3 or later",
        )
    if backend == "tensorrt-rtx":
        found.pop("device", None)
    return found


def _mixed(graph: str, what: str, here: str, there: str) -> HywuError:
    return EngineError(
        f"The plan of graph {graph!r} was made with another {what} than the others ({here}, {there})",
        "Expected plans of one run",
        "Run the script again, into an empty folder",
    )


def _beside(plan: Path, suffix: str) -> Path:
    return plan.with_name(plan.name + suffix)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(partial(file.read, 1 << 22), b"")
