"""``hywu calibrate`` on a tiny random pair: variants that run, refusals, and a job that was killed."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from cli_tools import answer, names, picture, refused, run

from hywu_runtime import Editor, Manifest

pytestmark = pytest.mark.slow

PROMPTS = "make it sepia\nblur the photo\n\na cat\n"
STEPS = ("--steps", 2, "--samples", 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Photographs and prompts as arguments."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "photos").mkdir()
    for i, (width, height) in enumerate([(24, 16), (16, 24)]):
        picture(folder / "photos" / f"{i}.png", width, height)
    (folder / "prompts.txt").write_text(PROMPTS)
    return "--images", folder / "photos", "--prompts", folder / "prompts.txt"


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that may be written to."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def calibrated(folder: Path, data: tuple[Any, ...], *more: object) -> Any:
    return answer("calibrate", folder, *data, *STEPS, "--min-psnr", 20, *more)


@pytest.fixture(scope="module")
def int8(
    bundle: Path, data: tuple[Any, ...], once: Callable[[str, Callable[[Path], None]], Path]
) -> tuple[Path, Any]:
    """The bundle with an INT8 variant, and the report."""

    def make(folder: Path) -> None:
        folder.mkdir()
        shutil.copytree(bundle, folder / "bundle")
        report = calibrated(folder / "bundle", data, "--variant", "int8", "--smooth", 0.8)
        (folder / "answer.json").write_text(json.dumps(report))

    folder = once("int8_bundle", make)
    return folder / "bundle", json.loads((folder / "answer.json").read_text())


def test_report(int8: tuple[Path, Any]) -> None:
    from hywu_calibration.report import SCHEMA

    folder, printed = int8
    variant = folder / "variants" / "int8"
    stored = json.loads((variant / "report.json").read_text())
    assert {**stored, "met": printed["met"]} == printed
    jsonschema.validate(stored, json.loads(SCHEMA.read_text()))
    image = stored["final_image"]
    assert image["deltas_on"]["psnr_db"] > 20
    assert image["deltas_off"]["psnr_db"] > 20
    assert len({(x["graph"], x["name"]) for x in stored["layers"]}) == len(stored["layers"]) > 40
    assert {x["graph"] for x in stored["layers"]} >= {"step", "step_unguided", "image_decoder", "generator"}
    assert sum(x["precision"] != "int8" for x in stored["layers"]) <= 0.1 * len(stored["layers"]) + 1
    assert all(w["reason"] for w in stored["wide"])
    assert "<svg" in (variant / "report.html").read_text()
    assert Manifest.read(folder).variants["int8"].precision == "int8"
    assert names(folder.parent) == {"bundle", "answer.json"}  # and no recordings are left


def test_the_variant_runs_and_deltas_act(int8: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = int8
    photo = picture(tmp_path / "p.png")
    with Editor.load(folder, "ort-cpu") as exact, Editor.load(folder, "ort-cpu", variant="int8") as editor:
        pictures = [e.edit(photo, "a cat", steps=2, output="array").astype(int) for e in (exact, editor)]
        assert np.abs(pictures[0] - pictures[1]).mean() < 12
        off = editor.edit(photo, "a cat", steps=2, delta_strength=0, output="array").astype(int)
        assert np.abs(off - pictures[1]).max() > 0
        batches = [
            editor.edit_batch([(photo, "a cat"), (photo, other)], steps=2, seed=[0, seed], output="array")
            for other, seed in (("make it sepia", 5), ("ugly", 6))
        ]
        np.testing.assert_array_equal(batches[0][0], batches[1][0])  # not its neighbour's business
        assert (batches[0][1] != batches[1][1]).any()


def test_layers_are_what_the_report_says(int8: tuple[Path, Any]) -> None:
    folder, report = int8
    for graph in ("step_unguided", "image_decoder"):
        model = onnx.load(folder / "variants" / "int8" / f"{graph}.onnx", load_external_data=False)
        made = {name: node for node in model.graph.node for name in node.output}
        quantized = set()
        for node in model.graph.node:
            if node.op_type in ("MatMul", "Conv", "Gemm"):
                sides = [made.get(name) for name in node.input[:2]]
                if all(side is not None and side.op_type == "DequantizeLinear" for side in sides):
                    quantized.add(sides[1].input[0].removesuffix(".weight.int8"))
                assert not any(".lora_" in name for name in node.input) or "Dequantize" not in node.input[0]
        expected = {x["name"] for x in report["layers"] if x["graph"] == graph and x["precision"] == "int8"}
        assert quantized == expected


@pytest.mark.rtx
def test_tensorrt_rtx_parses_every_graph(int8: tuple[Path, Any]) -> None:
    pytest.importorskip("tensorrt_rtx")
    from hywu_export.engines.tensorrt import parser_errors

    folder, _ = int8
    for file in Manifest.read(folder).variants["int8"].graphs.values():
        assert parser_errors(folder / file) == [], file


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8-weights"])
def test_other_precisions(own: Path, data: tuple[Any, ...], precision: str) -> None:
    report = calibrated(own, data, "--variant", precision)
    assert report["final_image"]["deltas_on"]["psnr_db"] > 25
    assert report["size"]["variant_bytes"] < 0.7 * report["size"]["fp32_bytes"]


def test_for_the_cpu(own: Path, data: tuple[Any, ...], tmp_path: Path) -> None:
    report = calibrated(
        own, data, "--variant", "int8", "--backend", "ort-cpu", "--name", "int8-cpu", "--method", "minmax"
    )
    assert report["final_image"]["measured"] == "runtime"
    assert {x["op"] for x in report["layers"]} <= {"MatMul", "Gemm"}
    model = onnx.load(own / "variants" / "int8-cpu" / "step.ort-cpu.onnx", load_external_data=False)
    assert not any(value.data_type == onnx.TensorProto.FLOAT16 for value in model.graph.initializer)
    photo, edited = picture(tmp_path / "p.png"), tmp_path / "o.png"
    run("edit", own, photo, "a cat", "--steps", 1, "--variant", "int8-cpu", "--out", edited)
    assert "--backend tensorrt" in refused("build", own, "--variant", "int8-cpu")


def test_text(own: Path, data: tuple[Any, ...]) -> None:
    (broken := Path(data[1]) / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    try:
        result = run(
            "calibrate", own, *data, *STEPS, "--variant", "int8", "--min-psnr", 99, "--max-wide", 0.02
        )
    finally:
        broken.unlink()
    assert "deltas on" in result.stdout
    assert "Not reached: --min-psnr 99" in result.stdout
    assert "SQNR" in result.stdout
    assert "broken.jpg is skipped" in result.stderr
    assert "1 photograph that cannot be read" in result.stdout


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(
    int8: tuple[Path, Any], own: Path, data: tuple[Any, ...]
) -> None:
    arguments = ["calibrate", own, *data, *STEPS, "--min-psnr", 20, "--variant", "int8", "--smooth", 0.8]
    before = files(own)
    code = "import sys; from hywu_export.cli import main; sys.argv[0] = 'hywu'; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE)
    cache = own.parent / f".{own.name}.calibration"
    try:
        while process.poll() is None and len(list(cache.glob("*/sample-*"))) < 2:
            pass
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert files(own) == before
    recorded = {p.name: p.stat().st_mtime_ns for p in cache.glob("*/sample-*")}
    assert len(recorded) >= 2
    run(*arguments)
    assert not cache.exists()
    assert files(own / "variants" / "int8") == files(int8[0] / "variants" / "int8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((), ["--images and --prompts missing", "random data"]),
        (("--prompts", "PROMPTS"), ["--images missing"]),
        (("--images", "IMAGES"), ["--prompts missing"]),
        (("--images", "nowhere", "--prompts", "PROMPTS"), ["nowhere"]),
        (("--images", "IMAGES", "--prompts", "nowhere"), ["nowhere"]),
        (("DATA", "--samples", 0), ["--samples is 0"]),
        (("DATA", "--max-wide", 1.5), ["--max-wide"]),
        (("DATA", "--smooth", math.nan), ["--smooth"]),
        (("DATA", "--name", "../x"), ["no name for a variant"]),
        (("DATA", "--steps", 10**6), ["1000000 steps"]),
        (("DATA", "--deltas", "nowhere"), ["nowhere"]),
        (("DATA", "--source", "x=y"), ["no source"]),
        (("DATA", "--variant", "fp16", "--backend", "ort-cpu"), ["belongs to int8"]),
    ],
)
def test_refusals(bundle: Path, data: tuple[Any, ...], change: tuple[Any, ...], words: list[str]) -> None:
    places = {"IMAGES": [data[1]], "PROMPTS": [data[3]], "DATA": list(data)}
    arguments = [
        part for one in change for part in (places.get(one, [one]) if isinstance(one, str) else [one])
    ]
    message = refused("calibrate", bundle, "--variant", "int8", *arguments)
    for word in words:
        assert word in message


def test_photographs_beside_the_bundle_are_offered(own: Path, data: tuple[Any, ...]) -> None:
    (own.parent / "photos").mkdir()
    picture(own.parent / "photos" / "a.jpg")
    assert str(own.parent / "photos") in refused("calibrate", own, "--variant", "int8")


def test_not_a_bundle_that_edits(pair: Any, data: tuple[Any, ...], tmp_path: Path) -> None:
    from hywu_export import export

    export(tmp_path / "generator", None, pair.generator)
    message = refused("calibrate", tmp_path / "generator", "--variant", "int8", *data)
    assert "makes no images" in message


def test_disk_full(own: Path, data: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(own)
    import hywu_runtime.files

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hywu_runtime.files.os, "replace", full)
    message = refused("calibrate", own, "--variant", "int8", *data, *STEPS)
    assert "No space left" in message
    monkeypatch.undo()
    assert files(own) == before
    shutil.rmtree(own.parent / f".{own.name}.calibration", ignore_errors=True)


def test_disk_full_at_the_end(own: Path, data: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the variant is written, when all the work is done: it is not lost."""
    before = files(own)
    fsync = os.fsync

    def full(file: int) -> None:
        if "/variants/" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    arguments = ("calibrate", own, "--variant", "fp16", *data, "--steps", 1, "--samples", 4, "--min-psnr", 20)
    assert "No space left" in refused(*arguments)
    monkeypatch.undo()
    assert files(own) == before
    assert names(own) == {name.partition("/")[0] for name in before}
    cache = own.parent / f".{own.name}.calibration"
    recorded = {p.name: p.stat().st_mtime_ns for p in cache.glob("*/sample-*")}
    assert recorded
    run(*arguments, "--cache", cache)
    assert {p.name: p.stat().st_mtime_ns for p in cache.glob("*/sample-*")} == recorded
    assert "fp16" in Manifest.read(own).variants


def test_linked_weights(pair: Any, linked_bundle: Path, data: tuple[Any, ...], tmp_path: Path) -> None:
    own = Path(shutil.copytree(linked_bundle, tmp_path / "bundle"))
    few = ("calibrate", own, *data, "--steps", 1, "--samples", 4, "--min-psnr", 20, "--variant")
    assert "--source" in refused(*few, "fp16")
    sources = ("--source", f"base={pair.base}", "--source", f"generator={pair.generator}")
    answer(*few, "fp16", *sources)
    manifest = Manifest.read(own)
    for graph, file in manifest.variants["fp16"].graphs.items():  # cast where they are
        assert manifest.linked.get(file) == manifest.linked.get(manifest.graphs[graph].file), graph
    assert "variants/fp16/weights/unet.safetensors" not in manifest.files
    answer(*few, "int8-weights", *sources)
    manifest = Manifest.read(own)
    stored = manifest.files["variants/int8-weights/weights/unet.safetensors"].size
    unet = (pair.base / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert 0.2 * unet < stored < 0.4 * unet  # stored as INT8; biases and norms stay linked
    photo, edited = picture(tmp_path / "p.png", 16, 16), tmp_path / "o.png"
    for variant in ("fp16", "int8-weights"):
        edit = ("edit", own, photo, "a cat", "--steps", 1, "--variant", variant, "--out", edited)
        run(*edit, *sources)
    assert "--source" in refused(*edit)


def spoiled(own: Path, file: str, name: str) -> None:
    """Puts NaN into a weight of a bundle, and its hash into the manifest."""
    import hashlib

    from safetensors import safe_open

    path = own / file
    content = bytearray(path.read_bytes())
    with safe_open(path, "numpy") as tensors:
        assert name in tensors.keys()  # noqa: SIM118
    header = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + header])[name]["data_offsets"][0] + 8 + header
    content[start : start + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["files"][file]["sha256"] = hashlib.sha256(content).hexdigest()
    (own / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("file", "name", "node", "graph"),
    [
        ("weights/unet.safetensors", "conv_in.weight", "unet.conv_in/Conv", "step"),
        ("weights/generator.safetensors", "hidden_in.weight", "generator.hidden_in", "generator"),
    ],
)
def test_nan_names_the_node(
    own: Path, data: tuple[Any, ...], file: str, name: str, node: str, graph: str
) -> None:
    spoiled(own, file, name)
    message = refused("calibrate", own, "--variant", "int8", *data, *STEPS)
    assert node in message
    assert f"graph {graph}" in message
