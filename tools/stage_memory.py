"""What each stage of a bundle needs of a device's memory, in several precisions, and which devices have it.

    python -m tools.stage_memory BUNDLE --graphs step,prefill --axis latent_height=64 --axis latent_width=64
    python -m tools.stage_memory CHECKPOINT --layers model.layers. --stages 4

The second form reads the headers of a checkpoint: its numbered layers in equal parts, what is no layer in the
first stage.

Counted are the weights, which are read off the graphs (the data need not be there), the deltas, and what is
carried or made before the steps and read by them, such as a key-value cache. Scratch memory of a backend is
not: it depends on the kernels that it chooses.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir

from hywu_export.bundle.sources import SafetensorsIndex
from hywu_runtime.manifest import ITEM_SIZES, Manifest
from hywu_runtime.program import resolve_axes, resolve_shape

GIGABYTE = 10**9
BITS = {"bf16": 16, "fp8 or int8": 8, "int4": 4}
GROUP = 128
"""Weights of one INT4 scale (16 bits); those of INT8 and FP8, one per output channel, are nothing."""
DEVICES = {  # of memory, as sold
    "24 GB": 24, "32 GB": 32, "48 GB": 48, "64 GB": 64, "80 GB": 80, "96 GB": 96, "141 GB": 141,
    "192 GB": 192,
}  # fmt: skip
FREE = 0.9
"""The part of a device's memory that weights and buffers may take; the rest is for scratch and the driver."""


def stage_parameters(bundle: Path, manifest: Manifest, graphs: Collection[str]) -> dict[int, dict[str, int]]:
    """Stage → name → number of elements of its weights; what several of the graphs share counts once."""
    found: dict[int, dict[str, int]] = {}
    for name, graph in manifest.graphs.items():
        if name in graphs or graph.stage_of in graphs:
            model = ir.load(bundle / graph.file)
            for initializer, value in model.graph.initializers.items():
                assert value.shape is not None
                sizes = found.setdefault(graph.stage, {})
                sizes[initializer] = math.prod(value.shape.numpy())
    return found


def stage_tensors(
    manifest: Manifest, graphs: Collection[str], axes: Mapping[str, int]
) -> dict[int, Counter[str]]:
    """Stage → bytes of what its graphs read and make: ``deltas``, ``cache`` (states, and what was made before
    the steps for them) and ``crossing`` (between stages)."""
    deltas = manifest.deltas.tensors if manifest.deltas is not None else {}
    made = {
        name for call in manifest.program if call.phase != "step" for name in manifest.writes(call).values()
    }
    kinds: dict[int, dict[str, str]] = {}
    for call in manifest.program:
        graph = manifest.graphs[call.graph]
        if call.graph not in graphs and graph.stage_of not in graphs:
            continue
        seen = kinds.setdefault(graph.stage, {})
        for name in (*manifest.reads(call).values(), *manifest.writes(call).values()):
            if name in deltas or name in manifest.results.deltas:
                seen[name] = "deltas"
            elif graph.stage_of is not None and name.startswith((f"{graph.stage_of}/", f"{graph.stage_of}.")):
                seen[name] = "crossing"
            elif call.phase == "step" and (name in made or name in {s.tensor for s in manifest.state}):
                seen[name] = "cache"
    found: dict[int, Counter[str]] = {}
    for stage, names in kinds.items():
        sizes = found.setdefault(stage, Counter())
        for name, kind in names.items():
            shape = resolve_shape(manifest, name, axes)
            sizes[kind] += math.prod(shape) * ITEM_SIZES[manifest.signatures[name].dtype]
    return found


def checkpoint_parameters(folder: Path, layers: str, stages: int) -> dict[int, dict[str, int]]:
    """As `stage_parameters`, of a checkpoint whose layers are ``<layers><number>.``."""
    sizes = {name: math.prod(t.shape) for name, t in SafetensorsIndex.from_folder(folder).items()}
    number = {name: int(name[len(layers) :].split(".")[0]) for name in sizes if name.startswith(layers)}
    count = max(number.values()) + 1
    found: dict[int, dict[str, int]] = {stage: {} for stage in range(stages)}
    for name, size in sizes.items():
        found[number.get(name, 0) * stages // count][name] = size
    return found


def weight_bytes(elements: int, bits: int) -> int:
    """Bytes of so many weights, with the scales of INT4."""
    return elements * bits // 8 + (2 * elements // GROUP if bits < 8 else 0)


def smallest_device(size: float) -> str:
    """The smallest device that has room for ``size`` bytes."""
    fits = [name for name, memory in DEVICES.items() if size <= FREE * memory * GIGABYTE]
    return fits[0] if fits else "none"


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--graphs", default="step", show_default=True, help="Names of whole graphs, separated by commas."
)
@click.option("--layers", metavar="PREFIX", help="Of a checkpoint instead of a bundle.")
@click.option("--stages", default=1, show_default=True, help="Of a checkpoint.")
@click.option("--axis", "given", multiple=True, metavar="NAME=SIZE", help="Sizes of axes; batch is 1.")
def main(bundle: Path, graphs: str, layers: str | None, stages: int, given: tuple[str, ...]) -> None:
    tensors: dict[int, Counter[str]] = {}
    if layers is not None:
        parameters = checkpoint_parameters(bundle, layers, stages)
    else:
        manifest = Manifest.read(bundle)
        names = graphs.split(",")
        sizes = {name: int(size) for name, _, size in (text.partition("=") for text in given)}
        axes = resolve_axes(manifest, sizes.pop("batch", 1), {}) | sizes
        axes |= {name: axis.size(axes) or 1 for name, axis in manifest.axes.items() if axis.derived}
        parameters = stage_parameters(bundle, manifest, names)
        tensors = stage_tensors(manifest, names, axes)
    rows: list[dict[str, Any]] = []
    for stage in sorted(parameters):
        elements = sum(parameters[stage].values())
        others = tensors.get(stage, Counter())
        row: dict[str, Any] = {"stage": stage, "parameters": elements, **others}
        for name, bits in BITS.items():
            total = weight_bytes(elements, bits) + sum(others.values())
            row[name] = {"bytes": total, "device": smallest_device(total)}
        rows.append(row)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
