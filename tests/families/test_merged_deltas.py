"""Deltas merged into the weights once per request: the pictures of diffusers with the adapters in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_base
from parity import draws, largest, photos, random_deltas
from pix2pix_reference import Reference

from hywu_export import ExportOptions, export
from hywu_runtime import Editor
from hywu_runtime.errors import InputError

SHAPE = (2, 4, 16, 16)
ONE_BLOCK: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (32,),
}


@pytest.fixture(scope="module")
def folder(once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    def make(folder: Path) -> None:
        make_base(folder / "base", **ONE_BLOCK)
        options = ExportOptions(
            targets=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "conv1"], max_rank=4, max_steps=4,
            deltas="merged",
        )  # fmt: skip
        export(folder / "bundle", folder / "base", options=options)

    return once("merged", make)


@pytest.fixture(scope="module")
def editor(folder: Path) -> Iterator[Editor]:
    with Editor.load(folder / "bundle") as editor:
        yield editor


def edit(editor: Editor, deltas: Any, strength: Any) -> list[np.ndarray]:
    requests = list(zip(photos(2), ["make it sepia", "a cat"]))
    pictures: list[np.ndarray] = editor.edit_batch(
        requests, deltas=deltas, delta_strength=strength, steps=2, latents=draws(1, SHAPE, seed=7)[0],
        noise=draws(2, SHAPE, seed=3), guidance=5.0, image_guidance=1.5, output="array",
    )  # fmt: skip
    return pictures


def test_no_step_reads_a_linear_delta(editor: Editor) -> None:
    manifest = editor.bundle.manifest
    assert manifest.deltas is not None
    linear = {target.module for target in manifest.deltas.targets if target.kind == "linear"}
    for name in ("step", "step_unguided"):
        read = {t.name.rpartition(".")[0] for t in manifest.graphs[name].inputs if ".lora_" in t.name}
        assert read  # convolutions stay low-rank
        assert not read & linear


def test_deltas_per_sample(editor: Editor, folder: Path) -> None:
    spec = editor.bundle.manifest.deltas
    sets = [random_deltas(spec, seed=seed) for seed in (1, 2)]
    strengths = [1.0, -0.5]
    got = edit(editor, sets, strengths)
    requests = list(zip(photos(2), ["make it sepia", "a cat"]))
    for sample, (deltas, strength) in enumerate(zip(sets, strengths)):
        adapted = Reference(folder / "base")
        adapted.add_adapter(deltas, strength=strength)
        expected = adapted(requests, steps=2, latents=draws(1, SHAPE, seed=7)[0], noise_seed=3)
        assert largest([got[sample]], [expected[sample]]) <= 1
    assert largest(got, edit(editor, sets, 0.0)) > 20


def test_one_set_for_the_batch_then_another(editor: Editor, folder: Path) -> None:
    spec = editor.bundle.manifest.deltas
    first, second = (random_deltas(spec, seed=seed) for seed in (1, 2))
    before = edit(editor, first, 1.0)
    assert largest(before, edit(editor, second, 1.0)) > 20
    assert largest(before, edit(editor, first, 1.0)) == 0
    requests = list(zip(photos(2), ["make it sepia", "a cat"]))
    plain = Reference(folder / "base")(requests, steps=2, latents=draws(1, SHAPE, seed=7)[0], noise_seed=3)
    assert largest(edit(editor, first, 0.0), plain) <= 1


def test_merging_in_every_step_is_refused() -> None:
    with pytest.raises(InputError, match="Merging pays where it is done once per request"):
        ExportOptions(deltas="merged", hoist=False)
    with pytest.raises(InputError, match="Expected low-rank, merged, auto"):
        ExportOptions(deltas="merge")  # type: ignore[arg-type]
