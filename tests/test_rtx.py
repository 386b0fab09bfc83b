"""TensorRT-RTX's parser takes every graph of the bundles, and the lint has nothing against them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from hywu_export.engines import tensorrt as rtx
from hywu_export.passes import lint
from hywu_export.tracing import Axis, TensorSpec
from hywu_runtime import Manifest

STEPS = ["prepare_step", "prepare_step_unguided", "step", "step_unguided"]
BASE = ["text_encoder", "image_encoder", "prepare", *STEPS, "image_decoder"]
GRAPHS = {
    "bundle": [*BASE, "condition", "generator"],
    "lora_bundle": BASE,
}
CASES = [(fixture, graph) for fixture, graphs in GRAPHS.items() for graph in graphs]


@pytest.mark.parametrize("fixture", GRAPHS)
def test_every_graph_is_listed_here(fixture: str, request: pytest.FixtureRequest) -> None:
    assert set(Manifest.read(request.getfixturevalue(fixture)).graphs) == set(GRAPHS[fixture])


@pytest.mark.rtx
@pytest.mark.parametrize(("fixture", "graph"), CASES)
def test_tensorrt_rtx_parses(fixture: str, graph: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder: Path = request.getfixturevalue(fixture)
    assert rtx.parser_errors(folder / Manifest.read(folder).graphs[graph].file) == []


@pytest.mark.parametrize(("fixture", "graph"), CASES)
def test_lint(fixture: str, graph: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    manifest = Manifest.read(folder)
    entry, axes = manifest.graphs[graph], manifest.to_dict()["axes"]

    def specs(tensors: Any) -> list[TensorSpec]:
        return [TensorSpec(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in tensors]

    model = ir.load(folder / entry.file)
    problems = lint(
        model, {name: Axis(**axis) for name, axis in axes.items()}, specs(entry.inputs), specs(entry.outputs)
    )
    assert problems == []
