"""Variants and engines added to a bundle: whole or not at all, whatever happens in between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from toy_bundle import write_bundle

from hywu_export.bundle import BundleAddition
from hywu_runtime import Bundle
from hywu_runtime.errors import BundleError
from hywu_runtime.manifest import Engine, Manifest, Variant


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def add_variant(bundle: Path, name: str = "fp16", data: bytes = b"one") -> Manifest:
    with BundleAddition(bundle, f"variants/{name}") as addition:
        addition.write("step.onnx", [data])
        addition.write("weights/unet.safetensors", [data, data])
        variant = Variant("fp16", {"step": f"variants/{name}/step.onnx"})
        return addition.commit(lambda m: replace(m, variants={**m.variants, name: variant}))


def everything(bundle: Path) -> dict[str, bytes]:
    return {str(p.relative_to(bundle)): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def test_an_addition_is_part_of_the_bundle(bundle: Path) -> None:
    before = everything(bundle)
    manifest = add_variant(bundle)
    opened = Bundle.open(bundle, verify=True)
    assert opened.manifest == manifest
    assert opened.file(opened.graph_file("step", "fp16")).read_bytes() == b"one"
    after = everything(bundle)
    assert {p: after[p] for p in before if p != "manifest.json"} == {
        p: d for p, d in before.items() if p != "manifest.json"
    }
    assert after.keys() - before.keys() == {
        "variants/fp16/step.onnx",
        "variants/fp16/weights/unet.safetensors",
    }


def test_replacing_makes_engines_stale(bundle: Path) -> None:
    manifest = add_variant(bundle)
    sources = {p: f.sha256 for p, f in manifest.files.items() if p.startswith("variants/")}
    with BundleAddition(bundle, "engines/key") as addition:
        addition.write("step.plan", [b"plan"])
        engine = Engine(
            "tensorrt-rtx", "1.7", ("8.6",), {}, {"step": "engines/key/step.plan"}, sources, variant="fp16"
        )
        manifest = addition.commit(lambda m: replace(m, engines={**m.engines, "key": engine}))
    assert manifest.stale("key") is None
    manifest = add_variant(bundle, data=b"two")
    assert manifest.stale("key") == "variants/fp16/step.onnx"
    opened = Bundle.open(bundle, verify=True)
    assert opened.file("variants/fp16/step.onnx").read_bytes() == b"two"
    assert not list(bundle.rglob("*.partial-*"))


def test_leaving_early_leaves_nothing(bundle: Path) -> None:
    before = everything(bundle)
    with BundleAddition(bundle, "variants/fp16") as addition:
        addition.write("step.onnx", [b"x"])
    assert everything(bundle) == before
    assert not (bundle / "variants").exists()


@pytest.mark.parametrize("there", [False, True])
def test_an_entry_that_is_refused_changes_nothing(bundle: Path, there: bool) -> None:
    if there:
        add_variant(bundle)
    before = everything(bundle)
    variant = Variant("fp16", {"ghost": "variants/fp16/step.onnx"})
    with BundleAddition(bundle, "variants/fp16") as addition:
        addition.write("step.onnx", [b"x"])
        with pytest.raises(BundleError, match="ghost"):
            addition.commit(lambda m: replace(m, variants={"fp16": variant}))
    assert everything(bundle) == before


@pytest.mark.parametrize(
    "folder", ["variants", "variants/..", "other/x", "variants/a/b", "variants/a:b", "/a/b"]
)
def test_names_that_lead_elsewhere(bundle: Path, folder: str) -> None:
    with pytest.raises(BundleError, match="no folder for an addition"):
        BundleAddition(bundle, folder)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No bundle"):
        BundleAddition(tmp_path / "nothing", "variants/fp16")
    assert not (tmp_path / "nothing").exists()


def test_a_place_that_cannot_be_written(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(bundle)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    variant = Variant("fp16", {"step": "variants/a/step.onnx"})
    with BundleAddition(bundle, "variants/a") as addition:
        addition.write("step.onnx", [b"x"])
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(BundleError, match="No space left"):
            addition.commit(lambda m: replace(m, variants={"a": variant}))
    monkeypatch.undo()
    assert everything(bundle) == before


def test_additions_at_the_same_time_are_all_kept(bundle: Path) -> None:
    threads = [threading.Thread(target=add_variant, args=(bundle, f"v{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Bundle.open(bundle, verify=True).manifest.variants) == {f"v{i}" for i in range(8)}


KILLED = """
import os, signal, sys
from test_additions import *
from hywu_export.bundle import additions, staging
count, at = 0, int(sys.argv[2])
def dying(function):
    def call(*arguments, **named):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call
os.fsync, os.replace, os.rename = dying(os.fsync), dying(os.replace), dying(os.rename)
staging._exchange = dying(staging._exchange)
add_variant(Path(sys.argv[1]), data=b"two")
print(count)
"""


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_at_every_moment(bundle: Path, tmp_path: Path, replaced: bool) -> None:
    if replaced:
        add_variant(bundle)
    at, ended = 0, False
    while not ended:
        at += 1
        copy = tmp_path / f"copy{at}"
        shutil.copytree(bundle, copy)
        process = subprocess.run(
            [sys.executable, "-c", KILLED, str(copy), str(at)],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=False,
        )
        ended = process.returncode == 0
        assert ended or process.returncode == -signal.SIGKILL, process.stderr.decode()
        variants = Bundle.open(copy, verify=True).manifest.variants
        assert set(variants) <= {"fp16"}
        if ended:
            assert (copy / variants["fp16"].graphs["step"]).read_bytes() == b"two"
        add_variant(copy, data=b"three")  # what the dead left behind is in nobody's way
        assert Bundle.open(copy, verify=True).manifest.variants
        shutil.rmtree(copy)
    assert at > 5
