"""``hywu calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import (
    Command,
    json_option,
    plural,
    print_json,
    progress_bar,
    require_toolchain,
    size_text,
    source_option,
    table,
)

if TYPE_CHECKING:
    from hywu_calibration.report import Quality, Report

SHOWN_WIDE = 20


@click.command(cls=Command, short_help="Add a precision variant to BUNDLE.")
@click.argument("bundle")
@click.option(
    "--variant", "precision", type=click.Choice(["fp16", "bf16", "int8", "int8-weights"]), required=True,
    help="The precision.",
)  # fmt: skip
@click.option("--images", metavar="DIR", help="Photographs like those that will be edited.")
@click.option("--prompts", metavar="FILE", help="Instructions like those that will be given, one a line.")
@click.option("--samples", type=int, metavar="N", default=64, show_default=True, help="Edits to observe.")
@click.option(
    "--method", type=click.Choice(["minmax", "percentile", "entropy", "mse"]), default="mse",
    show_default=True, help="How INT8 ranges are found.",
)  # fmt: skip
@click.option(
    "--percentile", type=float, metavar="P", default=99.99, show_default=True, help="Of --method percentile."
)
@click.option("--smooth", type=float, metavar="X", help="SmoothQuant's alpha, such as 0.8.  [default: none]")
@click.option(
    "--min-psnr", type=float, metavar="DB", default=32.0, show_default=True,
    help="What every edit must reach against FP32; worst layers stay wide until it does.",
)  # fmt: skip
@click.option(
    "--max-wide", type=float, metavar="SHARE", default=0.1, show_default=True,
    help="The largest share of the layers that may stay wide for that.",
)  # fmt: skip
@click.option("--seed", type=int, metavar="N", default=0, show_default=True, help="Seed of the samples.")
@click.option("--name", metavar="NAME", help="The variant's name.  [default: the precision]")
@click.option("--steps", type=int, metavar="N", help="Steps of the edits.  [default: the bundle's]")
@click.option(
    "--delta-strength", "strength", type=float, metavar="X", default=1.0, show_default=True,
    help="Strength of the deltas while ranges are observed.",
)  # fmt: skip
@click.option("--deltas", multiple=True, metavar="FILE", help="Deltas to calibrate with; repeat for several.")
@click.option(
    "--backend", "form", type=click.Choice(["tensorrt", "ort-cpu"]), default="tensorrt", show_default=True,
    help="What INT8 is made for: FP16 around it, or FP32 as ONNX Runtime's CPU wants it.",
)  # fmt: skip
@click.option("--cache", metavar="DIR", help="Keep recordings here, for another run with the same samples.")
@source_option
@json_option
def calibrate(
    bundle: str, precision: Any, images: str | None, prompts: str | None, samples: int, method: Any,
    percentile: float, smooth: float | None, min_psnr: float, max_wide: float, seed: int, name: str | None,
    steps: int | None, strength: float, deltas: tuple[str, ...], form: Any, cache: str | None,
    sources: dict[str, str], as_json: bool,
) -> None:  # fmt: skip
    """Add a precision variant to BUNDLE, measured in real edits with generated deltas.

    \b
    hywu calibrate out/bundle --variant int8 --images photos --prompts prompts.txt --smooth 0.8
    """
    require_toolchain()
    from hywu_calibration.job import calibrate as run
    from hywu_calibration.options import CalibrationOptions

    options = CalibrationOptions(
        precision,
        images=_path(images),
        prompts=_path(prompts),
        samples=samples,
        method=method,
        percentile=percentile,
        smooth=smooth,
        min_psnr=min_psnr,
        max_wide=max_wide,
        seed=seed,
        name=name,
        steps=steps,
        strength=strength,
        deltas=tuple(map(Path, deltas)),
        form=form,
        sources=sources,
        cache=_path(cache),
    )
    with progress_bar(time_left=True) as show:
        report = run(bundle, options, show)
    if as_json:
        print_json({**report.to_json(), "met": report.met})
    else:
        click.echo(_text(report, Path(bundle) / "variants" / options.variant))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _text(report: Report, folder: Path) -> str:
    rows = [("deltas on", report.final_image.deltas_on), ("deltas off", report.final_image.deltas_off)]
    lines = [f"{name:<11}{_quality(quality)}" for name, quality in rows if quality is not None]
    total, wide = len(report.layers), report.wide_layers
    if total:
        lines.append(f"{'layers':<11}{total - wide} of {total} in {report.precision}, {wide} wider")
    size = report.size
    lines.append(f"{'size':<11}{size_text(size.variant_bytes)}, FP32 {size_text(size.fp32_bytes)}")
    if report.samples.skipped:
        lines.append(
            f"{'skipped':<11}{plural(len(report.samples.skipped), 'photograph')} that cannot be read"
        )
    if report.precision.startswith("int8") and report.wide:
        graphs: dict[tuple[str, str], list[str]] = {}
        for one in report.wide:
            graphs.setdefault((one.name, one.reason), []).append(one.graph)
        shown = [(name, ", ".join(where), reason) for (name, reason), where in graphs.items()]
        more = len(shown) - SHOWN_WIDE
        lines += ["", "kept wide:", table(shown[:SHOWN_WIDE]), *([f"  and {more} more"] if more > 0 else [])]
    if report.met is False and report.target is not None:
        lines.append(f"\nNot reached: --min-psnr {report.target.min_psnr_db:g} for every edit.")
    return "\n".join([*lines, "", f"{folder / 'report.html'}"])


def _quality(quality: Quality) -> str:
    worst = f"the worst {quality.least_psnr_db:.1f} dB"
    return f"PSNR {quality.psnr_db:.1f} dB to FP32, mean of {plural(len(quality.edits), 'edit')}, {worst}"
