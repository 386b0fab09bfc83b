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
    lora_line,
    lora_report,
    plural,
    print_json,
    require_toolchain,
    source_option,
    table,
    weighted,
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
    """Show the targets in a delta FILE, or in a LoRA file of any spelling, with shapes, ranks and norms.

    The norm of a target is the Frobenius norm of B·A, the change of its weight; with several samples, the
    largest.
    """
    from hywu_runtime import Deltas
    from hywu_runtime.deltas import is_delta_file

    is_deltas = Path(file).is_file() and is_delta_file(file)
    writer, loaded = ("deltas", Deltas.load(file)) if is_deltas else _read_lora(file)
    targets = _targets(loaded)
    if as_json:
        report = {"file": file, "spelling": writer, "rank": loaded.rank, "batch": loaded.batch}
        print_json(report | {"targets": targets})
        return
    numbers = sum(tensor.size for tensor in loaded.values())
    samples = plural(loaded.batch, "sample")
    what = "" if is_deltas else f"LoRA as {writer} writes it: "
    click.echo(
        f"{what}{plural(len(targets), 'target')}, rank {loaded.rank}, {samples}, {numbers:,} numbers\n"
    )
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
@click.argument("loras", metavar="LORA[:WEIGHT]...", nargs=-1, required=True)
@click.option("--bundle", metavar="BUNDLE", help="Fit the deltas to this bundle's targets and ranks.")
@click.option("--base", metavar="DIR", help="Look names up in this diffusers pipeline.")
@_out
@json_option
def convert(loras: tuple[str, ...], bundle: str | None, base: str | None, out: str, as_json: bool) -> None:
    """Convert LoRA files of any spelling to a delta file; several add up, each with its weight.

    Ranks are padded to those of --bundle. Without --bundle and --base a file in the spelling of diffusers or
    PEFT is taken at its word.

    \b
    hywu deltas convert style.safetensors:0.8 --bundle out/bundle --out style-deltas.safetensors
    """
    from hywu_export.deltas.catalogue import Catalogue
    from hywu_export.deltas.convert import combine, fit, for_bundle, resolve
    from hywu_export.deltas.spec import DeltaSpec
    from hywu_runtime import Deltas

    if bundle is not None and base is not None:
        raise InputError(
            "Both --bundle and --base were given", "Expected one of them at most", "Leave one out"
        )
    parts = [weighted(text) for text in loras]
    check_output(Path(out), *(Path(file) for file, _ in parts))
    catalogue = None
    if bundle is not None:
        catalogue = Catalogue.from_bundle(bundle)
    elif base is not None:
        require_toolchain()
        from hywu_export.families import open_base

        family = open_base(Path(base))
        modules = {name: component.module for name, component in family.components.items()}
        catalogue = Catalogue.from_modules(modules, family.denoiser)
    found = [(resolve(file, catalogue), weight) for file, weight in parts]
    if bundle is not None:
        arrays = for_bundle(found, bundle)
    else:
        pairs = combine(found)
        arrays = fit(pairs, DeltaSpec(tuple(pair.target(name) for name, pair in pairs.items())))
    _write(Deltas(arrays), out, as_json, [lora_report(lora, weight) for lora, weight in found])


@deltas.command("to-lora")
@click.argument("file")
@click.option("--bundle", metavar="BUNDLE", required=True, help="The bundle that the deltas are for.")
@click.option("--sample", type=click.IntRange(0), metavar="N", help="One of a batch.  [default: all]")
@click.option("--out", metavar="FILE", required=True, help="The LoRA file; -0, -1, … for those of a batch.")
@json_option
def to_lora(file: str, bundle: str, sample: int | None, out: str, as_json: bool) -> None:
    """Write a delta FILE as a LoRA file, which diffusers' load_lora_weights takes, with the same effect.

    \b
    hywu deltas generate out/bundle photo.jpg "make it sepia" --out sepia.safetensors
    hywu deltas to-lora sepia.safetensors --bundle out/bundle --out sepia-lora.safetensors
    """
    from hywu_export.deltas import save_lora
    from hywu_runtime import Deltas

    loaded = Deltas.load(file)
    target = Path(out)
    if sample is not None or loaded.batch <= 1:
        files = {sample or 0: target}
    else:
        names = {i: f"{target.stem}-{i}{target.suffix}" for i in range(loaded.batch)}
        files = {i: target.with_name(name) for i, name in names.items()}
    for path in files.values():
        check_output(path, Path(file))
    for i, path in files.items():
        save_lora(loaded, path, bundle, i)
    if as_json:
        print_json({"out": [str(path) for path in files.values()], "rank": loaded.rank})
    else:
        for path in files.values():
            click.echo(f"{path}: {plural(len(loaded) // 2, 'target')}, rank {loaded.rank}")


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
    parts = [(Deltas.load(file), weight) for file, weight in map(weighted, files)]
    blended = Deltas.blend(parts, spec.rank if spec is not None else None)
    if spec is not None:
        blended.pad(spec).check(spec)
    _write(blended, out, as_json)


def _read_lora(file: str) -> tuple[str, Deltas]:
    """Whose spelling a LoRA file has, and its matrices under the file's own names."""
    from hywu_export.deltas.lorafile import read_lora
    from hywu_runtime.deltas import Deltas

    lora = read_lora(file)
    tensors = {}
    for entry in lora.entries:
        tensors[f"{entry.key}.lora_A"], tensors[f"{entry.key}.lora_B"] = (
            entry.pair.a[None],
            entry.pair.b[None],
        )
    return lora.writer, Deltas(tensors)


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


def _write(made: Deltas, out: str, as_json: bool, loras: list[dict[str, Any]] | None = None) -> None:
    made.save(out)
    if as_json:
        report = {"out": out, "targets": len(made) // 2, "rank": made.rank, "batch": made.batch}
        print_json(report if loras is None else report | {"loras": loras})
    else:
        for lora in loras or ():
            click.echo(lora_line(lora))
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
