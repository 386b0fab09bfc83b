"""``hywu export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import (
    SCALE,
    Command,
    json_option,
    lora_line,
    lora_report,
    plural,
    print_json,
    progress_bar,
    require_toolchain,
    size_text,
    table,
    time_text,
)
from hywu_runtime.errors import InputError

if TYPE_CHECKING:
    from hywu_export.deltas.merging import Mode
    from hywu_runtime.manifest import Manifest

_COUNT = click.IntRange(1, 4096)
_STEPS = click.IntRange(1, 1000)  # what diffusion models are trained with
_PIXELS = click.IntRange(1, 65536)


@click.command(cls=Command)
@click.option("--base", metavar="DIR", help="A diffusers pipeline, as save_pretrained writes it.")
@click.option("--generator", metavar="DIR", help="A HY-WU parameter generator.")
@click.option("--out", metavar="BUNDLE", required=True, help="The folder to write; it must not exist.")
@click.option(
    "--targets",
    metavar="PATTERN",
    multiple=True,
    help="Modules that take deltas, where there is no generator; repeat for more.",
)
@click.option(
    "--lora",
    "loras",
    metavar="FILE",
    multiple=True,
    help="A LoRA file whose modules and ranks the bundle takes; repeat for more.",
)
@click.option(
    "--max-rank",
    type=_COUNT,
    metavar="N",
    help="Rank of --targets, and the least one for --lora.  [default: 16, and the files' own]",
)
@click.option(
    "--scheduler",
    "schedulers",
    metavar="NAME",
    multiple=True,
    help="Schedulers to offer, the default first.  [default: the pipeline's own]",
)
@click.option(
    "--max-steps", type=_STEPS, metavar="N", default=100, show_default=True, help="Most steps of an edit."
)
@click.option("--steps", type=_STEPS, metavar="N", help="Default steps of an edit.")
@click.option(
    "--guidance",
    type=SCALE,
    multiple=True,
    help="Default guidance by the prompt, or of the scale of that name; repeat for more.",
)
@click.option("--image-guidance", type=float, metavar="X", help="Default guidance by the photo.")
@click.option(
    "--batch", type=_COUNT, metavar="MAX", default=8, show_default=True, help="Most photos in a batch."
)
@click.option("--max-size", type=_PIXELS, metavar="PIXELS", help="Longest side of a picture.")
@click.option("--size", type=_PIXELS, metavar="PIXELS", help="Side of the default working area.")
@click.option(
    "--max-sequence-length",
    "text_length",
    type=_COUNT,
    metavar="N",
    help="Tokens of a prompt, where the pipeline leaves them open.",
)
@click.option(
    "--vae-tile",
    type=_PIXELS,
    metavar="PIXELS",
    help="Let the VAE work in tiles of this side, for large pictures in little memory.",
)
@click.option(
    "--images",
    type=_COUNT,
    metavar="N",
    default=1,
    show_default=True,
    help="Photos of a request, for a pipeline that takes several.",
)
@click.option("--link-weights", is_flag=True, help="Leave the weights in the checkpoints.")
@click.option(
    "--winograd",
    is_flag=True,
    help="Write 3x3 convolutions as Winograd products, for CPUs: faster, with four times their weights.",
)
@click.option(
    "--hoist/--no-hoist",
    default=True,
    show_default=True,
    help="Compute once per request what no step changes.",
)
@click.option(
    "--deltas",
    type=click.Choice(["low-rank", "merged", "auto"]),
    default="low-rank",
    show_default=True,
    help="Run deltas beside the denoiser's layers, or merge them into its weights once per request.",
)
@click.option(
    "--stages",
    type=click.IntRange(1, 256),
    metavar="N",
    default=1,
    show_default=True,
    help="Cut the large graphs into N, for as many devices.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle, in one step at the end.")
@json_option
def export(
    base: str | None, generator: str | None, out: str, targets: tuple[str, ...], loras: tuple[str, ...],
    max_rank: int | None, schedulers: tuple[str, ...], max_steps: int, steps: int | None,
    guidance: tuple[tuple[str, float], ...], image_guidance: float | None, batch: int, max_size: int | None,
    size: int | None, text_length: int | None, vae_tile: int | None, images: int, link_weights: bool,
    winograd: bool, hoist: bool, deltas: Mode, stages: int, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write a bundle from a base pipeline, a generator, or both.

    \b
    hywu export --base models/editor --generator models/generator --out bundle
    hywu export --base models/editor --lora style.safetensors --out bundle
    hywu export --base models/editor --targets to_q --targets to_v --max-rank 8 --out bundle
    """
    from hywu_export.bundle.staging import check_target

    start = time.perf_counter()
    if base is None and generator is None:
        raise InputError(
            "There is nothing to export", "A base, a generator, or both", "Give --base or --generator"
        )
    check_target(Path(out).absolute(), overwrite)  # before the long way to the writer, which checks again
    require_toolchain()
    from hywu_export.exporter import ExportOptions
    from hywu_export.exporter import export as export_bundle

    scales = dict(guidance) | ({} if image_guidance is None else {"image": image_guidance})
    options = ExportOptions(
        targets=targets, loras=tuple(map(Path, loras)), max_rank=max_rank, samplers=schedulers,
        max_steps=max_steps, steps=steps, guidance=scales, max_batch=batch, max_size=max_size, size=size,
        text_length=text_length, vae_tile=vae_tile, images=images, link_weights=link_weights,
        winograd=winograd, hoist=hoist,
        deltas=deltas, stages=stages, overwrite=overwrite,
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    with progress_bar() as show:
        manifest = export_bundle(
            out, base, generator, options, show, lambda lora: found.append(lora_report(lora))
        )
    _report(Path(out), manifest, found, time.perf_counter() - start, as_json)


def _report(
    out: Path, manifest: Manifest, loras: list[dict[str, Any]], seconds: float, as_json: bool
) -> None:
    size = sum(file.size for file in manifest.files.values())
    links = {(t.source, t.file, t.offset): t.length for ts in manifest.linked.values() for t in ts.values()}
    linked, made = sum(links.values()), len(manifest.results.deltas)
    spec, schedules = manifest.deltas, manifest.schedules
    if as_json:
        print_json(
            {
                "bundle": str(out),
                "graphs": list(manifest.graphs),
                "targets": len(spec.targets) if spec is not None else 0,
                "rank": spec.rank if spec is not None else None,
                "generated": made,
                "loras": loras,
                "schedulers": list(schedules.samplers) if schedules is not None else [],
                "bytes": size,
                "linked_bytes": linked,
                "seconds": seconds,
            }
        )
        return
    deltas = f"{plural(len(spec.targets), 'target')}, rank {spec.rank}" if spec is not None else "no targets"
    rows = [
        ("bundle", out),
        ("graphs", ", ".join(manifest.graphs)),
        ("deltas", f"{deltas}; {made} tensors generated" if made else f"{deltas}; none generated"),
        *(("lora", lora_line(lora)) for lora in loras),
        ("schedulers", ", ".join(schedules.samplers) if schedules is not None else "none"),
        ("size", size_text(size) + (f", and {size_text(linked)} linked" if linked else "")),
        ("time", time_text(seconds)),
    ]
    click.echo(table(rows, indent=0))
