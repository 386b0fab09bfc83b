"""``hywu build``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import (
    Command,
    check_output,
    json_option,
    plural,
    print_json,
    progress_bar,
    size_text,
    source_option,
    table,
    time_text,
)
from hywu_runtime.errors import InputError

if TYPE_CHECKING:
    from hywu_export.engines import BuildOptions, Built

_ONLY_TENSORRT = "TensorRT only"


def _parse_axes(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    axes: dict[str, str] = {}
    for value in values:
        name, equals, sizes = value.partition("=")
        if not (name and equals and sizes) or name in axes:
            raise InputError(
                f"--axis {value!r} is not understood",
                "Expected NAME=MIN:BEST:MAX, each name once",
                "Correct it",
            )
        axes[name] = sizes
    return axes


@click.command(cls=Command, short_help="Compile BUNDLE with TensorRT or TensorRT-RTX.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    default="tensorrt-rtx",
    show_default=True,
    help="TensorRT-RTX builds for GeForce and RTX GPUs, on any machine; TensorRT for the GPU of this one.",
)
@click.option("--variant", metavar="NAME", help="The precision.  [default: the bundle's own graphs, FP32]")
@click.option(
    "--compute-capability",
    "capabilities",
    metavar="CC,CC",
    help="GPUs to build for, TensorRT-RTX only.  [default: 80,86,89,120]",
)
@click.option(
    "--shapes",
    metavar="WxH[:WxH:WxH]",
    help="Sizes of pictures: one, or smallest, best and largest.  [default: around the bundle's own]",
)
@click.option("--batch", metavar="N[:N:N]", help="Photos in a batch.  [default: 1:1:4]")
@click.option("--delta-batch", metavar="N[:N:N]", help="Sets of deltas in a batch.  [default: as --batch]")
@click.option(
    "--axis",
    "axes",
    metavar="NAME=N[:N:N]",
    multiple=True,
    callback=_parse_axes,
    help="Sizes of any other axis; repeat for more.",
)
@click.option(
    "--graph", "graphs", metavar="NAME", multiple=True, help="Build this graph alone; repeat for more."
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    metavar="0-5",
    help="How long to look for faster kernels.",
)
@click.option(
    "--workspace",
    type=click.IntRange(1, 1 << 20),
    metavar="MIB",
    help="Most memory for intermediate results.",
)
@click.option("--weight-streaming", is_flag=True, help="Weights may stay in host memory.")
@click.option(
    "--version-compatible", is_flag=True, help=f"Later versions load the engine.  [{_ONLY_TENSORRT}]"
)
@click.option(
    "--hardware-compatible",
    type=click.Choice(["ampere+", "same"]),
    help=f"GPUs of 8.0 and later, or all of the same capability, load the engine.  [{_ONLY_TENSORRT}]",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"Keep what was measured for the next build.  [{_ONLY_TENSORRT}]",
)
@source_option
@click.option(
    "--log",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write the builder's log here, whatever happens.",
)
@click.option("--rebuild", is_flag=True, help="Build even if the engine is there already.")
@click.option(
    "--emit-script",
    "script",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Build nothing: write a shell script with the commands for another device.",
)
@click.option(
    "--import",
    "plans",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Build nothing: add the plans that such a script left in DIR.",
)
@json_option
def build(
    bundle: Path, backend: Any, variant: str | None, capabilities: str | None, shapes: str | None,
    batch: str | None, delta_batch: str | None, axes: dict[str, str], graphs: tuple[str, ...],
    optimization_level: int | None, workspace: int | None, weight_streaming: bool,
    version_compatible: bool, hardware_compatible: Any, timing_cache: Path | None, sources: dict[str, str],
    log: Path | None, rebuild: bool, script: Path | None, plans: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compile a bundle's graphs for a GPU and add the engine to the bundle.

    TensorRT-RTX builds ahead of time on any machine; TensorRT on the machine with the GPU, or there by a
    script.

    \b
    hywu build bundle --variant fp16 --compute-capability 86,89,120
    hywu build bundle --variant int8 --shapes 256x256:512x512:768x768 --batch 1:1:4
    hywu build bundle --backend tensorrt --variant fp16 --timing-cache timing.cache
    hywu build bundle --backend tensorrt --variant fp16 --emit-script build-on-jetson.sh
    hywu build bundle --import plans
    """
    from hywu_export.engines import BuildOptions, import_plans, write_script
    from hywu_export.engines import build as build_engine
    from hywu_export.engines.devices import parse_capabilities
    from hywu_export.engines.shapes import ShapeOptions
    from hywu_export.engines.tensorrt import Settings

    start = time.perf_counter()
    if script is not None and plans is not None:
        raise InputError(
            "--emit-script and --import exclude each other",
            "A script is written before plans are made, plans are imported after",
            "Leave one out",
        )
    if plans is not None:
        _show(import_plans(bundle, plans), time.perf_counter() - start, as_json)
        return
    options = BuildOptions(
        backend=backend,
        compute_capabilities=parse_capabilities(capabilities) if capabilities is not None else (),
        variant=variant,
        shapes=ShapeOptions(shapes, batch, delta_batch, axes),
        graphs=graphs,
        settings=Settings(
            optimization_level=optimization_level,
            workspace=workspace,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            weight_streaming=weight_streaming,
        ),
        timing_cache=timing_cache,
        sources=sources,
        log=log,
        rebuild=rebuild,
    )
    for output in (script, log, timing_cache):
        if output is not None:
            check_output(output)
    if script is not None:
        write_script(script, bundle, options)
        _show_script(script, options, as_json)
        return
    with progress_bar() as show:
        built = build_engine(bundle, options, show)
    _show(built, time.perf_counter() - start, as_json)


def _show_script(script: Path, options: BuildOptions, as_json: bool) -> None:
    if as_json:
        print_json({"script": str(script), "backend": options.backend})
        return
    click.echo(
        f"Wrote {script}. On the device: sh {script.name} BUNDLE OUT. Then: hywu build BUNDLE --import OUT"
    )


def _show(built: Built, seconds: float, as_json: bool) -> None:
    from hywu_export.engines.report import summary_rows

    report, engine = built.report, built.manifest.engines[built.key]
    if as_json:
        print_json({"key": built.key, "reused": built.reused, "seconds": seconds, "report": report})
        return
    graphs = report["graphs"]
    size = sum(graph["plan_bytes"] for graph in graphs.values())
    device = f"{engine.device}, " if engine.device is not None else ""
    rows = [
        ("engine", built.key + (" (was there already)" if built.reused else "")),
        ("for", f"{device}compute capability {', '.join(engine.compute_capabilities)}"),
        ("by", f"{engine.backend} {engine.version}"),
        ("variant", engine.variant or "none: the bundle's own graphs"),
        ("sizes", "; ".join(_range_text(name, sizes) for name, sizes in engine.shapes.items())),
        ("size", f"{size_text(size)}, {plural(len(graphs), 'graph')}"),
        ("time", time_text(seconds)),
    ]  # fmt: skip
    click.echo(table(rows, indent=0))
    times = [
        (
            size_text(graph["plan_bytes"]),
            time_text(graph["seconds"]) if "seconds" in graph else "–",
            size_text(graph["peak_bytes"]) if "peak_bytes" in graph else "–",
        )
        for graph in graphs.values()
    ]
    header = ("graph", "layers", "matrix products", "deltas", "size", "time", "memory")
    click.echo()
    click.echo(table([(*row, *more) for row, more in zip(summary_rows(graphs), times)], header))


def _range_text(name: str, sizes: Sequence[int]) -> str:
    low, best, high = sizes
    return f"{name} {low}" if low == high else f"{name} {low} to {high}, best {best}"
