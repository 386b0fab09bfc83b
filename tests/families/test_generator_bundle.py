"""A generator exported alone, and the same export in another process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hywu_export import export
from hywu_runtime import Editor
from hywu_runtime.errors import InputError, UnsupportedError

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
EXPORT = "import sys; from hywu_export import export; export(sys.argv[1], **{sys.argv[2]: sys.argv[3]})"


@pytest.fixture(params=["dense", "moe"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A golden generator's folder."""
    folder = tmp_path / request.param
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / request.param / file, folder)
    return folder


@pytest.mark.slow
def test_golden_outputs(case: Path, tmp_path: Path) -> None:
    manifest = export(tmp_path / "bundle", generator=case)
    assert manifest.results.image is None
    condition = load_file(GOLDEN / case.name / "inputs.safetensors")["condition"]
    outputs = load_file(GOLDEN / case.name / "outputs.safetensors")
    scale = outputs.pop("scale")
    with Editor.load(tmp_path / "bundle", verify=True) as editor:
        deltas = editor.generate(inputs={"condition": condition})
        assert deltas.keys() == outputs.keys()
        for name, expected in outputs.items():
            assert deltas[name].shape == expected.shape
            factor = scale if name.endswith("lora_B") else 1
            np.testing.assert_allclose(deltas[name], factor * expected, rtol=0, atol=5e-5)
        # Another length and another batch, each sample for itself.
        more = np.concatenate([condition[:, :5], condition[:, 3:8]])
        pair = editor.generate(inputs={"condition": more})
        for name, tensor in editor.generate(inputs={"condition": more[1:]}).items():
            np.testing.assert_allclose(pair[name][1:], tensor, rtol=0, atol=2e-5)
        with pytest.raises(InputError, match=r"'condition'.*missing"):
            editor.generate()
        with pytest.raises(UnsupportedError, match="no images"):
            editor.edit(np.zeros((8, 8, 3), np.uint8), "")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def export_elsewhere(out: Path, part: str, folder: Path, hash_seed: int) -> dict[str, bytes]:
    """The files of an export in a new process, whose sets and dicts hash strings in their own way."""
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    subprocess.run([sys.executable, "-c", EXPORT, str(out), part, str(folder)], check=True, env=environment)
    return contents(out)


@pytest.mark.slow
def test_twice_the_same_bytes(case: Path, tmp_path: Path) -> None:
    first, second = (
        export_elsewhere(tmp_path / str(seed) / "bundle", "generator", case, seed) for seed in (1, 2)
    )
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first)


@pytest.mark.slow
def test_a_whole_pipeline_twice_the_same_bytes(pair: Any, tmp_path: Path) -> None:
    first, second = (
        export_elsewhere(tmp_path / str(seed) / "bundle", "base", pair.base, seed) for seed in (1, 2)
    )
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first)
