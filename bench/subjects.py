"""What is measured: a pipeline in diffusers' format, its bundles, and two LoRAs to change between."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")  # of the LoRA training scripts
RANK = 16
MODES: dict[str, dict[str, Any]] = {
    "low-rank": {},
    "merged": {"deltas": "merged"},
    "winograd": {"winograd": True},
}
"""Of exporting."""
PROMPT = "make it sepia"
Deltas = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Subject:
    """Files and the request; plain data, as it goes to other processes.

    Attributes:
        name: ``demo`` or ``860m``.
        base: the pipeline's folder.
        bundles: the exported bundles, by `MODES`.
        side: of the picture in pixels.
        steps: of an edit.
        threads: of every peer.
    """

    name: str
    base: Path
    bundles: dict[str, Path]
    side: int
    steps: int
    threads: int

    def photo(self) -> npt.NDArray[np.uint8]:
        """The same picture for everyone, uint8 ``[side, side, 3]``."""
        x, y = np.meshgrid(np.arange(self.side), np.arange(self.side))
        return np.stack([255 * x // self.side, 255 * y // self.side, (x ^ y) & 255], -1).astype(np.uint8)

    def latents(self, batch: int = 1) -> npt.NDArray[np.float32]:
        """Initial noise, float32 ``[batch, channels, height, width]`` of the latents."""
        from hywu_runtime import Manifest
        from hywu_runtime.program import resolve_axes, resolve_shape

        manifest = Manifest.read(self.bundles["low-rank"])
        assert manifest.image is not None
        noise = next(name for name, tensor in manifest.tensors.items() if tensor.draw == "initial")
        photos = np.stack([self.photo()] * batch)
        axes = resolve_axes(manifest, batch, {manifest.image.tensor: photos})
        shape = resolve_shape(manifest, noise, axes)
        return np.random.default_rng(7).standard_normal(shape).astype(np.float32)

    def deltas(self, number: int) -> Deltas:
        """One of the LoRAs: A ``[1, r, in]`` and B ``[1, out, r]`` by name, for every target."""
        from hywu_runtime import Manifest

        spec = Manifest.read(self.bundles["low-rank"]).deltas
        assert spec is not None
        rng = np.random.default_rng(number)
        return {
            name: (rng.standard_normal((1, *shape)) / np.sqrt(shape[-1]) * 0.1).astype(np.float32)
            for name, shape in spec.tensors.items()
        }


def make(name: str, out: Path, side: int | None, steps: int | None, threads: int) -> Subject:
    """The subject called ``name``, made in ``out`` if it is not there.

    ``demo`` is the trained base of this project with LoRA targets; ``860m`` has the configuration of
    timbrooks/instruct-pix2pix and random weights.
    """
    base = ROOT / "demo" / "base" if name == "demo" else out / "860m" / "base"
    if not (base / "model_index.json").exists():
        from tools.random_weights import fill
        from tools.sparse_checkpoints import write_instruct_pix2pix

        write_instruct_pix2pix(base)
        for path in sorted(base.rglob("*.safetensors")):
            fill(path, seed=0)
    sides, counts = {"demo": 128, "860m": 256}, {"demo": 8, "860m": 8}
    bundles = {}
    for mode, options in MODES.items():
        bundles[mode] = out / name / mode
        if not (bundles[mode] / "manifest.json").exists():
            _export(base, bundles[mode], options | {"size": sides[name]})
    subject = Subject(name, base, bundles, side or sides[name], steps or counts[name], threads)
    _add_int8(subject)
    return subject


def _add_int8(subject: Subject) -> None:
    """The variant ``int8`` for CPUs, for its times alone: ranges are not calibrated, as random weights make
    no pictures that would tell good ranges from bad ones."""
    from hywu_export.bundle.variants import load_graph, write_variant
    from hywu_export.passes.layers import find_layers
    from hywu_export.passes.quantize import Quantized, half_scale, quantize
    from hywu_runtime import Bundle, Manifest
    from hywu_runtime.backends.onnxruntime import INTEGER_PRODUCTS

    bundle = subject.bundles["winograd"]
    if "int8" in Manifest.read(bundle).variants:
        return
    opened = Bundle.open(bundle, sources={"base": str(subject.base)})
    models = {graph: load_graph(opened, graph) for graph in opened.manifest.graphs}
    for model in models.values():
        layers = [layer for layer in find_layers(model) if layer.op != "Conv" and not layer.small]
        quantize(model, {layer.name: Quantized(half_scale(8.0)) for layer in layers}, unsigned=True)
    write_variant(bundle, "int8", "int8", models, suffix=INTEGER_PRODUCTS)


def _export(base: Path, bundle: Path, mode: dict[str, Any]) -> None:
    from hywu_export import ExportOptions, export

    options = ExportOptions(
        targets=TARGETS,
        max_rank=RANK,
        link_weights=True,
        samplers=("euler",),
        max_steps=20,
        steps=8,
        max_batch=4,
        **mode,
    )
    bundle.parent.mkdir(parents=True, exist_ok=True)
    export(bundle, base, options=options)
