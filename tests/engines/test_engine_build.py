"""Real builds with TensorRT-RTX, which needs no GPU, and every way in which one may end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from quantized import WIDTH, model, write_model_bundle

from hywu_export.bundle import BundleAddition
from hywu_export.engines import BuildOptions, build, write_script
from hywu_export.engines.plans import read_header
from hywu_export.engines.shapes import ShapeOptions
from hywu_runtime import Bundle
from hywu_runtime.errors import (
    BundleError,
    DeviceError,
    EngineError,
    HywuError,
    InputError,
    UnsupportedError,
)

rtx = pytest.mark.rtx
SMALL = ShapeOptions(batch="1:2:4")


@pytest.fixture(autouse=True)
def _tensorrt_rtx(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("rtx"):
        pytest.importorskip("tensorrt_rtx")
        pytest.importorskip("polygraphy")


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return write_model_bundle(tmp_path / "quantized", model())


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_parts(error: HywuError) -> str:
    assert error.wrong, error
    assert error.expected, error
    assert error.remedy, error
    return str(error)


def one_node(kind: str, dtype: int, *constants: onnx.TensorProto, **attributes: Any) -> onnx.ModelProto:
    """``x → made.lora_A`` through one operation in ``dtype``."""
    inputs = ["x2", *(c.name for c in constants)]
    nodes = [
        helper.make_node("Cast", ["x"], ["x2"], name="in/Cast", to=dtype),
        helper.make_node(kind, inputs, ["y"], name=f"deep/{kind}", **attributes),
        helper.make_node("Cast", ["y"], ["made.lora_A"], name="out/Cast", to=TensorProto.FLOAT),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "one",
        [value("x", TensorProto.FLOAT, ["batch", 16, WIDTH])],
        [value("made.lora_A", TensorProto.FLOAT, ["batch", 16, WIDTH])],
        list(constants),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def weight(dtype: int) -> onnx.TensorProto:
    return helper.make_tensor("w", dtype, [WIDTH, WIDTH], [0.5] * WIDTH * WIDTH)


@rtx
def test_int8_layers_are_int8_and_delta_branches_are_not(quantized: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    built = build(
        quantized,
        BuildOptions(compute_capabilities=("8.6", "8.9"), shapes=SMALL),
        lambda *step: progress.append(step),
    )
    report = built.report["graphs"]["step"]
    assert report["layers_from"] == "builder log"
    assert report["products"] == {"fp16": 2, "int8": 1}
    (branch,) = report["deltas"]["branches"]
    assert branch["module"] == "m"
    assert [branch[part]["precision"] for part in ("a", "b", "base")] == ["fp16", "fp16", "int8"]
    assert branch["sum"]["layer"] != branch["base"]["layer"]
    assert report["deltas"]["sum"] == {"with other work": 1}
    assert report["peak_bytes"] > 50e6
    assert report["memory"].keys() >= {"activation_bytes", "weights_bytes"}
    done = [step[1] for step in progress]
    assert done == sorted(done)
    assert progress[-1][2] == 1000

    engine = Bundle.open(quantized, verify=True).manifest.engines[built.key]
    assert (engine.backend, engine.compute_capabilities) == ("tensorrt-rtx", ("8.6", "8.9"))
    assert engine.shapes == {"batch": (1, 2, 4), "delta_batch": (1, 2, 4)}
    assert engine.sources.keys() == {"step.onnx"}
    assert built.manifest.stale(built.key) is None
    header = read_header(quantized / engine.graphs["step"])
    assert header is not None
    assert header.compute_capabilities == ("8.6", "8.9")
    assert header.version == engine.version
    assert header.size == (quantized / engine.graphs["step"]).stat().st_size
    names = {path.name for path in (quantized / "engines" / built.key).iterdir()}
    assert names == {"step.plan", "report.json", "build.log"}


@rtx
def test_the_same_build_is_reused_and_another_is_not(quantized: Path) -> None:
    options = BuildOptions(compute_capabilities=("8.9",), shapes=SMALL)
    first = build(quantized, options)
    before = everything(quantized)
    again = build(quantized, options)
    assert again.reused
    assert (again.key, again.report) == (first.key, first.report)
    assert everything(quantized) == before
    other = build(quantized, BuildOptions(compute_capabilities=("8.9",), shapes=ShapeOptions(batch="2")))
    assert other.key != first.key
    assert set(other.manifest.engines) == {first.key, other.key}


@rtx
def test_stale_engines_go_when_a_new_one_comes(quantized: Path) -> None:
    """Those of the same backend and variant alone."""
    old = build(quantized, BuildOptions(compute_capabilities=("8.9",), shapes=SMALL)).key
    manifest = json.loads((quantized / "manifest.json").read_text())
    other = json.loads(json.dumps(manifest["engines"][old]).replace(old, "other"))
    manifest["engines"]["other"] = {**other, "backend": "tensorrt", "device": "a GPU"}
    for path, entry in list(manifest["files"].items()):
        if path.startswith("engines/"):
            manifest["files"][path.replace(old, "other")] = entry
    shutil.copytree(quantized / "engines" / old, quantized / "engines/other")
    changed = model()
    changed.graph.doc_string = "made again"
    content = changed.SerializeToString()
    (quantized / "step.onnx").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"]["step.onnx"] = {"size": len(content), "sha256": digest}
    (quantized / "manifest.json").write_text(json.dumps(manifest))
    before = Bundle.open(quantized, verify=True).manifest
    assert {key for key in before.engines if before.stale(key)} == {old, "other"}
    new = build(quantized, BuildOptions(compute_capabilities=("8.6",), shapes=SMALL)).key
    after = Bundle.open(quantized, verify=True).manifest
    assert set(after.engines) == {new, "other"}
    assert {path.name for path in (quantized / "engines").iterdir()} == {new, "other"}
    assert not any(old in path for path in after.files)


BROKEN = {
    "operator": (one_node("GhostOp", TensorProto.FLOAT), "deep/GhostOp", "operators"),
    "types": (
        one_node("MatMul", TensorProto.FLOAT, weight(TensorProto.FLOAT16)),
        "deep/MatMul",
        "inputs of one type",
    ),
    "builder": (
        one_node("MatMul", TensorProto.FLOAT, weight(TensorProto.FLOAT)),
        "deep/MatMul",
        "no FP32 matrix products",
    ),
}


@rtx
@pytest.mark.parametrize("case", BROKEN)
def test_a_graph_that_is_refused_names_the_node_and_the_rule(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, node, rule = BROKEN[case]
    monkeypatch.setattr("hywu_export.engines.job.check_turing", lambda *_, **__: None)
    bundle = write_model_bundle(tmp_path / "bundle", broken)
    before = everything(bundle)
    with pytest.raises(EngineError, match=node) as caught:
        build(bundle, BuildOptions(compute_capabilities=("7.5",), log=tmp_path / "build.log"))
    assert "'step'" in check_parts(caught.value)
    assert rule in caught.value.expected
    assert (tmp_path / "build.log").read_text().startswith("==== step: step.onnx\n[")
    assert everything(bundle) == before
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(TensorProto.BFLOAT16, "BF16 .*in/Cast"), (TensorProto.FLOAT, "matrices in FP32 .*deep/MatMul")],
)
def test_turing_is_refused_up_front(
    tmp_path: Path, dtype: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_model_bundle(tmp_path / "bundle", one_node("MatMul", dtype, weight(dtype)))
    monkeypatch.setattr("hywu_export.engines.job.compile_graph", lambda *_: pytest.fail("it was compiled"))
    with pytest.raises(UnsupportedError, match=said) as caught:
        build(bundle, BuildOptions(compute_capabilities=("7.5", "8.9")))
    check_parts(caught.value)


@pytest.mark.parametrize("zero", [None, 128])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_the_form_for_onnx_runtime_is_refused_up_front(
    tmp_path: Path, zero: int | None, backend: Any
) -> None:
    unsigned = model()
    (tensor,) = (t for t in unsigned.graph.initializer if t.name == "x.zero")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(zero or 0, np.uint8), "x.zero"))
    for node in unsigned.graph.node:
        if zero is None and node.name == "m/Q":  # ONNX's default is UINT8 too
            node.input.pop()
    onnx.checker.check_model(unsigned)
    bundle = write_model_bundle(tmp_path / "bundle", unsigned)
    with pytest.raises(UnsupportedError, match=r"'step' is in UINT8 \(first at 'm/Q'\)") as caught:
        build(bundle, BuildOptions(backend=backend))
    assert "hywu calibrate BUNDLE --variant int8 --backend tensorrt" in check_parts(caught.value)
    with pytest.raises(UnsupportedError, match="UINT8"):
        write_script(tmp_path / "script.sh", bundle, BuildOptions(backend=backend))
    assert not (tmp_path / "script.sh").exists()


@rtx
def test_the_builder_itself_refuses_bf16_on_turing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused up front really cannot be built; the day that it can, this test says so."""
    dtype = TensorProto.BFLOAT16
    bundle = write_model_bundle(tmp_path / "bundle", one_node("MatMul", dtype, weight(dtype)))
    monkeypatch.setattr("hywu_export.engines.job.check_turing", lambda *_, **__: None)
    with pytest.raises(EngineError) as caught:
        build(bundle, BuildOptions(compute_capabilities=("7.5",)))
    assert "8.0 or later" in check_parts(caught.value)


@rtx
def test_fp16_builds_for_turing(tmp_path: Path) -> None:
    dtype = TensorProto.FLOAT16
    bundle = write_model_bundle(tmp_path / "bundle", one_node("MatMul", dtype, weight(dtype)))
    report = build(bundle, BuildOptions(compute_capabilities=("7.5",))).report
    assert report["graphs"]["step"]["products"] == {"fp16": 1}


@pytest.mark.parametrize("capability", ["8.7", "9.0", "10.0", "11.0"])
def test_gpus_of_the_other_tensorrt(quantized: Path, capability: str) -> None:
    with pytest.raises(UnsupportedError, match=capability) as caught:
        build(quantized, BuildOptions(compute_capabilities=(capability,)))
    assert "--backend tensorrt" in check_parts(caught.value)


def test_tensorrt_without_a_gpu(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hywu_export.engines.devices.gpu", lambda: None)
    with pytest.raises(DeviceError, match="here is none") as caught:
        build(quantized, BuildOptions(backend="tensorrt"))
    assert "--emit-script" in check_parts(caught.value)


@rtx
def test_damaged_weights_are_not_compiled(quantized: Path) -> None:
    data = bytearray((quantized / "step.onnx").read_bytes())
    data[-1] ^= 1
    (quantized / "step.onnx").write_bytes(data)
    with pytest.raises(HywuError) as caught:
        build(quantized, BuildOptions())
    check_parts(caught.value)
    assert not (quantized / "engines").exists()


@rtx
def test_a_full_disk(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that writes the plan is told that there is no room."""
    before = everything(quantized)
    monkeypatch.setattr("hywu_export.engines.process._WORKER", [str(Path(__file__).parent / "full_disk.py")])
    with pytest.raises(BundleError, match="No space left") as caught:
        build(quantized, BuildOptions(compute_capabilities=("8.9",), shapes=SMALL))
    check_parts(caught.value)
    assert everything(quantized) == before
    assert not (quantized / "engines").exists()


def test_a_builder_that_dies(quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    killer = tmp_path / "killer.py"
    killer.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr("hywu_export.engines.process._WORKER", [str(killer)])
    with pytest.raises(EngineError, match="memory ran out") as caught:
        build(quantized, BuildOptions(compute_capabilities=("8.9",)))
    check_parts(caught.value)
    assert not (quantized / "engines").exists()


SLOW = """
import sys, time, json, os
if __name__ == "__main__":
    answers = os.fdopen(int(sys.argv[1]), "w")
    request = json.loads(sys.stdin.readline())
    open(request["plan"], "wb").write(b"half a plan")
    print(json.dumps({"phase": "Compiling", "progress": 0.5}), file=answers, flush=True)
    open(sys.argv[2] if len(sys.argv) > 2 else os.environ["STARTED"], "w").write(str(os.getpid()))
    time.sleep(600)
"""
RUN = """
import sys
from hywu_export.engines import process
process._WORKER = [sys.argv[1]]
process._GRACE = 0.2
from hywu_export.cli import hywu
hywu.main(["build", sys.argv[2], "--compute-capability", "89"])
"""


@rtx
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing(quantized: Path, tmp_path: Path, how: signal.Signals) -> None:
    before = everything(quantized)
    slow, started = tmp_path / "slow.py", tmp_path / "started"
    slow.write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(slow), str(quantized)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "STARTED": str(started)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not started.exists() or not started.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    code = process.wait(30)
    if how == signal.SIGINT:
        assert code == 130, process.communicate()
        assert everything(quantized) == before
        assert not (quantized / "engines").exists()
    assert Bundle.open(quantized, verify=True).manifest.engines == {}
    # What was killed left no more than a folder that the next addition of that name removes.
    partial = list((quantized / "engines").glob(".*")) if (quantized / "engines").exists() else []
    for folder in partial:
        key = folder.name[1:].split(".partial-")[0]
        with BundleAddition(quantized, f"engines/{key}"):
            pass
    assert everything(quantized) == before


@rtx
def test_a_cancelled_monitor_stops_the_builder(tmp_path: Path) -> None:
    from hywu_export.engines.tensorrt import Cancelled, Settings, TensorRT

    told: list[tuple[str, float]] = []

    def progress(phase: str, done: float) -> bool:
        told.append((phase, done))
        return len(told) < 3

    with (tmp_path / "log").open("w") as log:
        tensorrt = TensorRT("tensorrt-rtx", log)
        network = tensorrt.parse(model().SerializeToString())
        profile = {
            "x": [(1, 16, WIDTH)] * 3,
            "m.lora_A": [(1, 8, WIDTH)] * 3,
            "m.lora_B": [(1, WIDTH, 8)] * 3,
            "gate": [(1,)] * 3,
        }
        with pytest.raises(Cancelled):
            tensorrt.compile(network, profile, Settings(compute_capabilities=("8.9",)), None, progress)
    assert len(told) < 20


@rtx
def test_linked_weights_are_read_from_the_checkpoint(tmp_path: Path, pair: Any) -> None:
    from hywu_export import ExportOptions, export

    folder = tmp_path / "linked"
    export(folder, None, pair.generator, ExportOptions(link_weights=True))
    options = BuildOptions(compute_capabilities=("8.9",), graphs=("generator",))
    with pytest.raises(BundleError, match="--source"):
        build(folder, options)
    sources = {name: str(pair.generator) for name in Bundle.open(folder, links=False).manifest.sources}
    built = build(folder, BuildOptions(("tensorrt-rtx"), ("8.9",), graphs=("generator",), sources=sources))
    assert sum(built.report["graphs"]["generator"]["products"].values()) > 0


def in_half_precision(bundle: Path, dtype: Any) -> None:
    """Adds the variant ``dtype`` to a bundle, with nothing measured."""
    from hywu_export.bundle.variants import load_graph, write_variant
    from hywu_export.passes.half import to_half

    opened = Bundle.open(bundle)
    graphs = {name: to_half(load_graph(opened, name), dtype) for name in opened.manifest.graphs}
    write_variant(bundle, dtype, dtype, graphs)


@rtx
@pytest.mark.slow
@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
def test_every_graph_of_a_whole_bundle(bundle: Path, tmp_path: Path, variant: str | None) -> None:
    """Breadth: the tiny pipeline's graphs in every precision; all capabilities that have it in one engine."""
    from shutil import copytree

    copy = copytree(bundle, tmp_path / "copy")
    if variant is not None:
        in_half_precision(copy, variant)
    capabilities = (*(["7.5"] if variant == "fp16" else []), "8.0", "8.6", "8.9", "12.0")
    options = BuildOptions(
        compute_capabilities=capabilities, shapes=ShapeOptions(batch="1:1:2"), variant=variant
    )
    report = build(copy, options).report
    assert report["compute_capabilities"] == list(capabilities)
    for name, graph in report["graphs"].items():
        # A Cast of an input may be fused into a product, which then is listed with the input's dtype.
        reads_inputs = name.startswith("prepare_step")
        assert set(graph.get("products", {})) <= {variant or "fp32"} | ({"fp32"} if reads_inputs else set())
    assert report["graphs"].keys() == Bundle.open(copy).manifest.graphs.keys()
    for graph in ("prepare_step", "prepare_step_unguided", "step", "step_unguided"):
        deltas = report["graphs"][graph]["deltas"]
        assert deltas["targets"] == len(deltas["branches"]) > 0
        assert all("a" in branch and "b" in branch for branch in deltas["branches"])
    assert json.loads((copy / "engines" / report["key"] / "report.json").read_text()) == report


def test_no_such_graph_or_variant(quantized: Path) -> None:
    for options in (BuildOptions(graphs=("ghost",)), BuildOptions(variant="ghost")):
        with pytest.raises(InputError, match="ghost") as caught:
            build(quantized, options)
        check_parts(caught.value)
