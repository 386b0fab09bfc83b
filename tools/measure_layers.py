"""A few layers of HunyuanImage-3.0 in their public width, with real numbers: ONNX Runtime against torch.

    python -m tools.measure_layers FOLDER [--layers 1] [--experts 8] [--top-k 2] [--size 512]

Makes a checkpoint in BF16 with random weights, exports it with its weights linked, and runs vision, prefill
and two guided steps from the bundle, with deltas of rank 16 on every target. torch runs the same network in
float32 on the whole sequence, without cache, every expert on every token. Prints the largest difference and
the root of the mean square of it, each relative to that of torch's result.
"""

from __future__ import annotations

import gc
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch

from hywu_export import ExportOptions, export
from hywu_export.deltas import DeltaSpec, inject
from hywu_export.families import open_base
from hywu_export.families.hunyuan import graphs, reference
from hywu_export.families.hunyuan.experts import Experts
from hywu_export.families.hunyuan_image3 import HunyuanImage3Instruct
from hywu_export.schedules import make_scheduler
from hywu_export.tracing.loading import with_weights
from hywu_runtime import Editor
from hywu_runtime.program import Executor, Request, make_plan, resolve_axes
from hywu_runtime.schedule import Schedule
from tools.random_weights import fill
from tools.sparse_checkpoints import HUNYUAN, write_hunyuan_image3

STEPS, RANK, SCALE = 2, 16, 2.5
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Inputs:
    """Of one request: a photo as latents and patches, a text, noise, and a set of deltas."""

    photo: reference.Photo
    conditional: list[int]
    unconditional: list[int]
    noise: Array
    deltas: dict[str, Array]


def make_checkpoint(folder: Path, layers: int, experts: int, top_k: int, **settings: Any) -> None:
    """A checkpoint with few patches and words, and a VAE that is not run; ``settings`` replace more."""
    few: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_experts": experts,
        "moe_topk": top_k,
        "max_position_embeddings": 256,
        "vae": HUNYUAN["vae"] | {"block_out_channels": [64] * 5, "layers_per_block": 1},  # not run
        "vit": HUNYUAN["vit"] | {"num_hidden_layers": 1},
        "vit_processor": {"max_num_patches": 64},
    }
    write_hunyuan_image3(folder, "bfloat16", few | settings)
    for path in sorted(folder.glob("*.safetensors")):
        fill(path, 0)


def make_inputs(family: HunyuanImage3Instruct, spec: DeltaSpec, size: int) -> Inputs:
    """Random ones, for a picture of ``size`` pixels."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    config = family.config
    count, side = config.vision.max_num_patches, size // config.downsample
    patches = torch.from_numpy(normal(1, count, config.vision.patch_features))
    photo = reference.Photo(torch.from_numpy(normal(1, config.latent_channels, side, side)), patches, (8, 6))
    words = reference.texts(family.tokens, list(range(1, 21)))
    # A of variance 1 / in, and B small: deltas add a few hundredths of what weights give.
    deltas = {
        name: normal(1, *shape) * np.float32(0.02 if name.endswith("B") else shape[-1] ** -0.5)
        for name, shape in spec.tensors().items()
    }
    return Inputs(photo, *words, normal(1, config.latent_channels, side, side), deltas)


def in_onnxruntime(bundle: Path, base: Path, family: HunyuanImage3Instruct, given: Inputs) -> list[Array]:
    """The latents and the velocity after the last step, by the bundle's program."""
    with Editor.load(bundle, "ort-cpu", sources={"base": base}) as editor:
        manifest = editor.bundle.manifest
        length = next(v for v in manifest.graphs["sequence"].outputs if v.name == "sequence.ids").shape[1]
        assert isinstance(length, int)
        tail = [*family.tokens.tail]
        rows = {"ids": [*given.conditional, *tail], "unconditional": [*given.unconditional, *tail]}
        values: dict[str, Array] = {
            f"sequence.{name}": np.pad(np.int64([ids]), ((0, 0), (0, length - len(ids))))
            for name, ids in rows.items()
        }
        values["sequence.mask"] = np.int64(np.arange(length) < len(rows["ids"]))[None]
        values |= {
            "image.latents": given.photo.latents.numpy(),
            "vit.patches": given.photo.patches.numpy(),
            "vit.grid": np.int64(given.photo.grid),
            "noise.initial": given.noise,
            "guidance.text": np.full(1, SCALE, np.float32),
            "initial_scale": np.ones((), np.float32),
            "gate": np.ones(1, np.float32),
            **given.deltas,
        }
        assert manifest.schedules is not None
        table = Schedule(editor.bundle.file(manifest.schedules.file), manifest.schedules).rows(None, STEPS)
        plan = make_plan(manifest, ["latents.next", "history.next"], frozenset(values), guided=True)
        per_step = {
            "timestep": lambda i: np.asarray(table.timesteps[i]),
            "coefficients": lambda i: np.asarray(table.coefficients[i]),
            "noise.step": lambda i: np.zeros_like(given.noise),
        }
        request = Request(resolve_axes(manifest, 1, values), values, per_step, STEPS, (), None, None)
        executor = Executor(editor.bundle, editor.backend, low_memory=True)
        try:
            found = executor.run(plan, request)
        finally:
            executor.close()
    return [found["latents.next"], found["history.next"][:, 1]]


def in_torch(family: HunyuanImage3Instruct, spec: DeltaSpec, given: Inputs) -> list[Array]:
    """The same by the network itself, from the whole sequence at every step."""
    network = graphs.part(family.transformer, *graphs.DECODING, "vision_model", "vision_aligner")
    for module in network.modules():
        if isinstance(module, Experts):
            module.block = 0
    scheduler: Any = make_scheduler(*family.scheduler)
    scheduler.set_timesteps(STEPS)
    weights = {"transformer": family.components["transformer"].tensors}
    holder = torch.nn.Module()
    holder.transformer = network
    latents = torch.from_numpy(given.noise)
    guided = latents
    with with_weights(holder, weights), torch.no_grad(), inject(network, spec) as injection:
        injection.set({name: torch.from_numpy(array) for name, array in given.deltas.items()}, torch.ones(1))
        for moment in scheduler.timesteps:
            made = [
                reference.velocity(network, family.tokens, row, given.photo, latents, moment[None])
                for row in (given.conditional, given.unconditional)
            ]
            guided = made[1] + SCALE * (made[0] - made[1])
            latents = scheduler.step(guided, moment, latents, return_dict=False)[0]
    return [latents.numpy(), guided.numpy()]


def differences(found: Array, expected: Array) -> tuple[float, float]:
    """The largest difference, and the root of the mean square; relative to those of ``expected``."""
    apart = found.astype(np.float64) - expected
    return (
        float(np.abs(apart).max() / np.abs(expected).max()),
        float(np.sqrt((apart**2).mean() / (expected.astype(np.float64) ** 2).mean())),
    )


def compare(folder: Path, size: int, **settings: Any) -> dict[str, tuple[float, float]]:
    """Makes, exports, runs both; latents and velocity → `differences`."""
    make_checkpoint(folder / "base", **settings)
    options = ExportOptions(link_weights=True, max_rank=RANK, max_steps=STEPS, steps=STEPS, max_batch=2)
    export(folder / "bundle", folder / "base", options=options)
    family = open_base(folder / "base")
    assert isinstance(family, HunyuanImage3Instruct)
    spec = DeltaSpec.from_patterns(family.transformer, family.default_targets, RANK)
    given = make_inputs(family, spec, size)
    found = in_onnxruntime(folder / "bundle", folder / "base", family, given)
    gc.collect()
    expected = in_torch(family, spec, given)
    return dict(zip(("latents", "velocity"), map(differences, found, expected)))


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=1, show_default=True)
@click.option("--experts", default=8, show_default=True)
@click.option("--top-k", default=2, show_default=True)
@click.option("--size", default=512, show_default=True, help="Side of the picture in pixels.")
def main(folder: Path, layers: int, experts: int, top_k: int, size: int) -> None:
    for name, (largest, mean) in compare(folder, size, layers=layers, experts=experts, top_k=top_k).items():
        click.echo(f"{name}: largest difference {largest:.1e}, root mean square {mean:.1e}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    click.echo(f"{time.process_time():.0f} CPU s, peak {peak:.1f} GB")


if __name__ == "__main__":
    main()
