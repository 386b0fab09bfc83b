"""``export --winograd``: the pictures of the bundle without, and what refuses such a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from parity import draws, largest, photos, random_deltas
from pix2pix_reference import Reference
from safetensors.numpy import load_file
from tiny_pairs import ONE_BLOCK, make_base

from hywu_calibration.job import calibrate
from hywu_calibration.options import CalibrationOptions
from hywu_export import ExportOptions, export
from hywu_export.bundle.variants import load_graph
from hywu_export.engines.job import BuildOptions, plan_work
from hywu_export.passes import winograd
from hywu_export.passes.winograd import is_winograd
from hywu_export.verify import verify
from hywu_runtime import Bundle, Editor
from hywu_runtime.errors import UnsupportedError

SHAPE = (2, 4, 16, 16)


@pytest.fixture(scope="module")
def folder(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A small pipeline and its bundle, all of whose convolutions are replaced, linked to its weights."""

    def make(folder: Path) -> None:
        make_base(folder / "base", **ONE_BLOCK)
        options = ExportOptions(
            targets=["to_q", "to_v", "conv1"], max_rank=4, max_steps=4, link_weights=True, winograd=True
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(winograd, "LEAST_GAIN", 0.0)
            export(folder / "bundle", folder / "base", options=options)

    return once("winograd", make)


@pytest.fixture(scope="module")
def editor(folder: Path) -> Iterator[Editor]:
    with Editor.load(folder / "bundle", sources={"base": str(folder / "base")}) as editor:
        yield editor


def test_pictures_are_those_of_diffusers(editor: Editor, folder: Path) -> None:
    requests = list(zip(photos(2), ["make it sepia", "a cat"]))
    deltas = random_deltas(editor.bundle.manifest.deltas, seed=1)
    got = editor.edit_batch(
        requests, deltas=deltas, steps=2, latents=draws(1, SHAPE, seed=7)[0], noise=draws(2, SHAPE, seed=3),
        guidance=5.0, image_guidance=1.5, output="array",
    )  # fmt: skip
    adapted = Reference(folder / "base")
    adapted.add_adapter(deltas)
    expected = adapted(requests, steps=2, latents=draws(1, SHAPE, seed=7)[0], noise_seed=3)
    assert largest(got, expected) <= 1
    assert np.ptp(got[0]) > 20


def test_every_graph_with_convolutions_has_them_replaced(editor: Editor) -> None:
    bundle = Bundle.open(editor.bundle.root, sources=dict(editor.bundle.sources))
    replaced = {name for name in bundle.manifest.graphs if is_winograd(load_graph(bundle, name))}
    assert replaced == {"image_encoder", "image_decoder", "step", "step_unguided"}


def test_transformed_weights_are_in_the_bundle_and_others_linked(editor: Editor, folder: Path) -> None:
    bundle = editor.bundle
    linked = {name for graph in bundle.manifest.linked.values() for name in graph}
    name = "mid_block.resnets.0.conv1.weight"
    assert f"unet.{name}" not in linked
    assert f"unet.{name.replace('weight', 'bias')}" in linked
    (checkpoint,) = (folder / "base" / "unet").glob("*.safetensors")
    weight = load_file(checkpoint)[name].astype(np.float64)
    stored = load_file(bundle.root / "weights" / "unet.safetensors")
    assert all(other.endswith("/winograd") for other in stored)
    _, g, _ = winograd.matrices()
    expected = np.einsum("ai,bj,ocij->aboc", g, g, weight).reshape(36, 1, *weight.shape[:2])
    np.testing.assert_allclose(stored[f"{name}/winograd"], expected, rtol=1e-5, atol=1e-6)


def test_verify_meets_its_floors(folder: Path) -> None:
    report = verify(folder / "bundle", folder / "base")
    assert report.failure is None


def test_compilers_and_narrow_variants_refuse_it(folder: Path, tmp_path: Path) -> None:
    sources = {"base": folder / "base"}
    with pytest.raises(UnsupportedError, match="exported for CPUs") as refused:
        plan_work(folder / "bundle", BuildOptions(backend="tensorrt", sources=sources))
    assert "without --winograd" in str(refused.value)
    (tmp_path / "prompts.txt").write_text("make it sepia\n")
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.fromarray(photos(1)[0]).save(tmp_path / "photos" / "a.png")
    options = CalibrationOptions(
        "fp16", images=tmp_path / "photos", prompts=tmp_path / "prompts.txt", samples=1, sources=sources
    )
    with pytest.raises(UnsupportedError, match="--backend ort-cpu"):
        calibrate(folder / "bundle", options)
