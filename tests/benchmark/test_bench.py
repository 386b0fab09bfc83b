"""`hywu bench`: what it measures adds up, its files have the published form, and torch is not needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import toy_bundle
from cli_tools import refused, run

from hywu_export.benchmark import files
from hywu_export.benchmark.html import render
from hywu_export.benchmark.plain import without_deltas
from hywu_export.benchmark.plots import milliseconds
from hywu_export.benchmark.stages import STAGES, stages_of
from hywu_export.benchmark.statistics import stable, summary
from hywu_runtime import Manifest
from hywu_runtime.errors import UnsupportedError

SCHEMA = json.loads(files.SCHEMA_FILE.read_text())
SMALL = ("--size", "16x16", "--steps", 3, "--duration", 0, "--threads", 1)


@pytest.fixture(scope="module")
def measured(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One measurement, of two cases; beside it what was printed and the page."""
    folder = tmp_path_factory.mktemp("bench")
    result = run(
        "bench", bundle, *SMALL, "--sweep", "batch=2,1", "--json", folder / "now.json",
        "--report", folder / "now.html",
    )  # fmt: skip
    return {"folder": folder, "text": result.stdout, "json": json.loads((folder / "now.json").read_text())}


def test_the_file_has_the_published_form(measured: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(measured["json"], SCHEMA)
    assert files.read(measured["folder"] / "now.json") == measured["json"]
    for key in ("stages", "cold", "request", "schema"):  # the schema is not empty words
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: v for k, v in measured["json"].items() if k != key}, SCHEMA)


def test_the_parts_of_an_edit_add_up(measured: dict[str, Any]) -> None:
    result = measured["json"]
    stages, runs = result["stages"], result["runs"]
    assert list(stages) == [name for name in STAGES if name in stages]
    assert set(STAGES) == set(stages)
    assert result["request"] == {
        "width": 16, "height": 16, "batch": 2, "evaluations": 3, "steps": 3, "sampler": None, "engine": [],
    }  # fmt: skip
    assert (stages["step"]["count"], stages["steady_step"]["count"]) == (3 * runs, 2 * runs)

    def total(name: str) -> float:
        return float(stages[name]["mean"] * stages[name]["count"])

    parts = ("encode", "condition", "generate", "bind", "prepare", "step", "decode", "outside")
    assert sum(map(total, parts)) == pytest.approx(total("edit"), rel=1e-6)
    assert total("first_step") + total("steady_step") == pytest.approx(total("step"), rel=1e-6)
    assert sum(g["mean"] * g["count"] for g in result["graphs"].values()) == pytest.approx(
        sum(map(total, ("encode", "condition", "generate", "prepare", "decode"))), rel=1e-6
    )
    assert result["edits_per_second"] == pytest.approx(2 * runs / total("edit"))
    assert result["delta_change"]["with_generate"]["count"] == runs
    assert result["delta_overhead"]["graph"] == "step"  # guided, as the bundle's default is
    assert -0.9 < result["delta_overhead"]["ratio"] < 20
    assert result["machine"]["processors"] >= 1
    assert result["machine"]["packages"]["onnxruntime"] == onnxruntime.__version__
    assert any("p99 of" in warning for warning in result["warnings"])


def test_a_sweep_and_what_is_shown(measured: dict[str, Any], bundle: Path) -> None:
    cases = measured["json"]["sweep"]
    assert [case["values"] for case in cases] == [{"batch": 2}, {"batch": 1}]
    assert [case["result"]["request"]["batch"] for case in cases] == [2, 1]
    text = measured["text"]
    for word in ("steady step", "new deltas, generated", "new deltas, given", "deltas in a step", "batch  "):
        assert word in text
    page = (measured["folder"] / "now.html").read_text()
    assert page.count("<svg") == 4  # stages, two curves, the sweep
    assert not re.search(r"(src|href)=|https?://|@import|<script", page)
    assert page == render(measured["json"])
    again = render(measured["json"], [("old", measured["json"])])
    assert again.count("<svg") == 5
    assert "1.000" in again


def test_a_comparison(measured: dict[str, Any], bundle: Path, tmp_path: Path) -> None:
    old = measured["json"]
    for numbers in old["stages"].values():
        numbers["p50"] = 2 * numbers["p50"]
    old["threads"] = 7
    (tmp_path / "old.json").write_text(json.dumps(old))
    result = run("bench", bundle, *SMALL, "--compare", tmp_path / "old.json", "--json", "-")
    now = json.loads(result.stdout)
    assert now["request"]["batch"] == 1
    pairs = files.ratios(old, now)
    assert set(pairs) == set(now["stages"])
    assert pairs["edit"][0] == old["stages"]["edit"]["p50"]
    assert files.differences(old, now) == ["threads: 7, now 1", "batch: 2, now 1"]


def test_without_the_toolchain(bundle: Path) -> None:
    """Neither torch nor onnx: all but the comparison with graphs without deltas."""
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'onnx', 'onnx_ir', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from hywu_export.cli import main\n"
        f"sys.argv = ['hywu', 'bench', {str(bundle)!r}, *{list(map(str, SMALL))!r}, '--json', '-']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    jsonschema.validate(result, SCHEMA)
    assert result["delta_overhead"] == {"skipped": "The package onnx is not installed"}


@pytest.mark.parametrize("name", [pytest.param("lora_bundle", marks=pytest.mark.slow), "bundle"])
@pytest.mark.parametrize("graph", ["step", "step_unguided"])
def test_a_graph_without_deltas_is_the_graph_at_strength_0(
    request: pytest.FixtureRequest, name: str, graph: str, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    full = onnx.load(folder / f"{graph}.onnx")
    plain = without_deltas(full)
    onnx.checker.check_model(plain)
    assert not any(".lora_" in value.name for value in plain.graph.input)
    # At most the number of samples is still taken from the gate.
    assert {node.op_type for node in plain.graph.node if "gate" in node.input} <= {"Shape"}
    assert len(plain.graph.node) < len(full.graph.node)
    onnx.save(plain, tmp_path / "plain.onnx")
    rng = np.random.default_rng(0)
    inputs = {}
    for value in full.graph.input:
        sizes = {"batch": 2, "delta_batch": 2, "latent_height": 8, "latent_width": 8}
        shape = [d.dim_value or sizes[d.dim_param] for d in value.type.tensor_type.shape.dim]
        inputs[value.name] = np.asarray(rng.standard_normal(shape), np.float32)
    inputs["gate"] = np.zeros(2, np.float32)
    expected = onnxruntime.InferenceSession(folder / f"{graph}.onnx").run(None, inputs)
    left = {value.name: inputs[value.name] for value in plain.graph.input}
    got = onnxruntime.InferenceSession(tmp_path / "plain.onnx").run(None, left)
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_branch_of_another_form_stays() -> None:
    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    product = onnx.helper.make_node("MatMul", ["x", "m.lora_B"], ["y"])
    inputs = [value("x", 2, 3), value("m.lora_B", 1, 3, 2)]
    graph = onnx.helper.make_graph([product], "g", inputs, [value("y", 1, 2, 2)])
    with pytest.raises(UnsupportedError, match="cannot be taken out"):
        without_deltas(onnx.helper.make_model(graph))


def test_stages_of_a_program_that_nobody_knows(tmp_path: Path) -> None:
    manifest: Manifest = toy_bundle.write_bundle(tmp_path / "toy")
    assert stages_of(manifest, True) == {
        "words": "encode", "marks": "condition", "encode": "encode", "generate": "generate",
        "prepare": "prepare", "final": "decode",
    }  # fmt: skip


def test_summaries_and_words() -> None:
    values = [3.0, 1.0, 2.0, 10.0]
    found = summary(values)
    assert found["count"] == 4
    assert found["p90"] == pytest.approx(np.percentile(values, 90))
    assert found["variation"] == pytest.approx(np.std(values) / np.mean(values))
    assert not stable([1, 1, 1])
    assert stable([9, 1, 1.04, 1, 1])
    assert not stable([1, 1.06, 1, 1])
    assert [milliseconds(s) for s in (0, 1.8e-5, 0.00234, 0.0234, 0.234, 2.34, 234)] == [
        "0 ms", "0.018 ms", "2.34 ms", "23.4 ms", "234 ms", "2.34 s", "234 s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sweep", "rank=8,16"), "rank is fixed when a bundle is exported"),
        (("--sweep", "batch"), "NAME=A,B"),
        (("--sweep", "batch=1,x"), "'x' is no number"),
        (("--sweep", "batch=1", "--sweep", "batch=2"), "each NAME once"),
        (("--batch", 0), "batch is 0"),
        (("--steps", 99), "takes"),
        (("--duration", -1), "duration"),
        (("--size", "9x9"), "9"),
        (("--variant", "int8"), "no variant"),
        (("--json", "/nowhere/x.json"), "/nowhere"),
        (("--compare", "nothing.json"), "nothing.json"),
    ],
)
def test_bad_input(bundle: Path, arguments: tuple[object, ...], message: str) -> None:
    assert message in refused("bench", bundle, *arguments)


def test_other_files_are_no_measurements(bundle: Path, tmp_path: Path) -> None:
    for text in (
        "{",
        "[]",
        "{}",
        '{"schema": "hywu.bench/2"}',
        json.dumps({k: {} for k in SCHEMA["required"]}),
    ):
        (tmp_path / "old.json").write_text(text)
        refused("bench", bundle, "--compare", tmp_path / "old.json")


@pytest.fixture
def toy_without_images(once: Callable[[str, Callable[[Path], None]], Path], tmp_path: Path) -> Path:
    toy_bundle.write_bundle(tmp_path / "toy")
    toy_bundle.rewrite(tmp_path / "toy", lambda m: m["results"].pop("image"))
    return tmp_path / "toy"


def test_a_bundle_that_edits_nothing(toy_without_images: Path) -> None:
    assert "makes no images" in run("bench", toy_without_images, code=None).stderr
