"""Small random models and the bundles made from them, shared by all tests of a run.

They are made once, by whichever worker comes first: tracing is what takes time here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tiny_pairs import LORA_TARGETS, make_base, make_generator

# Machines are noisy: a slow example is no failure, and in CI every run tries the same examples.
settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("project")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Pair:
    """Folders of a base pipeline and of a generator for it."""

    base: Path
    generator: Path


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """``once(name, make)``: the folder ``name``, made by ``make(folder)`` in one worker and shared by all."""
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / "shared" / name, root / "shared" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(root / "shared" / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def pair(once: Callable[[str, Callable[[Path], None]], Path]) -> Pair:
    """A random base and a random generator for it."""

    def make(folder: Path) -> None:
        make_base(folder / "base")
        make_generator(folder / "generator", folder / "base")

    folder = once("pair", make)
    return Pair(folder / "base", folder / "generator")


@pytest.fixture(scope="session")
def bundle(pair: Pair, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The bundle of `pair`, with every sampler that the tests use. Do not write to it."""

    def make(folder: Path) -> None:
        from hywu_export import ExportOptions, export

        samplers = ("euler_a", "euler", "dpmpp_2m", "heun", "unipc")
        options = ExportOptions(samplers=samplers, max_steps=12, max_size=128)
        export(folder, pair.base, pair.generator, options)

    return once("bundle", make)


@pytest.fixture(scope="session")
def linked_bundle(pair: Pair, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A bundle of `pair` whose weights stay in the checkpoints, small in all; beside it what
    ``hywu export --json`` printed, ``export.json``. Do not write to it."""

    def make(folder: Path) -> None:
        from cli_tools import answer

        report = answer(
            "export", "--base", pair.base, "--generator", pair.generator, "--out", folder / "bundle",
            "--link-weights", "--scheduler", "euler", "--scheduler", "dpmpp_2m", "--max-steps", 6,
            "--steps", 3, "--guidance", 3, "--image-guidance", 1.25, "--size", 16, "--max-size", 64,
            "--batch", 2,
        )  # fmt: skip
        (folder / "export.json").write_text(json.dumps(report))

    return once("linked_bundle", make) / "bundle"


@pytest.fixture(scope="session")
def lora_bundle(pair: Pair, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The base of `pair` alone, with deltas of rank 8 for attention, feed-forward and convolutions."""

    def make(folder: Path) -> None:
        from hywu_export import ExportOptions, export

        export(folder, pair.base, options=ExportOptions(targets=LORA_TARGETS, max_rank=8, max_steps=12))

    return once("lora_bundle", make)


@pytest.fixture(scope="session")
def demo_bundle(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The exported demo pair: that of `make demo`, or one made now."""
    from hywu_runtime import Bundle
    from hywu_runtime.errors import HywuError

    made = Path(__file__).parents[1] / "out" / "bundle"
    try:
        Bundle.open(made)
        return made
    except HywuError:
        pass

    def make(folder: Path) -> None:
        from hywu_export import export

        demo = Path(__file__).parents[1] / "demo"
        export(folder, demo / "base", demo / "generator")

    return once("demo_bundle", make)


@pytest.fixture(scope="session")
def staged_bundles(pair: Pair, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Bundles of `pair` cut into stages, ``2`` and ``4``, and not cut, ``1``. Do not write to them."""

    def make(folder: Path) -> None:
        from unittest import mock

        import hywu_export.tracing
        from hywu_export import ExportOptions, export

        traced: dict[str, Any] = {}
        trace = hywu_export.tracing.trace

        def trace_once(spec: Any, axes: Any) -> Any:
            if spec.name not in traced:
                traced[spec.name] = trace(spec, axes)
            return traced[spec.name]

        folder.mkdir()
        with mock.patch.object(hywu_export.tracing, "trace", trace_once):
            for stages in (1, 2, 4):
                options = ExportOptions(samplers=("dpmpp_2m",), max_steps=6, max_size=128, stages=stages)
                export(folder / str(stages), pair.base, pair.generator, options)

    return once("staged_bundles", make)
