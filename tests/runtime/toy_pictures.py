"""Bundles that show what a runtime provides of a request's photos: one tensor of several is the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from toy_bundle import list_files

from hywu_runtime.manifest import Manifest

POLICY = {"tensor": "image", "multiple": 8, "min": 8, "max": 128, "default_area": 4096, "enlarge": True}
TENSORS: dict[str, dict[str, Any]] = {
    "image_1": {},
    "image": {"index": 1},
    "seen": {
        "index": 1,
        "from": "image",
        "resize": [{"filter": "bicubic", "multiple": 7, "min_area": 3136, "max_area": 3600}],
    },
    "small": {
        "resize": [
            {"filter": "lanczos", "multiple": 16, "area": 2304},
            {"filter": "bicubic", "multiple": 7, "max_area": 1000},
        ]
    },
}


def write_bundle(path: Path, shown: str) -> Manifest:
    """Writes a bundle whose result is the tensor ``shown``."""
    path.mkdir(parents=True)
    shapes = {name: ["batch", f"height.{name}", f"width.{name}", 3] for name in TENSORS}
    sides = ", ".join(f"uint8[batch, h_{n}, w_{n}, 3] {n}" for n in TENSORS)
    made = ", ".join(f"uint8[batch, h_{n}, w_{n}, 3] shown_{n}" for n in TENSORS)
    nodes = " ".join(f"shown_{n} = Identity({n})" for n in TENSORS)
    graph = onnx.parser.parse_graph(f"show ({sides}) => ({made}) {{ {nodes} }}")
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path / "show.onnx")
    axes: dict[str, Any] = {"batch": {"min": 1, "max": 4}}
    for name in TENSORS:
        axes |= {f"height.{name}": {"min": 1, "max": 1000}, f"width.{name}": {"min": 1, "max": 1000}}
    manifest = Manifest.from_dict(
        {
            "format": 1,
            "name": "pictures",
            "family": None,
            "producer": {"name": "test", "version": "0"},
            "files": list_files(path),
            "axes": axes,
            "tensors": {
                name: {"dtype": "uint8", "shape": shapes[name], "source": "image", **tensor}
                for name, tensor in TENSORS.items()
            },
            "graphs": {
                "show": {
                    "file": "show.onnx",
                    "inputs": [{"name": n, "dtype": "uint8", "shape": shapes[n]} for n in TENSORS],
                    "outputs": [
                        {"name": f"shown_{n}", "dtype": "uint8", "shape": shapes[n]} for n in TENSORS
                    ],
                }
            },
            "program": [{"graph": "show", "phase": "request"}],
            "results": {"image": f"shown_{shown}"},
            "image": POLICY,
        }
    )
    (path / "manifest.json").write_text(manifest.dumps())
    return manifest
