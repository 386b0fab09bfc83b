"""``hywu edit``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import (
    SCALE,
    Command,
    check_output,
    json_option,
    lora_line,
    lora_report,
    plural,
    print_json,
    progress_bar,
    source_option,
    time_text,
    weighted,
)
from hywu_runtime.errors import InputError

if TYPE_CHECKING:
    from hywu_runtime.deltas import Deltas


@click.command(cls=Command)
@click.argument("bundle")
@click.argument("photo")
@click.argument("prompt")
@click.option(
    "--photo",
    "more",
    metavar="FILE",
    multiple=True,
    help="Another photo, for a bundle that takes several; repeat for more. The last gives the size.",
)
@click.option(
    "--out", metavar="FILE", help="The picture, PNG, JPEG or WebP.  [default: PHOTO's name with -edited.png]"
)
@click.option("--steps", type=int, metavar="N", help="Steps of the scheduler.  [default: the bundle's]")
@click.option(
    "--strength",
    type=float,
    metavar="X",
    help="Part of the steps to run, from the photo on.  [default: the bundle's]",
)
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "--delta-strength",
    type=float,
    metavar="X",
    default=1.0,
    show_default=True,
    help="Strength of the deltas; 0 is the base model.",
)
@click.option(
    "--guidance",
    type=SCALE,
    multiple=True,
    help="Guidance by the prompt, or the scale of that name; repeat for more.  [default: the bundle's]",
)
@click.option(
    "--image-guidance", type=float, metavar="X", help="Guidance by the photo.  [default: the bundle's]"
)
@click.option("--negative-prompt", metavar="TEXT", default="", help="What guidance leads away from.")
@click.option("--size", metavar="WxH", help="Size of the picture.  [default: near the photo's, aspect kept]")
@click.option("--scheduler", metavar="NAME", help="One of the bundle's schedulers.  [default: its first]")
@click.option("--deltas", "deltas_file", metavar="FILE", help="Use these deltas instead of generated ones.")
@click.option(
    "--lora",
    "loras",
    metavar="FILE[:WEIGHT]",
    multiple=True,
    help="Use this LoRA, of any spelling, or delta file; repeat to add others.",
)
@click.option("--save-deltas", metavar="FILE", help="Also write the generated deltas.")
@click.option("--backend", metavar="NAME", default="auto", show_default=True, help="See `hywu doctor`.")
@click.option("--variant", metavar="NAME", help="A precision variant of the bundle.")
@click.option("--engine", metavar="KEY", help="One of the bundle's engines.  [default: the newest that fits]")
@click.option("--threads", type=int, metavar="N", help="CPU threads.")
@click.option("--low-memory", is_flag=True, help="Hold one stage of the model in memory at a time.")
@source_option
@json_option
def edit(
    bundle: str, photo: str, prompt: str, more: tuple[str, ...], out: str | None, steps: int | None,
    strength: float | None, seed: int, delta_strength: float, guidance: tuple[tuple[str, float], ...],
    image_guidance: float | None, negative_prompt: str, size: str | None, scheduler: str | None,
    deltas_file: str | None, loras: tuple[str, ...], save_deltas: str | None, backend: str,
    variant: str | None, engine: str | None, threads: int | None, low_memory: bool,
    sources: dict[str, str], as_json: bool,
) -> None:  # fmt: skip
    """Edit PHOTO as PROMPT says.

    \b
    hywu edit out/bundle photo.jpg "make it sepia" --steps 8 --seed 42
    hywu edit out/bundle photo.jpg "make it sepia" --lora style.safetensors:0.8 --lora line.safetensors
    """
    import numpy as np

    from hywu_runtime import Deltas, Editor
    from hywu_runtime.images import check_suffix, save_picture

    start = time.perf_counter()
    target = Path(out) if out is not None else Path(f"{Path(photo).stem}-edited.png")
    check_suffix(target)
    parts = [weighted(text) for text in loras]
    if parts and deltas_file is not None:
        raise InputError(
            "--lora was given beside --deltas",
            "Expected one of them",
            f"To add them up, give the delta file as another LoRA: --lora {deltas_file}",
        )
    photos = [photo, *more]
    inputs = [
        *map(Path, photos),
        *(Path(file) for file in (deltas_file, *(file for file, _ in parts)) if file),
    ]
    check_output(target, *inputs)
    if save_deltas is not None:
        if deltas_file is not None or parts:
            raise InputError(
                f"--save-deltas was given beside --{'lora' if parts else 'deltas'}",
                "Expected one of them",
                "The deltas are in a file already",
            )
        check_output(Path(save_deltas), target, *inputs)
    deltas: Deltas | None = Deltas.load(deltas_file) if deltas_file is not None else None
    reports: list[dict[str, Any]] = []
    if parts:
        deltas, reports = _from_loras(bundle, parts)
    with (
        Editor.load(
            bundle,
            backend,
            threads=threads,
            low_memory=low_memory,
            sources=sources,
            variant=variant,
            engine=engine,
        ) as editor,
        progress_bar() as show,
    ):
        if save_deltas is not None:
            deltas = editor.generate(photos, prompt, size=size)
        picture = editor.edit(
            photos, prompt, negative_prompt=negative_prompt, steps=steps, strength=strength, seed=seed,
            guidance=dict(guidance), image_guidance=image_guidance, delta_strength=delta_strength,
            deltas=deltas, sampler=scheduler, size=size, output="array",
            progress=lambda done, total: show(f"step {done} of {total}", done, total),
        )  # fmt: skip
        assert isinstance(picture, np.ndarray)  # as `output` asks
        timings, used = editor.timings, editor.backend.name
    save_picture(picture, target)
    if save_deltas is not None and deltas is not None:
        deltas.save(save_deltas)
    height, width = picture.shape[:2]
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "out": str(target),
                "width": width,
                "height": height,
                "seed": seed,
                "backend": used,
                "deltas": save_deltas,
                "loras": reports,
                "seconds": {
                    "total": seconds,
                    "load": timings.load,
                    "graphs": timings.graphs,
                    "steps": timings.steps,
                },
            }
        )
        return
    for report in reports:
        click.echo(lora_line(report))
    count = len(timings.steps)
    pace = f"{plural(count, 'evaluation')} of {time_text(sum(timings.steps) / max(count, 1))}"
    click.echo(f"{target}: {width}x{height}, {pace}, {time_text(seconds)} in all, on {used}")


def _from_loras(bundle: str, parts: Sequence[tuple[str, float]]) -> tuple[Deltas, list[dict[str, Any]]]:
    """The bundle's deltas for a sum of LoRA files, and what was found in each."""
    from hywu_export.deltas.catalogue import Catalogue
    from hywu_export.deltas.convert import for_bundle, resolve
    from hywu_runtime import Deltas

    catalogue = Catalogue.from_bundle(bundle)
    found = [(resolve(file, catalogue), weight) for file, weight in parts]
    deltas = Deltas(for_bundle(found, bundle))
    return deltas, [lora_report(lora, weight) for lora, weight in found]
