"""Files of a bundle: found, checked, linked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import toy_bundle
from safetensors.torch import save_file
from toy_bundle import rewrite, write_bundle

from hywu_runtime import Bundle, Editor
from hywu_runtime.bundle import header_sha256
from hywu_runtime.errors import BundleError, InputError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_sizes_always_hashes_when_asked(bundle: Path) -> None:
    Bundle.open(bundle, verify=True)
    file = bundle / "step.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    Bundle.open(bundle)
    with pytest.raises(BundleError, match=r"step.onnx has SHA-256"):
        Bundle.open(bundle, verify=True)
    file.write_bytes(data + b"x")
    with pytest.raises(BundleError, match=r"step.onnx has \d+ bytes"):
        Bundle.open(bundle)
    file.unlink()
    with pytest.raises(BundleError, match=r"step.onnx is missing"):
        Bundle.open(bundle)
    file.mkdir()
    with pytest.raises(BundleError, match=r"step.onnx is missing"):
        Bundle.open(bundle)


def test_links_out_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (bundle / "step.onnx").rename(outside)
    (bundle / "step.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="leads out"):
        Bundle.open(bundle)
    (bundle / "step.onnx").unlink()
    (bundle / "step.onnx").symlink_to("step.onnx")
    with pytest.raises(BundleError):
        Bundle.open(bundle)
    (bundle / "step.onnx").unlink()
    outside.rename(bundle / "real.onnx")
    (bundle / "step.onnx").symlink_to("real.onnx")
    Bundle.open(bundle)


def test_a_link_to_the_bundle_itself_is_fine(bundle: Path, tmp_path: Path) -> None:
    os.symlink(bundle, tmp_path / "link")
    Bundle.open(tmp_path / "link", verify=True)


def link(path: Path, checkpoint: Path, dtype: torch.dtype) -> None:
    """Moves the step's weight out of its graph into a checkpoint, as a writer of linked bundles does."""
    name = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    weight = torch.from_numpy(toy_bundle.weights()["mix"]).to(dtype)
    checkpoint.mkdir()
    file = checkpoint / "unet.safetensors"
    save_file({"a.odd": torch.ones(3, dtype=torch.uint8), "mix": weight}, file)
    raw = file.read_bytes()
    data = weight.view(torch.uint8).numpy().tobytes()
    offset = raw.index(data)
    links = {
        "mix": {
            "source": "base",
            "file": "unet.safetensors",
            "offset": offset,
            "length": len(data),
            "dtype": name,
            "shape": [4, 4],
        }
    }
    for graph in ("step", "step_plain"):
        model = onnx.load(path / f"{graph}.onnx")
        (initializer,) = [i for i in model.graph.initializer if i.name == "mix"]
        initializer.ClearField("raw_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        initializer.data_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype("float32"))
        if dtype != torch.float32:
            initializer.data_type = {torch.float16: 10, torch.bfloat16: 16}[dtype]
            initializer.name = "mix.stored"
            cast = onnx.helper.make_node("Cast", ["mix.stored"], ["mix"], to=1)
            model.graph.node.insert(0, cast)
        for key, value in (("location", "linked"), ("offset", "0"), ("length", str(len(data)))):
            initializer.external_data.add(key=key, value=value)
        onnx.save(model, path / f"{graph}.onnx")
    named = links if dtype == torch.float32 else {"mix.stored": links["mix"]}

    def change(value: Any) -> None:
        entry = {"size": len(raw), "header_sha256": header_sha256(file)}
        value["sources"]["base"] = {"name": "a checkpoint", "files": {"unet.safetensors": entry}}
        value["linked"] = {"step.onnx": named, "step_plain.onnx": named}

    rewrite(path, change)


def edited(path: Path, **options: Any) -> np.ndarray:
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    region = np.ones((1, 1, 4, 4), np.float32)
    with Editor.load(path, **options) as editor:
        result = editor.edit(photo, "hello", size=16, inputs={"region": region}, output="array")
    assert isinstance(result, np.ndarray)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linked_weights(bundle: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    expected = edited(bundle)
    link(bundle, tmp_path / "checkpoint", dtype)
    result = edited(bundle, sources={"base": tmp_path / "checkpoint"})
    assert np.abs(result.astype(int) - expected).max() <= (0 if dtype == torch.float32 else 3)
    low = edited(bundle, sources={"base": tmp_path / "checkpoint"}, low_memory=True)
    np.testing.assert_array_equal(low, result)


def test_linked_weights_that_are_not_there(bundle: Path, tmp_path: Path) -> None:
    link(bundle, tmp_path / "checkpoint", torch.float32)
    with pytest.raises(BundleError, match="sources="):
        Bundle.open(bundle)
    with pytest.raises(BundleError, match="not a file"):
        Bundle.open(bundle, sources={"base": tmp_path})
    with pytest.raises(InputError, match="ghost"):
        Bundle.open(bundle, sources={"ghost": tmp_path})
    file = tmp_path / "checkpoint/unet.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="bytes"):
        Bundle.open(bundle, sources={"base": tmp_path / "checkpoint"})
    file.write_bytes(whole.replace(b"mix", b"mox"))
    with pytest.raises(BundleError, match="header"):
        Bundle.open(bundle, sources={"base": tmp_path / "checkpoint"})
