"""`hywu verify` without checkpoints: variants and engines against the bundle's own graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_tools import answer, picture, refused, run
from fake_tensorrt import Machine, add_engine
from toy_bundle import rewrite, write_bundle

from hywu_export.verify.subjects import VariantSubject
from hywu_runtime import Bundle


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "toy")
    return tmp_path / "toy"


def add_variant(
    bundle: Path,
    name: str,
    graph: str,
    change: Callable[[onnx.ModelProto], object] = lambda model: None,
    precision: str = "fp16",
    worst_psnr: float | None = None,
) -> None:
    """A variant with one graph, changed by hand."""
    model = onnx.load(bundle / f"{graph}.onnx")
    change(model)
    folder = bundle / "variants" / name
    folder.mkdir(parents=True)
    onnx.save(model, folder / f"{graph}.onnx")
    entry: dict[str, Any] = {"precision": precision, "graphs": {graph: f"variants/{name}/{graph}.onnx"}}
    if worst_psnr is not None:
        quality = {"psnr_db": worst_psnr + 3, "least_psnr_db": worst_psnr, "edits": []}
        report = {"final_image": {"deltas_on": quality, "deltas_off": quality}}
        (folder / "report.json").write_text(json.dumps(report))
        entry["report"] = f"variants/{name}/report.json"
    rewrite(bundle, lambda value: value.setdefault("variants", {}).update({name: entry}))


def scale(initializer: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    """Multiplies one weight."""

    def change(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == initializer)
        array = onnx.numpy_helper.to_array(tensor) * factor
        tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype("float32"), tensor.name))

    return change


def by_name(report: Any, part: str) -> dict[str, Any]:
    return {check["name"]: check for check in report["checks"] if check["part"] == part}


def test_a_good_variant(toy: Path) -> None:
    add_variant(toy, "near", "step", scale("mix", 1.0005), worst_psnr=45)
    add_variant(toy, "same", "step_plain")
    report = answer("verify", toy)
    assert report["ok"]
    near = by_name(report, "variant near")
    assert set(near) == {"step", "edit", "edit without deltas", "edit without guidance"}
    assert {t["tensor"] for t in near["step"]["tensors"]} == {"next", "next_cache"}
    assert all(t["sqnr_db"] > 50 for t in near["step"]["tensors"])
    assert near["edit"]["tensors"][0]["tolerance"] == {"kind": "psnr_db", "limit": 39.0}
    same = by_name(report, "variant same")
    assert same["step_plain"]["tensors"][0]["largest"] == 0
    assert [part["part"] for part in report["not_run"]] == ["torch"]
    assert "each FP16 and BF16 result rounded" in report["notes"][0]
    text = run("verify", toy, "--variant", "near").stdout
    assert "variant same" not in text
    assert "SQNR of at least 35 dB" in text
    assert "PSNR of at least 39 dB (its report's 45.0 less 6)" in text
    assert max(map(len, text.splitlines())) <= 140


def test_a_wrong_value_names_the_worst_tensor(toy: Path) -> None:
    add_variant(toy, "wrong", "step", scale("mix", 1.5))
    result = run("verify", toy, code=4)
    (line,) = (line for line in result.stdout.splitlines() if " step " in line)
    assert line.startswith("FAIL")
    assert "next: expected SQNR of at least 35 dB at batch 1" in line
    assert "FAIL  variant wrong  edit " in result.stdout
    # The same difference is within what INT8 may cost.
    shutil.rmtree(toy / "variants")
    rewrite(toy, lambda value: value.pop("variants"))
    add_variant(toy, "int8", "step", scale("mix", 1.1), precision="int8")
    assert run("verify", toy).exit_code == 0


def test_a_promise_that_is_not_kept(toy: Path) -> None:
    add_variant(toy, "int8", "step", scale("mix", 1.1), precision="int8", worst_psnr=80)
    report = answer("verify", toy, code=4)
    assert by_name(report, "variant int8")["step"]["failure"] is None
    assert by_name(report, "variant int8")["edit"]["failure"] == "value"


def twice(model: onnx.ModelProto) -> None:
    last = next(node for node in model.graph.node if "image" in node.output)
    last.output[:] = ["once"]
    model.graph.node.append(onnx.helper.make_node("Concat", ["once", "once"], ["image"], axis=1))


def test_a_wrong_shape(toy: Path) -> None:
    add_variant(toy, "tall", "final", twice)
    result = run("verify", toy, code=3)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("FAIL"))
    assert "image: wrong shape: uint8 [1, 64, 32, 3] instead of uint8 [1, 32, 32, 3] at " in line


def test_a_graph_that_does_not_load_or_take_its_inputs(toy: Path) -> None:
    add_variant(toy, "cut", "step")
    (toy / "variants/cut/step.onnx").write_bytes(b"no graph")
    rewrite(toy, lambda value: None)
    report = answer("verify", toy, code=3)
    assert "cannot be loaded" in by_name(report, "variant cut")["step"]["tensors"][0]["detail"]


def in_bf16(model: onnx.ModelProto) -> None:
    """The first product in BF16."""
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    place = list(model.graph.node).index(product)
    casts = [
        onnx.helper.make_node("Cast", [name], [f"{name}.bf16"], to=onnx.TensorProto.BFLOAT16)
        for name in product.input
    ]
    back = onnx.helper.make_node("Cast", ["narrow"], [product.output[0]], to=onnx.TensorProto.FLOAT)
    product.input[:] = [cast.output[0] for cast in casts]
    product.output[:] = ["narrow"]
    model.graph.node.insert(place + 1, back)
    for cast in casts:
        model.graph.node.insert(place, cast)


def test_bf16_is_run_with_its_roundings(toy: Path) -> None:
    add_variant(toy, "bf16", "step", in_bf16, precision="bf16")
    report = answer("verify", toy)
    assert [part["part"] for part in report["not_run"]] == ["torch"]
    checks = by_name(report, "variant bf16")
    assert set(checks) == {"step", "edit", "edit without deltas", "edit without guidance"}
    assert 30 < checks["step"]["tensors"][0]["sqnr_db"] < 70  # a significand of 8 bits: 48 dB


def thirds(model: onnx.ModelProto) -> None:
    """``latents`` times a third, times three, in FP16."""
    fp16, fp32 = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    node = onnx.helper.make_node
    for name, factor in (("third", 1 / 3), ("three", 3)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float16(factor), name))
    next(n for n in model.graph.node if "latents" in n.output).output[:] = ["exact"]
    model.graph.node.extend(
        [
            node("Cast", ["exact"], ["narrow"], to=fp16),
            node("Mul", ["narrow", "third"], ["less"]),
            node("Mul", ["less", "three"], ["more"]),
            node("Cast", ["more"], ["latents"], to=fp32),
        ]
    )


def test_fp16_is_rounded_after_every_node(toy: Path) -> None:
    add_variant(toy, "fp16", "prepare", thirds)
    random = np.random.default_rng(0)
    noise = random.standard_normal((1, 4, 8, 8)).astype(np.float32)
    inputs = {"noise": noise, "scale": np.array(1, np.float32), "words": np.ones((1, 4), np.float32)}
    subject = VariantSubject(Bundle.open(toy), "fp16")
    found = subject.run("prepare", inputs, {"latents": noise.shape, "cache": (1, 4)})["latents"]
    rounded = noise.astype(np.float16) * np.float16(1 / 3) * np.float16(3)  # by NumPy
    np.testing.assert_array_equal(found, rounded.astype(np.float32))
    assert by_name(answer("verify", toy), "variant fp16")["prepare"]["failure"] is None


def test_photo_prompt_and_bad_names(toy: Path, tmp_path: Path) -> None:
    add_variant(toy, "same", "step")
    photo = picture(tmp_path / "photo.png")
    assert answer("verify", toy, "--photo", photo, "--prompt", "hello")["ok"]
    assert "nothing.png" in refused("verify", toy, "--photo", tmp_path / "nothing.png")
    assert "no variant 'int4'" in refused("verify", toy, "--variant", "int4")
    assert "no engine" in refused("verify", toy, "--engine", "key")
    assert "--toy DIR" in refused("verify", toy, "--base", tmp_path)


def test_engines_are_run_where_there_is_a_device(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_variant(toy, "wrong", "step", scale("mix", 1.5))
    machine = Machine(monkeypatch)
    shapes = {"batch": (1, 2, 4), "delta_batch": (1, 1, 4), "height": (8, 16, 64), "width": (8, 24, 64)}
    add_engine(toy, "good", shapes=shapes)
    add_engine(toy, "off", backend="tensorrt-rtx", variant="wrong", shapes=shapes)
    add_engine(toy, "old", version="9.9")
    report = answer("verify", toy, code=4)
    good = by_name(report, "engine good")
    assert set(good) >= {"words", "encode", "generate", "step", "step_plain", "final", "edit"}
    assert all(tensor["largest"] == 0 for check in good.values() for tensor in check["tensors"])
    assert good["edit"]["tensors"][0]["sizes"] == {"height": 16, "width": 24}
    assert by_name(report, "engine off")["step"]["failure"] == "value"
    assert by_name(report, "engine off")["words"]["failure"] is None
    (old,) = (part for part in report["not_run"] if part["part"] == "engine old")
    assert "built by version 9.9" in old["reason"]
    machine.cuda.failing["cudaGetDeviceCount"] = 35
    report = answer("verify", toy, "--engine", "good")
    (good,) = (part for part in report["not_run"] if part["part"] == "engine good")
    assert "CUDA error 35" in good["reason"]


def test_a_bundle_that_only_generates(toy: Path) -> None:
    def alone(value: Any) -> None:
        value["results"].pop("image")
        kept = {"words", "marks", "generate"}
        value["graphs"] = {name: graph for name, graph in value["graphs"].items() if name in kept}
        value["program"] = [
            call for call in value["program"] if call["graph"] in kept and call["phase"] == "request"
        ]
        for key in ("state", "schedules", "guidance", "image", "deltas"):
            value.pop(key)
        value["tensors"] = {
            k: t for k, t in value["tensors"].items() if k in ("ids.words", "ids.marks", "ids.marks.mask")
        }
        value["axes"] = {"batch": value["axes"]["batch"]}

    rewrite(toy, alone)
    add_variant(toy, "wrong", "generate", scale("to_a", 1.5))
    report = answer("verify", toy, code=4)
    assert by_name(report, "variant wrong")["generate"]["worst"] == "a"
