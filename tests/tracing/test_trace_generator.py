"""The parameter generator, from golden checkpoints to a bundle, without ever holding its weights in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file
from torch import Tensor, nn

from hywu_export.bundle import BundleWriter
from hywu_export.bundle.sources import SafetensorsIndex
from hywu_export.engines import tensorrt as rtx
from hywu_export.generator import GeneratorConfig, ParameterGenerator
from hywu_export.passes import check
from hywu_export.tracing import Axis, GraphSpec, TensorSpec, TracedGraph, fake_module, trace

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
AXES = {"batch": Axis(1, 8), "condition_length": Axis(2, 4096)}


class Generate(nn.Module):
    def __init__(self, generator: ParameterGenerator, names: list[str]):
        super().__init__()
        self.generator = generator
        self.names = names

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        made = self.generator(condition)
        return tuple(made[name] for name in self.names)


def golden(case: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The golden condition, and the golden matrices (scalars, the alphas, left out)."""
    condition = load_file(GOLDEN / case / "inputs.safetensors")["condition"]
    made = load_file(GOLDEN / case / "outputs.safetensors")
    return condition, {name: value for name, value in made.items() if value.ndim}


def traced_generator(case: str) -> TracedGraph:
    config = GeneratorConfig.from_file(GOLDEN / case / "config.json")
    condition, expected = golden(case)
    module = Generate(fake_module(lambda: ParameterGenerator(config)), list(expected))
    inputs = [TensorSpec("condition", "float32", ("batch", "condition_length", condition.shape[-1]))]
    outputs = [TensorSpec(n, "float32", ("batch", *value.shape[1:])) for n, value in expected.items()]
    traced = trace(GraphSpec("generator", module, inputs, outputs), AXES)
    check(traced.model, AXES, inputs, outputs)
    return traced


def write(case: str, path: Path) -> Path:
    with BundleWriter(path) as writer:
        writer.add_weights("generator", SafetensorsIndex.from_file(GOLDEN / case / "model.safetensors"))
        writer.add_graph(traced_generator(case))
        writer.finish({})
    return path / "generator.onnx"


@pytest.mark.parametrize("case", ["dense", "moe"])
def test_golden_generator(case: str, tmp_path: Path) -> None:
    condition, expected = golden(case)
    session = ort.InferenceSession(write(case, tmp_path / "bundle"), providers=["CPUExecutionProvider"])
    for name, got in zip(expected, session.run(None, {"condition": condition})):
        np.testing.assert_allclose(got, expected[name], rtol=0, atol=2e-5)
    two = np.concatenate([condition * 0.5, condition])
    for name, got in zip(expected, session.run(None, {"condition": two})):
        np.testing.assert_allclose(got[1:], expected[name], rtol=0, atol=2e-5)


@pytest.mark.rtx
@pytest.mark.parametrize("case", ["dense", "moe"])
def test_tensorrt_rtx_parses_the_generator(case: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert rtx.parser_errors(write(case, tmp_path / "bundle")) == []
