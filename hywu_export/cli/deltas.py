"""``hywu deltas``: sets of deltas as files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import (
    CommandGroup,
    check_output,
    json_option,
    plural,
    print_json,
    require_toolchain,
    source_option,
    table,
)
from hywu_runtime.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from hywu_runtime import manifest
    from hywu_runtime.deltas import Deltas

_out = click.option("--out", metavar="FILE", required=True, help="The delta file to write.")


@click.group(cls=CommandGroup)
def deltas() -> None:
    """Generate, show, convert and blend sets of deltas."""


@deltas.command()
@click.argument("bundle")
@click.argument("photo")
@click.argument("prompt")
@_out
@click.option("--size", metavar="WxH", help="Working size of the photo, as for `hywu edit`.")
@click.option("--backend", metavar="NAME", default="auto", show_default=True, help="See `hywu doctor`.")
@click.option("--variant", metavar="NAME", help="A precision variant of the bundle.")
@click.option("--threads", type=int, metavar="N", help="CPU threads.")
@source_option
@json_option
def generate(
    bundle: str, photo: str, prompt: str, out: str, size: str | None, backend: str, variant: str | None,
    threads: int | None, sources: dict[str, str], as_json: bool,
) -> None:  # fmt: skip
    """Write the deltas that BUNDLE's generator makes for PHOTO and PROMPT."""
    from hywu_runtime import Editor

    check_output(Path(out), Path(photo))
    with Editor.load(bundle, backend, threads=threads, sources=sources, variant=variant) as editor:
        made = editor.generate(photo, prompt, size=size)
    _write(made, out, as_json)


@deltas.command()
@click.argument("file")
@json_option
def show(file: str, as_json: bool) -> None:
    """Show the targets in a delta FILE, with shapes, ranks and norms.

    The norm of a target is the Frobenius norm of B·A, the change of its weight; with several samples, the
    largest.
    """
    from hywu_runtime import Deltas

    loaded = Deltas.load(file)
    targets = _targets(loaded)
    if as_json:
        print_json({"file": file, "rank": loaded.rank, "batch": loaded.batch, "targets": targets})
        return
    numbers = sum(tensor.size for tensor in loaded.values())
    samples = plural(loaded.batch, "sample")
    click.echo(f"{plural(len(targets), 'target')}, rank {loaded.rank}, {samples}, {numbers:,} numbers\n")
    rows = [
        (
            name,
            *("x".join(map(str, t[side])) if t[side] else "missing" for side in ("a", "b")),
            t["rank"],
            "not finite" if t["norm"] is None else f"{t['norm']:.4g}",
        )
        for name, t in targets.items()
    ]
    click.echo(table(rows, ("module", "A", "B", "rank", "norm")))


@deltas.command()
@click.argument("adapter")
@click.option("--bundle", metavar="BUNDLE", help="Fit the deltas to this bundle's targets and ranks.")
@click.option("--base", metavar="DIR", help="Check them against this diffusers pipeline.")
@_out
@json_option
def convert(adapter: str, bundle: str | None, base: str | None, out: str, as_json: bool) -> None:
    """Convert a LoRA ADAPTER, of PEFT or diffusers, to a delta file.

    Ranks are padded to those of --bundle. Without --bundle and --base the adapter is taken at its word.
    """
    from hywu_export.deltas import DeltaSpec, peft_to_deltas
    from hywu_runtime import Deltas

    if bundle is not None and base is not None:
        raise InputError(
            "Both --bundle and --base were given", "Expected one of them at most", "Leave one out"
        )
    check_output(Path(out))
    if bundle is not None:
        from hywu_runtime.codec import encode

        arrays = peft_to_deltas(adapter, DeltaSpec.from_manifest(encode(_spec(bundle))))
    elif base is None:
        arrays = peft_to_deltas(adapter)
    else:
        require_toolchain()
        from hywu_export.families import open_base

        family = open_base(Path(base))
        arrays = peft_to_deltas(adapter, module=family.components[family.denoiser].module)
    _write(Deltas(arrays), out, as_json)


@deltas.command()
@click.argument("files", metavar="FILE[:WEIGHT]...", nargs=-1, required=True)
@click.option("--bundle", metavar="BUNDLE", help="Check that this bundle takes the blend.")
@_out
@json_option
def blend(files: tuple[str, ...], bundle: str | None, out: str, as_json: bool) -> None:
    """Write the weighted sum of delta files, exactly: the ranks add up.

    \b
    hywu deltas blend sepia.safetensors:0.7 blur.safetensors:0.5 --out both.safetensors
    """
    from hywu_runtime import Deltas

    check_output(Path(out))
    spec = _spec(bundle) if bundle is not None else None
    parts = [(Deltas.load(file), weight) for file, weight in map(_weighted, files)]
    blended = Deltas.blend(parts, spec.rank if spec is not None else None)
    if spec is not None:
        blended.pad(spec).check(spec)
    _write(blended, out, as_json)


def _weighted(text: str) -> tuple[str, float]:
    """``FILE:WEIGHT``, or ``FILE`` with weight 1."""
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return file, float(weight)
    except ValueError:
        return text, 1.0


def _spec(bundle: str) -> manifest.DeltaSpec:
    from hywu_runtime import Manifest

    spec = Manifest.read(bundle).deltas
    if spec is None:
        raise UnsupportedError(
            f"The bundle {bundle} takes no deltas",
            "Expected one with delta targets",
            "Export it with targets",
        )
    return spec


def _write(made: Deltas, out: str, as_json: bool) -> None:
    made.save(out)
    if as_json:
        print_json({"out": out, "targets": len(made) // 2, "rank": made.rank, "batch": made.batch})
    else:
        click.echo(f"{out}: {plural(len(made) // 2, 'target')}, rank {made.rank}")


def _targets(loaded: Deltas) -> dict[str, dict[str, Any]]:
    """Module → shapes, rank and norm of its pair; a shape is null where half of the pair is missing."""
    import numpy as np

    found: dict[str, dict[str, Any]] = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in loaded):
        a, b = loaded.get(f"{module}.lora_A"), loaded.get(f"{module}.lora_B")
        norm = None
        if a is not None and b is not None and b.ndim == 3 and a.shape[1] == b.shape[2]:
            wide = a.reshape(*a.shape[:2], -1).astype(np.float64)
            with np.errstate(all="ignore"):
                # |B·A|² = trace((Bᵀ·B)·(A·Aᵀ)): r x r matrices, however large the weight is.
                squared = np.einsum(
                    "dij,dij->d", np.swapaxes(b, 1, 2) @ b.astype(np.float64), wide @ np.swapaxes(wide, 1, 2)
                )
                norm = float(np.sqrt(np.abs(squared)).max())
        found[module] = {
            "a": None if a is None else list(a.shape),
            "b": None if b is None else list(b.shape),
            "rank": 0 if a is None else a.shape[1],
            "norm": norm if norm is not None and math.isfinite(norm) else None,
        }
    return found
