"""``hywu plan``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import Command, check_output, plural, printable, table
from hywu_runtime.errors import InputError

if TYPE_CHECKING:
    from hywu_export.planning.devices import Device

_WIDTH = 30
"""Characters of the longest bar."""
_NAMES = {
    "caches": "caches and embeddings between graphs",
    "deltas": "deltas",
    "states": "states of the steps, twice",
    "other": "photos, noise and other inputs",
    "left for other things": "left for the system and libraries",
}
_FITS = {"at once": "fits at once", "low_memory": "fits with --low-memory", "no": "does not fit"}


@click.command(cls=Command, short_help="What a device could do at best, and what fits, without it.")
@click.argument("bundle", required=False)
@click.option("--device", "device_name", metavar="NAME", help="A device of the table; see --devices.")
@click.option("--devices", "list_devices", is_flag=True, help="List the devices, with sources, and stop.")
@click.option(
    "--variant", metavar="NAME",
    help="Of the bundle; or fp16, bf16, int8, int8-weights, as it might become.",
)  # fmt: skip
@click.option("--size", metavar="WxH", help="Size of the picture.  [default: the bundle's]")
@click.option("--batch", type=int, metavar="N", default=1, show_default=True, help="Photos in one edit.")
@click.option("--steps", type=int, metavar="N", help="Steps of the scheduler.  [default: the bundle's]")
@click.option("--rank", type=int, metavar="N", help="Rank of the deltas.  [default: the bundle's]")
@click.option(
    "--axis", "axes", metavar="NAME=N", multiple=True, help="Size of another axis of the bundle; repeat."
)
@click.option("--margin", type=float, metavar="GB", help="Memory to leave for other things.")
@click.option("--measured", metavar="FILE", help="Compare with what `hywu bench --json` wrote.")
@click.option("--json", "json_file", metavar="FILE", help="Write everything; - prints it.")
def plan(
    bundle: str | None, device_name: str | None, list_devices: bool, variant: str | None, size: str | None,
    batch: int, steps: int | None, rank: int | None, axes: tuple[str, ...], margin: float | None,
    measured: str | None, json_file: str | None,
) -> None:  # fmt: skip
    """Work out from BUNDLE's graphs alone what a device could do with it at best.

    What fits in its memory, the least time of each stage (a roofline), low-rank against merged deltas. No
    GPU, no weights, no torch.

    \b
    hywu plan out/bundle --device orin-nano-8gb
    hywu plan out/bundle --device h200 --size 512x512 --measured bench.json
    """
    from hywu_export.planning.devices import devices, find_device

    if list_devices:
        click.echo(_devices(devices()))
        return
    _require_onnx()
    if bundle is None or device_name is None:
        raise InputError(
            "There is no bundle to plan for" if bundle is None else "There is no device to plan for",
            "Expected hywu plan BUNDLE --device NAME",
            f"Name a device: {', '.join(devices())}",
        )
    device = find_device(device_name)
    if margin is not None and not 0 <= margin < 1e6:
        raise InputError(f"The margin is {margin} GB", "Expected 0 or more", "Correct --margin")

    import json

    from hywu_export.benchmark import files
    from hywu_export.planning import report
    from hywu_export.planning.case import Options
    from hywu_runtime import Bundle

    if json_file is not None and json_file != "-":
        check_output(Path(json_file), Path(bundle), *([Path(measured)] if measured is not None else []))
    earlier = files.read(measured) if measured is not None else None
    result = report.plan(
        Bundle.open(bundle, links=False), device, variant,
        Options(size, batch, steps, rank, _axes(axes)),
        None if margin is None else margin * 1e9, earlier,
    )  # fmt: skip
    if json_file == "-":
        click.echo(json.dumps(result, indent=1, allow_nan=False))
        return
    if json_file is not None:
        files.write(json_file, result)
    click.echo(_text(result))


def _require_onnx() -> None:
    from importlib import import_module

    from hywu_runtime.errors import UnsupportedError

    try:
        import_module("onnx")
    except ImportError as error:
        raise UnsupportedError(
            f"The package onnx cannot be imported ({error})",
            "Expected it, to follow shapes through a bundle's graphs",
            "pip install onnx",
        ) from error


def _axes(texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, size = text.partition("=")
        if not (name and equals and size.isdecimal()) or name in found:
            raise InputError(f"--axis {text!r} is not understood", "Expected NAME=N, each once", "Correct it")
        found[name] = size
    return found


def _text(result: Mapping[str, Any]) -> str:
    parts = [
        _headline(result),
        _memory(result),
        _stages(result),
        _variants(result),
        _deltas(result),
        _measured(result),
        "\n".join(_notes(result)),
    ]
    return "\n\n".join(part for part in parts if part)


def _headline(result: Mapping[str, Any]) -> str:
    request = result["request"]
    facts = []
    if request["size"] is not None:
        facts.append(f"{request['size'][0]}x{request['size'][1]}")
    facts.append(f"batch {request['batch']}")
    facts += [f"{name} {size}" for name, size in request["other_axes"].items()]
    if request["evaluations"] > 1 or "step" in result["stages"]:
        facts.append(plural(request["evaluations"], "evaluation") + (", guided" if request["guided"] else ""))
    if request["rank"] is not None:
        facts.append(f"deltas of rank {request['rank']}")
    variant = result["variant"] or "as exported"
    facts.append(f"as if made {variant}" if result["as_if"] else variant)
    return (
        printable(f"{result['bundle']} on {result['device']['name']}")
        + "\n"
        + "\n".join(_wrapped(printable(", ".join(facts))))
    )


def _memory(result: Mapping[str, Any]) -> str:
    memory = result["memory"]
    whole, low, there = (_bytes(memory[key]) for key in ("all_at_once", "low_memory", "device"))
    verdict = {
        "at once": f"all graphs fit at once, {whole} of {there} ({low} with --low-memory)",
        "low_memory": f"fits with --low-memory alone, {low} of {there} ({whole} at once)",
        "no": f"does not fit in {there}: {whole} at once, {low} with --low-memory",
    }
    lines = [f"memory: {verdict[memory['fits']]}"]
    parts = [part for part in memory["parts"] if part["bytes"]]
    most = max(part["bytes"] for part in parts)
    rows: list[tuple[str, ...]] = [
        (
            _NAMES.get(part["what"], part["what"]),
            _bytes(part["bytes"]).rjust(9),
            "█" * max(1, round(_WIDTH * part["bytes"] / most)),
        )
        for part in parts
    ]
    lines.append(table(rows))
    saved = memory["activations"] - memory["activations_fused"]
    if saved > 0.05 * memory["activations"]:
        fused = _bytes(memory["activations_fused"])
        better = memory["fits_fused"] != memory["fits"]
        so = f", and it {_FITS[memory['fits_fused']]}" if better else " instead"
        lines.append(f"  Where a backend fuses attention, activations take {fused}{so}.")
    if result["cuts"]:
        header = ("stage", "graphs", "weights".rjust(9), "activations".rjust(11))
        rows = [
            (str(cut["stage"]), plural(len(cut["graphs"]), "graph"), _bytes(cut["weights"]).rjust(9),
             _bytes(cut["activations"]).rjust(11))
            for cut in result["cuts"]
        ]  # fmt: skip
        lines += ["", "stages, each on a device of its own", table(rows, header)]
    return "\n".join(lines)


def _stages(result: Mapping[str, Any]) -> str:
    header = ("stage", "runs".rjust(5), "each".rjust(9), "together".rjust(9), "FLOP".rjust(8),
              "moved".rjust(9), "bound by".ljust(14), "unfused".rjust(9))  # fmt: skip

    def row(name: str, stage: Mapping[str, Any], runs: str, each: str, together: float) -> tuple[str, ...]:
        return (
            name, runs.rjust(5), each.rjust(9), _time(together).rjust(9), _count(stage["flops"]).rjust(8),
            _bytes(stage["bytes"]).rjust(9), _bound(stage).ljust(14), _time(stage["unfused"]).rjust(9),
        )  # fmt: skip

    rows = [
        row(name, stage, str(stage["runs"]), _time(stage["seconds"]), stage["seconds"] * stage["runs"])
        for name, stage in result["stages"].items()
    ]
    rows.append(row(_whole(result), result["edit"], "", "", result["edit"]["seconds"]))
    return "least times\n" + table(rows, header)


def _whole(result: Mapping[str, Any]) -> str:
    return "all" if result["request"]["size"] is None else "edit"


def _variants(result: Mapping[str, Any]) -> str:
    header = ("variant", "", "stored".rjust(9), "at once".rjust(9), "low memory".rjust(10), "fits".ljust(10),
              "step".rjust(9), _whole(result).rjust(9))  # fmt: skip
    rows = []
    for entry in result["variants"]:
        step = entry["stages"].get("step")
        rows.append(
            (
                entry["variant"] or "as exported", "if made" if entry["as_if"] else "",
                _bytes(entry["stored"]).rjust(9), _bytes(entry["all_at_once"]).rjust(9),
                _bytes(entry["low_memory"]).rjust(10), entry["fits"].replace("_", " ").ljust(10),
                ("" if step is None else _time(step)).rjust(9), _time(entry["edit"]).rjust(9),
            )
        )  # fmt: skip
    return "variants\n" + table(rows, header)


def _deltas(result: Mapping[str, Any]) -> str:
    d = result["deltas"]
    if d is None:
        return ""
    header = ("", f"low rank, each {d['stage']}".rjust(28), "merged, once for new deltas".rjust(28))
    given = sum(part["bytes"] for part in result["memory"]["parts"] if part["what"] == "deltas")
    rows = [
        ("FLOP", f"{_count(d['branch_flops'])} ({d['share_flops']:.1%} of it)", _count(d["merge_flops"])),
        ("moved", _bytes(d["branch_bytes"]), _bytes(d["merge_bytes"])),
        ("time", f"{_time(d['branch_seconds'])} ({d['share_seconds']:.1%} of it)", _time(d["merge_seconds"])),
        ("memory", _bytes(given), f"{_bytes(d['merged_memory'])} for W'"),
        (f"whole {d['stage']}", _time(d["step"]), _time(d["merged_step"])),
    ]
    steps, tokens = d["crossover_steps"], d["crossover_token_steps"]
    pays = "never pays" if steps is None else f"pays from {plural(steps, d['stage'])}"
    advice = (
        f"  Merging {pays} by these times; by FLOP alone from {tokens:,} tokens x {d['stage']}s, of which"
    )
    advice += f"\n  a {d['stage']} has {d['tokens']:,} (in the layer with the most)."
    title = f"deltas of {plural(d['targets'], 'target')}, rank {d['rank']}, {plural(d['sets'], 'set')}"
    shown = table([(name, low.rjust(28), merged.rjust(28)) for name, low, merged in rows], header)
    return "\n".join([printable(title), shown, advice])


def _measured(result: Mapping[str, Any]) -> str:
    beside = result.get("measured")
    if beside is None:
        return ""
    rows = [
        (
            name, _time(pair["planned"]).rjust(9), _time(pair["measured"]).rjust(9),
            f"{pair['ratio']:.2f}".rjust(16),
        )
        for name, pair in beside["stages"].items()
    ]  # fmt: skip
    where = ", ".join(str(part) for part in (beside["backend"], beside["machine"]) if part)
    header = ("stage", "least".rjust(9), "measured".rjust(9), "measured / least")
    return f"measured on {printable(where)}, p50\n" + table(rows, header)


def _notes(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "Least times are lower bounds: products at dense peak or full bandwidth, all else fused into them,",
        'operands from memory (a cache may save some of that). "unfused": every node on its own.',
    ]
    if any(entry["as_if"] for entry in result["variants"]):
        lines.append(
            'A variant "if made" has nothing left wide; `hywu calibrate` makes it and finds what must.'
        )
    device = result["device"]
    if device["unconfirmed"]:
        lines.append(f"Derived, or not confirmed, for this device: {', '.join(device['unconfirmed'])}.")
    return lines


def _devices(table_: Mapping[str, Device]) -> str:
    precisions = ("float32", "tf32", "float16", "bfloat16", "int8", "fp8")
    header = ("device", "memory".rjust(7), "GB/s".rjust(6), *(p.rjust(8) for p in precisions))
    rows = []
    for device in table_.values():
        peaks = []
        for name in precisions:
            peak = device.peak.get(name)
            mark = "?" if name in device.unconfirmed else ""
            peaks.append(("" if peak is None else f"{peak / 1e12:.4g}{mark}").rjust(8))
        speed = f"{device.bandwidth / 1e9:g}" + ("?" if "bandwidth" in device.unconfirmed else "")
        rows.append((device.key, f"{device.memory / 1e9:g} GB".rjust(7), speed.rjust(6), *peaks))
    lines = [table(rows, header), "", "Dense peaks in TFLOPS (INT8: TOPS). ?: derived, or not confirmed."]
    for device in table_.values():
        lines += ["", f"{device.key}: {device.name}, compute capability {device.compute_capability}"]
        lines += [f"  {line}" for line in _wrapped(f"{device.source}. {device.note}")]
        lines.append(f"  {device.url}")
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text.strip(), 96)


def _bound(stage: Mapping[str, Any]) -> str:
    if not stage["seconds"]:
        return "nothing"
    share = stage["compute_share"]
    return f"{stage['bound']} {max(share, 1 - share):.0%}"


def _time(seconds: float) -> str:
    from hywu_export.benchmark.plots import milliseconds

    return milliseconds(seconds)


def _bytes(size: float) -> str:
    """Three figures: ``3.44 GB``; `size_text` has fewer."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _count(number: float) -> str:
    for unit in ("", " k", " M", " G", " T"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} P"
