"""Bundles whose weights stay in the checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import draws, largest, photos
from pix2pix_reference import Reference
from safetensors.torch import load_file, save_file

from hywu_export import ExportOptions, export
from hywu_runtime import Editor, Manifest
from hywu_runtime.errors import BundleError

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "dense"
Once = Callable[[str, Callable[[Path], None]], Path]


def linked_sizes(bundle: Path) -> tuple[int, int]:
    """Bytes in the bundle, and bytes that it links to."""
    linked = Manifest.read(bundle).linked.values()
    places = {(tensor.file, tensor.offset): tensor.length for graph in linked for tensor in graph.values()}
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()), sum(places.values())


@pytest.fixture
def linked_generator(tmp_path: Path) -> tuple[Path, Path]:
    """A generator's folder, and a bundle that links to it."""
    folder = tmp_path / "generator"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / file, folder)
    export(tmp_path / "bundle", generator=folder, options=ExportOptions(link_weights=True))
    return folder, tmp_path / "bundle"


@pytest.mark.slow
def test_a_linked_generator(linked_generator: tuple[Path, Path], tmp_path: Path) -> None:
    folder, bundle = linked_generator
    inputs = {"condition": load_file(GOLDEN / "inputs.safetensors")["condition"].numpy()}
    expected = load_file(GOLDEN / "outputs.safetensors")
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    with Editor.load(bundle, sources={"generator": moved}) as editor:
        deltas = editor.generate(inputs=inputs)
    for name in deltas:
        factor = float(expected["scale"]) if name.endswith("lora_B") else 1
        np.testing.assert_allclose(deltas[name], factor * expected[name], rtol=0, atol=5e-5)

    for sources, message in (
        (None, "linked to source 'generator'"),
        ({"generator": folder}, "is not a file"),
        ({"generator": tmp_path}, "is not a file"),
    ):
        with pytest.raises(BundleError, match=message):
            Editor.load(bundle, sources=sources)
    weights = moved / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    for alter, message in (
        (lambda: weights.write_bytes(whole[:-4]), "bytes, not"),
        (lambda: save_file({**tensors, first: tensors[first].half()}, weights), "bytes, not"),
        (
            lambda: weights.write_bytes(whole[:8] + whole[8:].replace(b'"F32"', b'"I32"', 1)),
            "another safetensors",
        ),
    ):
        alter()
        with pytest.raises(BundleError, match=message):
            Editor.load(bundle, sources={"generator": moved})


def halved(pair: Any, folder: Path) -> None:
    """The pair, stored in float16."""
    shutil.copytree(pair.base.parent, folder)
    for file in folder.rglob("*.safetensors"):
        save_file({name: t.half() for name, t in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_linked_pair(pair: Any, bundle: Path, once: Once, dtype: str) -> None:
    root = (
        pair.base.parent if dtype == "float32" else once("pair_float16", lambda folder: halved(pair, folder))
    )

    def make(folder: Path) -> None:
        options = ExportOptions(link_weights=True, max_steps=12, max_size=128)
        export(folder, root / "base", root / "generator", options)

    linked = once(f"linked_{dtype}", make)
    own, elsewhere = linked_sizes(linked)
    stored = sum(path.stat().st_size for path in root.rglob("*.safetensors"))
    assert elsewhere > 0.8 * stored
    components = {"unet", "vae", "text_encoder", "generator", "condition_encoder"}
    assert components <= {path.stem for path in (bundle / "weights").iterdir()}
    assert components.isdisjoint(path.stem for path in linked.rglob("*.safetensors"))
    assert own < sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) - elsewhere / 2

    sources = {"base": root / "base", "generator": root / "generator"}
    photo, prompt = photos(1)[0], "make it sepia"
    with Editor.load(linked, sources=sources) as editor:
        if dtype == "float32":
            got = editor.edit(photo, prompt, steps=3, seed=4, output="array")
            with Editor.load(bundle) as other:
                np.testing.assert_array_equal(other.edit(photo, prompt, steps=3, seed=4, output="array"), got)
            return
        shape = (1, 4, 16, 16)
        latents, noise = draws(1, shape, seed=7)[0], draws(3, shape, seed=3)
        deltas = editor.generate(photo, prompt)
        got = editor.edit(
            photo,
            prompt,
            steps=3,
            latents=latents,
            noise=noise,
            guidance=5.0,
            image_guidance=1.5,
            output="array",
        )
    reference = Reference(root / "base")
    assert reference.pipe.unet.dtype == torch.float32
    reference.add_adapter(deltas)
    expected = reference([(photo, prompt)], steps=3, latents=latents, noise_seed=3)
    assert largest([got], expected) <= 1
