"""Full size on a small machine: checkpoints of the public sizes, exported with little memory and space."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hywu_export.bundle.sources import SafetensorsIndex
from hywu_export.deltas import DeltaSpec
from hywu_export.families.base import Limits
from tools.sparse_checkpoints import write_generator, write_hunyuan_image3, write_instruct_pix2pix
from tools.sparse_flux_kontext import write_flux_kontext

ROOT = Path(__file__).parents[1]
GIGABYTE = 10**9


def numbers(index: SafetensorsIndex) -> int:
    return sum(tensor.length for tensor in index.values()) // 4  # they are float32


def test_sparse_base_is_the_public_one(tmp_path: Path) -> None:
    from hywu_export.families import open_base

    write_instruct_pix2pix(tmp_path)
    sizes = {name: numbers(part.index) for name, part in open_base(tmp_path).components.items()}
    # Stable Diffusion 1.5's published counts, with four input channels more in the UNet's first convolution.
    assert sizes == {"text_encoder": 123_060_480, "vae": 83_653_863, "unet": 859_520_964 + 4 * 320 * 9}
    assert disk_bytes(tmp_path) < 10**6


def test_sparse_generator_is_the_released_one(tmp_path: Path) -> None:
    from hywu_export.generator.checkpoint import check_checkpoint

    write_generator(tmp_path)
    index = check_checkpoint(tmp_path)
    assert len(index) == 779
    assert numbers(index) == 8_096_647_168
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.safetensors"))]
    assert [round(size / GIGABYTE, 2) for size in sizes] == [4.92, 4.97, 4.97, 4.83, 4.97, 4.97, 2.76]
    assert disk_bytes(tmp_path) < 10**6


def test_sparse_kontext_is_the_public_one(tmp_path: Path) -> None:
    from hywu_export.families import open_base

    write_flux_kontext(tmp_path)
    family = open_base(tmp_path)
    # In BF16. T5's file holds its tied embedding once.
    sizes = {
        name: sum(t.length for t in part.index.values()) // 2 for name, part in family.components.items()
    }
    assert sizes == {
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "vae": 83_819_683,
        "transformer": 11_901_408_320,
    }
    files = [path.stat().st_size for path in sorted((tmp_path / "transformer").glob("*.safetensors"))]
    assert [round(size / GIGABYTE, 2) for size in files] == [9.98, 9.95, 3.87]
    policy = family.plan(DeltaSpec(()), Limits(), None, 3).image
    assert policy is not None
    assert len(policy.sizes) == 17
    assert disk_bytes(tmp_path) < 10**6


def test_sparse_hunyuan_is_the_public_one(tmp_path: Path) -> None:
    write_hunyuan_image3(tmp_path)
    index = SafetensorsIndex.from_folder(tmp_path)
    total = sum(tensor.length for tensor in index.values()) // 2
    experts = sum(tensor.length for name, tensor in index.items() if ".mlp.experts." in name) // 2
    assert experts == 32 * 64 * 3 * 4096 * 3072
    assert 80e9 < total < 84e9  # published as 80 billion, of which a token uses 13 billion: the decoder's
    decoder = sum(t.length for name, t in index.items() if name.startswith(("model.", "lm_head."))) // 2
    assert round((decoder - experts + experts * 8 // 64) / 1e9) == 13
    assert len(index.files) == 34
    assert disk_bytes(tmp_path) < 2 * 10**6


@pytest.mark.slow
def test_a_layer_of_64_experts_is_few_nodes(tmp_path: Path) -> None:
    """In full width. What torch.export and the graph have of it does not grow with the experts."""
    from hywu_export.families import open_base
    from hywu_export.passes import check
    from hywu_export.tracing import trace

    write_hunyuan_image3(tmp_path, settings={"num_hidden_layers": 1})
    family = open_base(tmp_path)
    component = family.components["transformer"]
    spec = DeltaSpec.from_patterns(component.module, family.default_targets, 16)
    plan = family.plan(spec, Limits(), None, 7)
    graph = next(graph for graph in plan.graphs if graph.name == "step_unguided")
    start = peak_bytes()
    traced = trace(graph, plan.axes)
    check(traced.model, plan.axes, traced.inputs, traced.outputs, traced.name)
    assert peak_bytes() - start < GIGABYTE  # a set of deltas alone is 90 MB, the layer 10 GB
    experts = [name for name in traced.initializers if ".mlp.experts." in name]
    assert len(experts) == 128
    assert {name.removeprefix("transformer.") for name in traced.initializers} <= set(component.index)
    assert len(traced.model.graph) < 700


@pytest.mark.slow
def test_linked_generator_of_full_size(tmp_path: Path) -> None:
    write_generator(tmp_path / "generator")
    measured = export(tmp_path / "bundle", "--generator", tmp_path / "generator", "--link-weights")
    assert measured["parameters"] == 8_096_647_168
    assert measured["peak_bytes"] < 3 * GIGABYTE
    assert measured["new_bytes"] < GIGABYTE // 10

    index = SafetensorsIndex.from_folder(tmp_path / "generator")
    linked = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["linked"]["generator.onnx"]
    assert {name.removeprefix("generator.") for name in linked} == set(index)
    for name, link in linked.items():
        tensor = index[name.removeprefix("generator.")]
        place = (tensor.file.name, tensor.offset, tensor.length)
        assert (link["file"], link["offset"], link["length"]) == place


@pytest.mark.slow
def test_memory_does_not_grow_with_copied_weights(tmp_path: Path) -> None:
    measured = []
    for width in (512, 2048):
        folder = tmp_path / str(width)
        settings = {"num_pg_layers": 2, "num_base_model_layers": 2, "d_model": width}
        write_generator(folder, settings=settings)
        measured.append(export(tmp_path / f"bundle{width}", "--generator", folder))
        shutil.rmtree(tmp_path / f"bundle{width}")
    small, large = measured
    grown = large["checkpoint_bytes"] - small["checkpoint_bytes"]
    assert large["new_bytes"] - small["new_bytes"] > 0.9 * grown > 0.5 * GIGABYTE
    assert large["peak_bytes"] - small["peak_bytes"] < grown / 5


def export(*arguments: object) -> dict[str, Any]:
    """The figures of an export in a process of its own."""
    command = [sys.executable, "-m", "tools.measure_export", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
