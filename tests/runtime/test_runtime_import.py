"""What an import costs, and what it does not bring in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hywu_runtime

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import hywu_runtime
from hywu_runtime import Editor, Deltas, Bundle, Manifest, errors
print(json.dumps({"seconds": time.perf_counter() - start, "modules": sorted(sys.modules)}))
"""


def test_import_is_light() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(hywu_runtime.__file__).parents[1])}
    runs = []
    for _ in range(3):
        output = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, check=True, env=environment
        ).stdout
        runs.append(json.loads(output))
    assert min(run["seconds"] for run in runs) < 0.5
    loaded = {name.partition(".")[0] for name in runs[0]["modules"]}
    assert loaded.isdisjoint(
        {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxruntime", "PIL", "tokenizers"}
    )


def test_everything_exported_exists() -> None:
    for name in hywu_runtime.__all__:
        assert getattr(hywu_runtime, name) is not None
        assert name in dir(hywu_runtime)
    assert not hasattr(hywu_runtime, "ghost")
