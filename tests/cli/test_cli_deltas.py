"""``hywu deltas show``, ``convert`` and ``blend``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import answer, names, refused, run

from hywu_runtime import Deltas, Manifest


def random_deltas(bundle: Path, seed: int, rank: int) -> Deltas:
    spec = Manifest.read(bundle).deltas
    assert spec is not None
    random = np.random.default_rng(seed)
    return Deltas(
        {
            name: random.standard_normal((1, *shape)).astype(np.float32)
            for target in spec.targets
            for name, shape in target.shapes(rank).items()
        }
    )


def test_show(lora_bundle: Path, tmp_path: Path) -> None:
    deltas = random_deltas(lora_bundle, 0, 3)
    deltas.save(tmp_path / "d.safetensors")
    report = answer("deltas", "show", tmp_path / "d.safetensors")
    assert (report["rank"], report["batch"]) == (3, 1)
    for module, target in report["targets"].items():
        a, b = (
            deltas[f"{module}.lora_A"][0].astype(np.float64),
            deltas[f"{module}.lora_B"][0].astype(np.float64),
        )
        assert target["norm"] == pytest.approx(np.linalg.norm(b @ a.reshape(3, -1)))
        assert target["a"] == [1, *a.shape]
    lines = run("deltas", "show", tmp_path / "d.safetensors").stdout.splitlines()
    assert len(lines) == len(report["targets"]) + 3


def test_show_a_batch_and_half_a_pair(tmp_path: Path) -> None:
    a, b = np.ones((2, 3, 4), np.float32), np.ones((2, 5, 3), np.float32)
    b[1] *= 2
    Deltas({"m.lora_A": a, "m.lora_B": b, "n.lora_A": a}).save(tmp_path / "d.safetensors")
    targets = answer("deltas", "show", tmp_path / "d.safetensors")["targets"]
    assert targets["m"]["norm"] == pytest.approx(2 * 3 * np.sqrt(20))
    assert targets["n"] == {"a": [2, 3, 4], "b": None, "rank": 3, "norm": None}
    assert "missing" in run("deltas", "show", tmp_path / "d.safetensors").stdout


def test_blend(lora_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [random_deltas(lora_bundle, seed, rank) for seed, rank in ((1, 3), (2, 5))]
    for name, part in zip("ab", parts):
        part.save(f"{name}.safetensors")
    report = answer(
        "deltas",
        "blend",
        "a.safetensors:0.5",
        "b.safetensors:-2",
        "--bundle",
        lora_bundle,
        "--out",
        "c.safetensors",
    )
    assert report["rank"] == 8
    expected = Deltas.blend([(parts[0], 0.5), (parts[1], -2.0)])
    made = Deltas.load("c.safetensors")
    for name, tensor in expected.items():
        np.testing.assert_array_equal(made[name], tensor)


def test_blend_refused(lora_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_deltas(lora_bundle, 0, 5).save("a.safetensors")
    Path("no.safetensors").write_text("no deltas")
    for arguments in (
        ("a.safetensors", "a.safetensors", "--bundle", lora_bundle),  # rank 10 of 8
        ("a.safetensors:nan",),
        ("a.safetensors:much",),
        ("no.safetensors",),
        ("nothing.safetensors:1",),
    ):
        refused("deltas", "blend", *arguments, "--out", "c.safetensors")
    refused("deltas", "show", "no.safetensors")
    refused("deltas", "show", "nothing.safetensors")
    assert names(tmp_path) == {"a.safetensors", "no.safetensors"}


def test_name_with_a_colon(lora_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    deltas = random_deltas(lora_bundle, 0, 2)
    deltas.save("a:3")
    run("deltas", "blend", "a:3", "--out", "b.safetensors")
    run("deltas", "blend", "a:3:2", "--out", "c.safetensors")
    name = next(name for name in deltas if name.endswith("B"))
    np.testing.assert_array_equal(Deltas.load("b.safetensors")[name], deltas[name])
    np.testing.assert_array_equal(Deltas.load("c.safetensors")[name], 2 * deltas[name])


@pytest.fixture(scope="module")
def adapter(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT saves for the base's UNet: rank 3, alpha 6."""
    import torch
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(pair.base / "unet")
    model = get_peft_model(
        unet, LoraConfig(r=3, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
    )
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def test_convert_for_a_bundle(adapter: Path, lora_bundle: Path, tmp_path: Path) -> None:
    report = answer(
        "deltas", "convert", adapter, "--bundle", lora_bundle, "--out", tmp_path / "d.safetensors"
    )
    assert report["rank"] == 8
    spec = Manifest.read(lora_bundle).deltas
    assert spec is not None
    Deltas.load(tmp_path / "d.safetensors").check(spec)


@pytest.mark.parametrize("checked", [True, False])
def test_convert_for_a_base_or_for_none(checked: bool, adapter: Path, pair: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    file = tmp_path / "d.safetensors"
    against = ("--base", pair.base) if checked else ()
    assert answer("deltas", "convert", adapter, *against, "--out", file)["rank"] == 3
    saved = load_file(adapter / "adapter_model.safetensors")
    made = Deltas.load(file)
    for name, tensor in saved.items():
        key = name.removeprefix("base_model.model.").removesuffix(".weight")
        scale = 2 if key.endswith("lora_B") else 1
        np.testing.assert_array_equal(made[key][0], tensor * scale)


def test_convert_refused(adapter: Path, bundle: Path, lora_bundle: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "d.safetensors")
    refused("deltas", "convert", adapter, "--bundle", lora_bundle, "--base", tmp_path, *out)
    refused("deltas", "convert", adapter, "--bundle", bundle, *out)  # has modules that the bundle has not
    refused("deltas", "convert", tmp_path, "--bundle", lora_bundle, *out)
    refused("deltas", "convert", adapter, "--bundle", tmp_path, *out)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in adapter.iterdir():
        data = file.read_bytes()
        (cut / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    refused("deltas", "convert", cut, "--bundle", lora_bundle, *out)
    assert names(tmp_path) == {"cut"}
