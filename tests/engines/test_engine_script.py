"""The script for devices: a stand-in for ``trtexec`` checks what it is told; what it leaves is imported."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantized import model, write_model_bundle

from hywu_export.engines import BuildOptions, build, import_plans, write_script
from hywu_export.engines.shapes import ShapeOptions
from hywu_export.engines.tensorrt import Settings
from hywu_runtime import Bundle
from hywu_runtime.errors import EngineError, InputError, UnsupportedError

TRTEXEC = r"""#!{python}
import json, os, sys
import onnx
if "--help" in sys.argv:
    print("--stronglyTyped --profilingVerbosity --exportLayerInfo")
    sys.exit(0)
options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
print("[I] TensorRT version: 10.3.0")
print("[I] Selected Device: Orin")
print("[I] Compute Capability: 8.7")
if os.environ.get("BREAK") == "build":
    print("[E] the builder is out of sorts")
    sys.exit(1)
loaded = onnx.load(options["--onnx"], load_external_data=False)
for tensor in loaded.graph.initializer:
    data = {{entry.key: entry.value for entry in tensor.external_data}}
    if data:
        weights = os.path.join(os.path.dirname(options["--onnx"]), data["location"])
        assert int(data["offset"]) + int(data["length"]) <= os.path.getsize(weights), weights
shapes = {{}}
for point in ("--minShapes", "--optShapes", "--maxShapes"):
    for part in options.get(point, "").split(","):
        name, _, sizes = part.rpartition(":")
        if name:
            shapes.setdefault(name.strip("'"), []).append([int(size) for size in sizes.split("x")])
for value in loaded.graph.input:
    dims = [d.dim_value if not d.dim_param else None for d in value.type.tensor_type.shape.dim]
    assert (value.name in shapes) == (None in dims), value.name
    for shape in shapes.get(value.name, []):
        assert len(shape) == len(dims) and all(d in (None, s) for d, s in zip(dims, shape)), value.name
with open({calls!r}, "a") as file:
    file.write(json.dumps([options, shapes]) + "\n")
open(options["--saveEngine"], "wb").write(b"ftrt" + bytes(100))
tensor = [{{"Name": "x", "Dimensions": [1], "Format/Datatype": "Row major Int8 format"}}]
layer = {{"Name": "p", "LayerType": "gemm", "Inputs": tensor, "Outputs": tensor,
          "Metadata": "[ONNX Layer: m/MatMul]"}}
json.dump({{"Layers": [layer]}}, open(options["--exportLayerInfo"], "w"))
print("&&&& PASSED TensorRT.trtexec")
"""


class Device:
    """A machine with a copy of the bundle and the stand-in."""

    def __init__(self, root: Path):
        self.root, self.calls = root, root / "calls"
        self.out = root / "plans of today"
        self.tool = root / "bin" / "trtexec"
        self.tool.parent.mkdir()
        self.tool.write_text(TRTEXEC.format(python=sys.executable, calls=str(self.calls)))
        self.tool.chmod(self.tool.stat().st_mode | stat.S_IXUSR)

    def run(self, script: Path, bundle: Path, *more: str, code: int = 0, **env: str) -> str:
        process = subprocess.run(
            ["sh", str(script), str(bundle), str(self.out), *more],
            env={**os.environ, "TRTEXEC": str(self.tool), **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == code, process.stderr
        return process.stdout + process.stderr

    def said(self) -> list[Any]:
        return [json.loads(line) for line in self.calls.read_text().splitlines()]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    (tmp_path / "device").mkdir()
    return Device(tmp_path / "device")


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return write_model_bundle(tmp_path / "a bundle; with 'quotes' $HOME", model())


OPTIONS = BuildOptions(
    backend="tensorrt",
    shapes=ShapeOptions(batch="1:2:4"),
    settings=Settings(
        optimization_level=5, workspace=64, version_compatible=True, hardware_compatible="ampere+"
    ),
)


def test_from_the_script_to_an_engine(quantized: Path, tmp_path: Path, device: Device) -> None:
    script = tmp_path / "build.sh"
    write_script(script, quantized, OPTIONS)
    subprocess.run(["sh", "-n", str(script)], check=True)
    device.run(script, quantized)
    ((options, shapes),) = device.said()
    assert options["--builderOptimizationLevel"] == "5"
    assert options["--memPoolSize"] == "workspace:64"
    assert options["--hardwareCompatibilityLevel"] == "ampere+"
    assert options["--profilingVerbosity"] == "detailed"
    assert options.keys() >= {
        "--versionCompatible",
        "--stronglyTyped",
        "--skipInference",
        "--timingCacheFile",
    }
    assert "--allowWeightStreaming" not in options
    assert shapes["x"] == [[1, 16, 64], [2, 16, 64], [4, 16, 64]]
    assert shapes["gate"] == [[1], [2], [4]]

    built = import_plans(quantized, device.out)
    engine = Bundle.open(quantized, verify=True).manifest.engines[built.key]
    assert (engine.backend, engine.version, engine.device) == ("tensorrt", "10.3.0", "Orin")
    assert engine.compute_capabilities == ("8.7",)
    assert engine.shapes == {"batch": (1, 2, 4), "delta_batch": (1, 2, 4)}
    assert engine.version_compatible
    assert built.manifest.stale(built.key) is None
    assert (quantized / engine.graphs["step"]).read_bytes() == b"ftrt" + bytes(100)
    report = built.report["graphs"]["step"]
    assert (report["layers_from"], report["products"]) == ("engine inspector", {"int8": 1})


def test_the_tool_that_is_missing_or_fails(quantized: Path, tmp_path: Path, device: Device) -> None:
    script = tmp_path / "build.sh"
    write_script(script, quantized, OPTIONS)
    assert "cannot be run" in device.run(script, quantized, code=1, TRTEXEC="/nowhere/trtexec")
    assert "out of sorts" in device.run(script, quantized, code=1, BREAK="build")
    with pytest.raises(InputError, match=r"hywu-build\.json"):
        import_plans(quantized, device.out)
    assert not (quantized / "engines").exists()


def test_another_bundle_is_refused_on_the_device_and_on_import(
    quantized: Path, tmp_path: Path, device: Device
) -> None:
    script = tmp_path / "build.sh"
    write_script(script, quantized, OPTIONS)
    other = tmp_path / "other"
    shutil.copytree(quantized, other)
    (other / "step.onnx").write_bytes(b"another")
    assert "step.onnx" in device.run(script, other, code=1)
    device.run(script, quantized)
    changed = model()
    changed.doc_string = "changed"
    with pytest.raises(EngineError, match=r"another step\.onnx"):
        import_plans(write_model_bundle(tmp_path / "changed", changed), device.out)


@pytest.mark.parametrize("damage", ["truncated", "no plan", "missing"])
def test_plans_that_are_damaged(quantized: Path, tmp_path: Path, damage: str) -> None:
    """TensorRT-RTX's plans say how long they are."""
    pytest.importorskip("tensorrt_rtx")
    built = build(quantized, BuildOptions(compute_capabilities=("8.9",)))
    plans = tmp_path / "plans"
    plans.mkdir()
    whole = (quantized / built.manifest.engines[built.key].graphs["step"]).read_bytes()
    (plans / "step.plan").write_bytes({"truncated": whole[:-1]}.get(damage, b"something else"))
    (plans / "step.plan.log").write_text("")
    from hywu_export.engines.job import plan_work
    from hywu_export.engines.script import SETTINGS, settings_dict

    work = plan_work(quantized, BuildOptions(compute_capabilities=("8.9",)))
    (plans / SETTINGS).write_text(json.dumps(settings_dict(work, ("8.9",))))
    if damage == "missing":
        (plans / "step.plan").unlink()
    before = set(Bundle.open(quantized).manifest.engines)
    with pytest.raises((EngineError, InputError), match=r"step\.plan"):
        import_plans(quantized, plans)
    assert set(Bundle.open(quantized).manifest.engines) == before
    (plans / "step.plan").write_bytes(whole)
    imported = import_plans(quantized, plans)
    assert imported.key == built.key  # the same engine, by another way
    assert imported.manifest.engines[built.key].version == built.manifest.engines[built.key].version


def test_linked_weights(pair: Any, tmp_path: Path, device: Device) -> None:
    from hywu_export import ExportOptions, export

    folder = tmp_path / "linked"
    export(folder, None, pair.generator, ExportOptions(link_weights=True))
    sources = {name: str(pair.generator) for name in Bundle.open(folder, links=False).manifest.sources}
    script = tmp_path / "build.sh"
    write_script(script, folder, BuildOptions(backend="tensorrt", sources=sources))
    device.run(script, folder, *(f"{name}={place}" for name, place in sources.items()))
    assert len(device.said()) == len(Bundle.open(folder, links=False).manifest.graphs)
    assert "Usage" in device.run(script, folder, code=2)


def test_names_that_trtexec_cannot_be_told(tmp_path: Path) -> None:
    strange = model()
    for value in (*strange.graph.input, *(n for n in strange.graph.node)):
        if value.name == "gate":
            value.name = "ga,te"
    for node in strange.graph.node:
        node.input[:] = ["ga,te" if name == "gate" else name for name in node.input]
    with pytest.raises(UnsupportedError, match="ga,te"):
        write_script(tmp_path / "build.sh", write_model_bundle(tmp_path / "bundle", strange), OPTIONS)
    assert not (tmp_path / "build.sh").exists()
