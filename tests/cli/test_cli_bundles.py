"""``hywu inspect`` and ``hywu verify``, and what all commands make of damaged and hostile bundles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import answer, copy_tree, names, picture, refused, run

from hywu_runtime import Manifest


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return picture(tmp_path / "photo.png")


def test_inspect(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    report = answer("inspect", bundle, "--verify")
    assert report["verified_files"] == len(manifest.files)
    assert report["graphs"]["text_encoder"]["phases"] == ["request"]
    assert report["graphs"]["step"]["inputs"] == len(manifest.graphs["step"].inputs)
    assert report["bytes"] == sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) - (
        (bundle / "manifest.json").stat().st_size
    )
    assert report["default_scheduler"] == "euler_a"
    assert report["schedulers"]["heun"] == {
        "class": "HeunDiscreteScheduler",
        "steps": [1, 12],
        "stochastic": False,
        "midway": False,
    }
    assert report["guidance"] == {"text": 7.5, "image": 1.5}
    assert manifest.deltas is not None
    targets = len(manifest.deltas.targets)
    assert report["deltas"] == {
        "targets": targets,
        "rank": 4,
        "kinds": {"linear": targets},
        "numbers": targets * 4 * (32 + 32),
    }
    assert set(report["sources"]) == {"base", "generator"}


def test_inspect_for_people(bundle: Path, lora_bundle: Path) -> None:
    text = run("inspect", bundle, "--verify").stdout
    for word in (
        "StableDiffusionInstructPix2PixPipeline",
        "text_encoder",
        "euler_a",
        "are right",
        "32 tokens",
    ):
        assert word in text
    assert "no: given with each request" in run("inspect", lora_bundle).stdout
    assert max(map(len, text.splitlines())) <= 120


def test_inspect_cannot_steer_the_terminal(bundle: Path, tmp_path: Path) -> None:
    copy = changed(bundle, tmp_path, lambda manifest: manifest.update(name="evil \x1b[2J\r"))
    assert "\x1b" not in run("inspect", copy).stdout
    assert "\r" not in run("inspect", copy).stdout


def changed(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a bundle with another manifest."""
    copy = copy_tree(bundle, folder / "bundle", ["manifest.json"])
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def all_refuse(copy: Path, photo: Path, folder: Path) -> str:
    """Every command that reads a bundle refuses it and leaves nothing; the message of inspect."""
    before = names(folder)
    refused("edit", copy, photo, "a cat", "--steps", 1, "--out", folder / "out.png")
    refused("deltas", "generate", copy, photo, "a cat", "--out", folder / "out.safetensors")
    message = refused("inspect", copy)
    assert names(folder) == before
    return message


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5, []])
def test_unknown_format(bundle: Path, photo: Path, tmp_path: Path, version: object) -> None:
    copy = changed(bundle, tmp_path, lambda manifest: manifest.update(format=version))
    assert "format" in all_refuse(copy, photo, tmp_path)


@pytest.mark.parametrize("path", ["../step.onnx", "/etc/passwd", "weights/../../x", "C:\\x", "a\0b", ""])
def test_path_that_leads_out(bundle: Path, photo: Path, tmp_path: Path, path: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        old = manifest["graphs"]["image_encoder"]["file"]
        manifest["graphs"]["image_encoder"]["file"] = path
        manifest["files"][path] = manifest["files"].pop(old)

    all_refuse(changed(bundle, tmp_path, change), photo, tmp_path)


def test_link_that_leads_out(bundle: Path, photo: Path, tmp_path: Path) -> None:
    copy = copy_tree(bundle, tmp_path / "bundle")
    (copy / "step.onnx").rename(tmp_path / "elsewhere.onnx")
    (copy / "step.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    assert "step.onnx" in all_refuse(copy, photo, tmp_path)


@pytest.mark.parametrize(
    "name", ["manifest.json", "step.onnx", "weights/unet.safetensors", "schedule.safetensors"]
)
def test_truncated_bundle(bundle: Path, photo: Path, tmp_path: Path, name: str) -> None:
    copy = copy_tree(bundle, tmp_path / "bundle", [name])
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    assert name in all_refuse(copy, photo, tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "step.onnx", "tokenizer/tokenizer.json"])
def test_missing_file(bundle: Path, photo: Path, tmp_path: Path, name: str) -> None:
    copy = copy_tree(bundle, tmp_path / "bundle")
    (copy / name).unlink()
    all_refuse(copy, photo, tmp_path)


FLIPPED = [
    "step_unguided.onnx",
    "weights/vae.safetensors",
    "schedule.safetensors",
    "tokenizer/tokenizer.json",
]


@pytest.mark.parametrize("name", FLIPPED)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.7])
def test_flipped_bit(bundle: Path, photo: Path, tmp_path: Path, name: str, place: float) -> None:
    """``--verify`` finds it; without, an edit may fail or succeed, but not crash."""
    copy = copy_tree(bundle, tmp_path / "bundle", [name])
    data = bytearray((copy / name).read_bytes())
    data[int(len(data) * place)] ^= 0x10
    (copy / name).write_bytes(data)
    assert name in refused("inspect", copy, "--verify")
    out = tmp_path / "out.png"
    result = run("edit", copy, photo, "a cat", "--steps", 1, "--guidance", 1, "--out", out, code=None)
    assert result.exit_code in (0, 1, 2)
    assert out.exists() == (result.exit_code == 0)
    assert result.exit_code == 0 or result.stderr.startswith("Error: ")


@pytest.mark.parametrize("place", np.linspace(0, 0.99, 12).tolist())
def test_flipped_bit_in_the_manifest(bundle: Path, tmp_path: Path, place: float) -> None:
    copy = copy_tree(bundle, tmp_path / "bundle", ["manifest.json"])
    data = bytearray((copy / "manifest.json").read_bytes())
    data[int(len(data) * place)] ^= 0x80  # no JSON text of ours has such a byte
    (copy / "manifest.json").write_bytes(data)
    refused("inspect", copy)


def test_no_bundle(tmp_path: Path, photo: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", photo):
        all_refuse(path, photo, tmp_path)


def test_verify(bundle: Path, pair: Any) -> None:
    report = answer("verify", bundle, "--base", pair.base, "--generator", pair.generator)
    manifest = Manifest.read(bundle)
    assert report["ok"]
    graphs = {check["name"]: check for check in report["checks"]}
    for name, graph in manifest.graphs.items():
        if f"prepare_{name}" in manifest.graphs or not name.startswith("prepare_"):  # checked as one
            assert [t["tensor"] for t in graphs[name]["tensors"]] == [o.name for o in graph.outputs]
    edit = graphs["edit without deltas, euler_a, 4 steps"]
    assert edit["tensors"][0]["largest"] <= 1
    assert {check["part"] for check in report["checks"]} == {"torch"}
    for check in report["checks"]:
        for tensor in check["tensors"]:
            assert tensor["relative"] <= 1e-4 or tensor["tolerance"] == {"kind": "levels", "limit": 1}
            assert tensor["mean"] <= tensor["largest"]
            assert tensor["sqnr_db"] is None or tensor["sqnr_db"] > 60


def republish(copy: Path, name: str, data: bytes) -> None:
    """Puts a changed file into a bundle as if it belonged there."""
    (copy / name).write_bytes(data)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))


def test_verify_finds_a_wrong_value(lora_bundle: Path, pair: Any, tmp_path: Path) -> None:
    name = "weights/unet.safetensors"
    copy = copy_tree(lora_bundle, tmp_path / "bundle", [name, "manifest.json"])
    data = (copy / name).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    weights = np.frombuffer(data[start:], np.float32) * np.float32(1.01)
    republish(copy, name, data[:start] + weights.tobytes())
    result = run("verify", copy, "--base", pair.base, code=4)
    verdicts = {tuple(line.split()[1:3]): line for line in result.stdout.splitlines() if line}
    assert verdicts["torch", "step"].startswith("FAIL")
    assert ".next: expected within 0.0001 of the largest value at batch" in verdicts["torch", "step"]
    assert verdicts["torch", "text_encoder"].startswith("ok")
    assert "within 0.0001" in verdicts["torch", "text_encoder"]
    assert verdicts["torch", "edit"].startswith("FAIL")
    assert "checks failed" in result.stdout


def test_verify_finds_a_wrong_shape(lora_bundle: Path, pair: Any, tmp_path: Path) -> None:
    import onnx

    name = "image_decoder.onnx"
    copy = copy_tree(lora_bundle, tmp_path / "bundle", [name, "manifest.json"])
    model = onnx.load(copy / name, load_external_data=False)
    last = next(node for node in model.graph.node if "edited" in node.output)
    last.output[:] = ["once"]
    model.graph.node.append(onnx.helper.make_node("Concat", ["once", "once"], ["edited"], axis=1))
    republish(copy, name, model.SerializeToString())
    result = run("verify", copy, "--base", pair.base, code=3)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("FAIL"))
    assert "image_decoder" in line
    assert "wrong shape: uint8 [1, 16, 12, 3] instead of uint8 [1, 8, 12, 3]" in line


def test_verify_needs_the_checkpoints(bundle: Path, pair: Any) -> None:
    assert "--base DIR --generator DIR" in refused("verify", bundle, "--base", pair.base)
    assert "no variants or engines" in refused("verify", bundle)
