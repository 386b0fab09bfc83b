"""``hywu export``: what it says, what it refuses, and what a killed one leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import answer, copy_tree, names, picture, refused, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli_basics import COMMAND, environment

from hywu_export.deltas.catalogue import Catalogue
from hywu_runtime import Deltas, Editor, Manifest


@pytest.mark.slow
def test_generator_alone(pair: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    report = answer("export", "--generator", pair.generator, "--out", out, "--batch", 4)
    manifest = Manifest.read(out)
    assert report["graphs"] == ["generator"]
    assert report["generated"] == len(manifest.results.deltas)
    assert manifest.axes["batch"].max == 4
    assert report["bytes"] == sum(file.size for file in manifest.files.values())
    assert "generated" in run("inspect", out).stdout
    condition = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float32)
    with Editor.load(out) as editor:
        made = editor.generate(inputs={"condition": condition})
    assert isinstance(made, Deltas)
    assert made.batch == 2
    checked = answer("verify", out, "--generator", pair.generator)
    assert checked["ok"]
    (check,) = checked["checks"]  # and no edit
    assert len(check["tensors"]) == report["generated"]
    text = run("export", "--generator", pair.generator, "--out", out, "--overwrite").stdout
    assert "generated" in text
    assert Manifest.read(out).axes["batch"].max == 8
    assert names(tmp_path) == {"bundle"}


@pytest.mark.slow
def test_pair_with_linked_weights(pair: Any, linked_bundle: Path, tmp_path: Path) -> None:
    out = linked_bundle
    report = json.loads((out.parent / "export.json").read_text())
    assert report["schedulers"] == ["euler", "dpmpp_2m"]
    assert report["linked_bytes"] > 3_000_000 > report["bytes"]
    summary = answer("inspect", out)
    assert summary["guidance"] == {"text": 3, "image": 1.25}
    assert (summary["default_steps"], summary["image"]["default_area"], summary["image"]["max"]) == (
        3,
        256,
        64,
    )
    assert (
        answer("inspect", out, "--source", f"base={pair.base}", "--source", f"generator={pair.generator}")
        == summary
    )
    photo = picture(tmp_path / "photo.png", 16, 16)
    edit = ("edit", out, photo, "a cat", "--out", tmp_path / "out.png")
    assert "--source" in refused(*edit)
    run(*edit, "--source", f"base={pair.base}", "--source", f"generator={pair.generator}")
    assert answer("verify", out, "--base", pair.base, "--generator", pair.generator)["ok"]
    # LoRA files are understood from the links: by the names of modules whose weights are elsewhere.
    catalogue = Catalogue.from_bundle(out)
    assert catalogue.denoiser == "unet"
    assert catalogue.components["unet"].keys() >= {"conv_in", "down_blocks.0.attentions.0.proj_in"}


def arguments(pair: Any, folder: Path, *more: object) -> tuple[object, ...]:
    return ("export", "--base", pair.base, "--generator", pair.generator, "--out", folder / "bundle", *more)


BAD = {
    "scheduler": ("--scheduler", "ghost"),
    "guidance": ("--guidance", "nan"),
    "image guidance": ("--image-guidance", "inf"),
    "targets beside a generator": ("--targets", "to_q"),
    "lora beside a generator": ("--lora", "nothing"),
    "default steps beyond the most": ("--max-steps", "5", "--steps", "6"),
    "tiles of one latent": ("--vae-tile", "2", "--max-size", "64"),
    "one photo": ("--batch", "1"),
    "base missing": ("--base", "nothing"),
    "generator missing": ("--generator", "nothing"),
    "output without a name": ("--out", "/"),
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD.keys())
def test_bad_options(pair: Any, tmp_path: Path, options: tuple[str, ...]) -> None:
    refused(*arguments(pair, tmp_path, *options))
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "options", [("--targets", "ghost"), ("--lora", "nothing"), ("--generator", "nothing")]
)
def test_bad_options_of_a_base_alone(pair: Any, tmp_path: Path, options: tuple[str, str]) -> None:
    refused("export", "--base", pair.base, "--out", tmp_path / "bundle", *options)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    "options",
    [("--targets", "to_q"), ("--steps", 3), ("--guidance", 3), ("--scheduler", "ddim"), ("--vae-tile", 64)],
)
def test_options_that_need_a_base(pair: Any, tmp_path: Path, options: tuple[str, object]) -> None:
    refused("export", "--generator", pair.generator, "--out", tmp_path / "bundle", *options)
    assert names(tmp_path) == set()


def test_nothing_to_export(tmp_path: Path) -> None:
    refused("export", "--out", tmp_path / "bundle")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flag=st.sampled_from(["--steps", "--max-steps", "--batch", "--size", "--max-size", "--max-rank"]),
    value=st.one_of(st.integers(max_value=0), st.integers(min_value=10**6)).map(str) | st.text(max_size=5),
)
def test_numbers_out_of_range(tmp_path: Path, flag: str, value: str) -> None:
    """Neither the base nor the generator is opened."""
    if value.strip().isdecimal() and 1 <= int(value) < 10**6:
        return
    command = (
        "export",
        "--base",
        "nothing",
        "--generator",
        "nothing",
        "--out",
        tmp_path / "out",
        f"{flag}={value}",
    )
    result = run(*command, code=2)
    assert "Invalid value" in result.stderr
    assert names(tmp_path) == set()


def test_existing_paths(pair: Any, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("mine")
    (tmp_path / "link").symlink_to(bundle)
    for path in (tmp_path / "file", tmp_path / "folder", tmp_path / "link", tmp_path / "file" / "inside"):
        for more in ((), ("--overwrite",)):
            refused("export", "--generator", pair.generator, "--out", path, *more)
    refused("export", "--generator", pair.generator, "--out", bundle)
    assert names(tmp_path) == {"file", "folder", "link"}
    assert (tmp_path / "folder" / "note").read_text() == "mine"


def halve(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0x80  # in the header of weights, which is all that an export can check of them
    path.write_bytes(data)


DAMAGED = [
    "base/unet/diffusion_pytorch_model.safetensors", "base/unet/config.json", "base/model_index.json",
    "base/vae/diffusion_pytorch_model.safetensors", "base/text_encoder/model.safetensors",
    "base/scheduler/scheduler_config.json", "generator/model.safetensors", "generator/config.json",
    "generator/targets.json", "generator/condition_encoder/config.json",
    "generator/condition_encoder/model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("damage", [halve, flip, Path.unlink])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoint(pair: Any, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    copy = copy_tree(pair.base.parent, tmp_path / "pair", [name])
    damage(copy / name)
    refused(
        "export", "--base", copy / "base", "--generator", copy / "generator", "--out", tmp_path / "bundle"
    )
    assert names(tmp_path) == {"pair"}


def test_unknown_pipeline(pair: Any, tmp_path: Path) -> None:
    copy = copy_tree(pair.base, tmp_path / "base", ["model_index.json"])
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "GhostPipeline"}))
    assert "GhostPipeline" in refused("export", "--base", copy, "--out", tmp_path / "bundle")


@pytest.mark.slow
def test_killed_export(pair: Any, tmp_path: Path) -> None:
    """Nothing is at the target; the next export to it succeeds and clears up."""
    command = [*COMMAND, "export", "--generator", pair.generator, "--out", "bundle"]
    process = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".bundle.partial-*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    assert not (tmp_path / "bundle").exists()
    assert len(names(tmp_path)) == 1
    run("export", "--generator", pair.generator, "--out", tmp_path / "bundle")
    assert names(tmp_path) == {"bundle"}
    run("inspect", tmp_path / "bundle", "--verify")


@pytest.mark.slow
def test_interrupted_export(pair: Any, tmp_path: Path) -> None:
    command = [*COMMAND, "export", "--generator", pair.generator, "--out", "bundle"]
    process = subprocess.Popen(
        command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob(".bundle.partial-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout, stderr.strip()) == (130, "", "Interrupted.")
    assert names(tmp_path) == set()
