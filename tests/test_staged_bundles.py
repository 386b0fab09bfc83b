"""Bundles whose large graphs are cut into stages: the same bytes as from the whole ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_tools import answer
from safetensors.numpy import load_file

from hywu_export import ExportOptions, export
from hywu_export.engines import tensorrt as rtx
from hywu_runtime import Editor, Manifest
from hywu_runtime.manifest import Graph

GOLDEN = Path(__file__).parent / "data" / "golden"
PROMPTS = ["make it sepia", "blur the photo"]
STAGES = [2, 4]


def photos(height: int = 24, width: int = 32) -> list[Any]:
    return list(np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8))


def stages_of(manifest: Manifest, name: str) -> list[Graph]:
    return [graph for graph in manifest.graphs.values() if graph.stage_of == name]


@pytest.mark.slow
@pytest.mark.parametrize("stages", STAGES)
def test_edits_are_those_of_the_whole_graphs(staged_bundles: Path, stages: int) -> None:
    """Batches of two, each sample with generated deltas of its own; a history of two steps; other sizes."""
    requests = list(zip(photos(), PROMPTS))
    with (
        Editor.load(staged_bundles / "1", threads=1) as whole,
        Editor.load(staged_bundles / str(stages), threads=1, verify=True) as staged,
    ):
        for options in (
            {"steps": 4},
            {"steps": 3, "size": (48, 16), "delta_strength": [0.5, 0.0]},
            {"steps": 2, "guidance": {"text": 1.0}},
        ):
            expected = whole.edit_batch(requests, seed=3, output="array", **options)
            for got, picture in zip(staged.edit_batch(requests, seed=3, output="array", **options), expected):
                np.testing.assert_array_equal(got, picture)
        deltas = staged.generate(*requests[0])
        for name, tensor in whole.generate(*requests[0]).items():
            np.testing.assert_array_equal(deltas[name], tensor)
        shared = {"steps": 2, "deltas": deltas, "output": "array"}
        for got, picture in zip(staged.edit_batch(requests, **shared), whole.edit_batch(requests, **shared)):
            np.testing.assert_array_equal(got, picture)


@pytest.mark.slow
@pytest.mark.parametrize("stages", STAGES)
def test_each_stage_has_its_weights_and_deltas(staged_bundles: Path, stages: int) -> None:
    import onnx_ir as ir

    whole = Manifest.read(staged_bundles / "1")
    folder = staged_bundles / str(stages)
    manifest = Manifest.read(folder)
    for name in ("step", "step_unguided"):
        parts = stages_of(manifest, name)
        assert [part.stage for part in parts] == list(range(stages))
        weights = [
            {n for n in ir.load(folder / part.file).graph.initializers if not n.startswith("constant")}
            for part in parts
        ]
        together = ir.load(staged_bundles / "1" / whole.graphs[name].file).graph.initializers
        assert set.union(*weights) == {n for n in together if not n.startswith("constant")}
        assert sum(map(len, weights)) == len(set.union(*weights))
        deltas = [{v.name for v in part.inputs if ".lora_" in v.name} for part in parts]
        before = {v.name for v in manifest.graphs[f"prepare_{name}"].inputs if ".lora_" in v.name}
        assert set.union(*deltas) == set(whole.deltas.tensors) - before
        assert sum(map(len, deltas)) == len(whole.deltas.tensors) - len(before)
        for own, theirs in zip(deltas, weights):
            assert {f"unet.{n.rpartition('.')[0]}.weight" for n in own} <= theirs
    # Both forms are cut at the same places, so that a device has each weight once.
    for a, b in zip(stages_of(manifest, "step"), stages_of(manifest, "step_unguided")):
        names = [set(ir.load(folder / part.file).graph.initializers) for part in (a, b)]
        assert {n for n in names[0] if n.startswith("unet")} == {n for n in names[1] if n.startswith("unet")}


@pytest.mark.slow
@pytest.mark.rtx
def test_tensorrt_rtx_takes_every_stage(staged_bundles: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    for stages in STAGES:
        manifest = Manifest.read(staged_bundles / str(stages))
        for graph in manifest.graphs.values():
            if graph.stage_of is not None:
                assert rtx.parser_errors(staged_bundles / str(stages) / graph.file) == []


@pytest.mark.slow
@pytest.mark.parametrize("stages", STAGES)
def test_a_generator_alone(stages: int, tmp_path: Path) -> None:
    case = tmp_path / "generator"
    case.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "dense" / file, case)
    condition = load_file(GOLDEN / "dense" / "inputs.safetensors")["condition"]
    conditions = np.concatenate([condition, condition[:, ::-1]])
    made = []
    for count in (1, stages):
        manifest = export(tmp_path / str(count), generator=case, options=ExportOptions(stages=count))
        with Editor.load(tmp_path / str(count), threads=1) as editor:
            made.append(editor.generate(inputs={"condition": conditions}))
    assert [graph.stage for graph in stages_of(manifest, "generator")] == list(range(stages))
    checked = answer("verify", tmp_path / str(stages), "--generator", case)
    assert [check["name"] for check in checked["checks"]] == ["generator"]
    assert checked["ok"] is True
    for name, tensor in made[0].items():
        np.testing.assert_array_equal(made[1][name], tensor)
