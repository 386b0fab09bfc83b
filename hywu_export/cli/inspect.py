"""``hywu inspect``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from hywu_export.cli.common import (
    Command,
    json_option,
    plural,
    print_json,
    printable,
    size_text,
    source_option,
    table,
)
from hywu_runtime.codec import encode

if TYPE_CHECKING:
    from hywu_runtime.manifest import Axis, Guidance, Manifest, Term


@click.command(cls=Command)
@click.argument("bundle")
@click.option("--verify", is_flag=True, help="Compare the SHA-256 of every file.")
@source_option
@json_option
def inspect(bundle: str, verify: bool, sources: dict[str, str], as_json: bool) -> None:
    """Show what is in BUNDLE, and check that it is whole."""
    from hywu_runtime import Bundle

    opened = Bundle.open(bundle, verify, sources, links=bool(sources))
    summary = summarize(opened.manifest)
    if verify:
        summary["verified_files"] = len(opened.manifest.files)
    if as_json:
        print_json(summary)
    else:
        click.echo(_text(summary, opened.manifest))


def summarize(manifest: Manifest) -> dict[str, Any]:
    """What a bundle holds, as plain values; lengths in bytes."""
    phases: dict[str, list[str]] = {name: [] for name in manifest.graphs}
    for call in manifest.program:
        if call.phase not in phases[call.graph]:
            phases[call.graph].append(call.phase)
    deltas, schedules = manifest.deltas, manifest.schedules

    def size(folder: str) -> int:
        return sum(file.size for path, file in manifest.files.items() if path.startswith(folder))

    return {
        "name": manifest.name,
        "format": manifest.format,
        "family": manifest.family,
        "producer": f"{manifest.producer.name} {manifest.producer.version}",
        "bytes": sum(file.size for file in manifest.files.values()),
        "files": {name: file.size for name, file in manifest.files.items()},
        "graphs": {
            name: {
                "phases": phases[name],
                "inputs": len(graph.inputs),
                "outputs": len(graph.outputs),
                "file": graph.file,
                "bytes": manifest.files[graph.file].size,
            }
            for name, graph in manifest.graphs.items()
        },
        "axes": {name: _axis(axis) for name, axis in manifest.axes.items()},
        "results": {
            "image": manifest.results.image,
            "deltas": len(manifest.results.deltas),
            "outputs": list(manifest.results.outputs),
        },
        "inputs": {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape)}
            for name, tensor in manifest.tensors.items()
            if tensor.source == "input"
        },
        "image": None
        if manifest.image is None
        else {
            "multiple": manifest.image.multiple,
            "min": manifest.image.min,
            "max": manifest.image.max,
            "default_area": manifest.image.default_area,
        },
        "guidance": {scale.name: scale.default for scale in manifest.guidance},
        "schedulers": {}
        if schedules is None
        else {
            name: {
                "class": sampler.class_name,
                "steps": list(sampler.steps),
                "stochastic": sampler.stochastic,
                "midway": sampler.order is not None,
            }
            for name, sampler in schedules.samplers.items()
        },
        "default_scheduler": None if schedules is None else schedules.default,
        "default_steps": None if schedules is None else schedules.default_steps,
        "default_strength": schedules.strength.default if schedules and schedules.strength else None,
        "deltas": None
        if deltas is None
        else {
            "targets": len(deltas.targets),
            "rank": deltas.rank,
            "kinds": dict(Counter(target.kind for target in deltas.targets)),
            "numbers": sum(math.prod(shape) for shape in deltas.tensors.values()),
        },
        "tokenizers": {
            name: {"max_length": t.max_length, "file": t.file} for name, t in manifest.tokenizers.items()
        },
        "sources": {
            name: {"name": source.name, "licence": source.licence, "linked_files": list(source.files)}
            for name, source in manifest.sources.items()
        },
        "linked_tensors": sum(len(tensors) for tensors in manifest.linked.values()),
        "licences": [{"of": one.of, "licence": one.licence, "file": one.file} for one in manifest.licences],
        "variants": {
            name: {
                "precision": variant.precision,
                "graphs": list(variant.graphs),
                "bytes": size(f"variants/{name}/"),
            }
            for name, variant in manifest.variants.items()
        },
        "engines": {
            key: {
                "backend": engine.backend,
                "version": engine.version,
                "compute_capabilities": list(engine.compute_capabilities),
                "device": engine.device,
                "variant": engine.variant,
                "shapes": {axis: list(sizes) for axis, sizes in engine.shapes.items()},
                "graphs": list(engine.graphs),
                "bytes": size(f"engines/{key}/"),
                "stale": manifest.stale(key),
            }
            for key, engine in manifest.engines.items()
        },
    }


def _axis(axis: Axis) -> dict[str, Any]:
    if axis.of is not None:
        return {"of": axis.of, "divide": axis.divide}
    if axis.sum:
        return {"sum": encode(axis.sum)}
    return {"min": axis.min, "max": axis.max, "multiple": axis.multiple, "one_or": axis.one_or}


def _text(summary: dict[str, Any], manifest: Manifest) -> str:
    size, files = size_text(summary["bytes"]), plural(len(manifest.files), "file")
    lines = [
        printable(f"{summary['name']}: {summary['family'] or _kind(summary)}"),
        printable(f"format {summary['format']}, {summary['producer']}, {files}, {size}"),
    ]
    if "verified_files" in summary:
        lines.append(f"the hashes of all {plural(summary['verified_files'], 'file')} are right")

    def section(title: str, rows: list[tuple[object, ...]], header: tuple[str, ...] = ()) -> None:
        if rows:
            lines.extend(["", title, table(rows, header)])

    section(
        "graphs",
        [
            (name, ", ".join(graph["phases"]), graph["inputs"], graph["outputs"], size_text(graph["bytes"]))
            for name, graph in summary["graphs"].items()
        ],
        ("name", "phase", "inputs", "outputs", "size"),
    )
    others = {name: size for name, size in summary["files"].items() if not name.endswith(".onnx")}
    section("other files", [(name, size_text(size)) for name, size in others.items()])
    tensors: list[tuple[object, ...]]
    tensors = [("input", name, t["dtype"], _shape_text(t["shape"])) for name, t in summary["inputs"].items()]
    made = [manifest.signatures[name] for name in manifest.results.outputs]
    tensors += [("output", value.name, value.dtype, _shape_text(value.shape)) for value in made]
    section("tensors", tensors)
    section("axes", [(name, _axis_text(axis)) for name, axis in manifest.axes.items()])
    section(
        "schedulers",
        [
            (name, s["class"], f"{s['steps'][0]} to {s['steps'][1]} steps", _notes(name, s, summary))
            for name, s in summary["schedulers"].items()
        ],
    )
    section(
        "guidance",
        [
            (
                g.name,
                f"default {g.default:g}",
                _condition(g),
            )
            for g in manifest.guidance
        ],
    )
    section("deltas", _delta_rows(summary))
    section(
        "tokenizers",
        [(name, f"{t['max_length']} tokens", t["file"]) for name, t in summary["tokenizers"].items()],
    )
    section(
        "sources",
        [
            (
                name,
                s["name"],
                f"licence {s['licence'] or 'not stated'}",
                "linked" if s["linked_files"] else "copied",
            )
            for name, s in summary["sources"].items()
        ],
    )
    section(
        "variants",
        [
            (name, v["precision"], plural(len(v["graphs"]), "graph"), size_text(v["bytes"]))
            for name, v in summary["variants"].items()
        ]
        or [("none",)],
    )
    section(
        "engines",
        [
            (
                key,
                plural(len(e["graphs"]), "graph"),
                size_text(e["bytes"]),
                "" if e["stale"] is None else f"stale: {e['stale']} has changed",
            )
            for key, e in summary["engines"].items()
        ]
        or [("none",)],
    )
    return "\n".join(lines)


def _condition(scale: Guidance) -> str:
    """When a scale asks for guidance, for people."""
    if scale.above is not None:
        return f"on above {scale.above:g}"
    return f"on from {scale.at_least:g}" if scale.at_least is not None else "an input of the model"


def _kind(summary: dict[str, Any]) -> str:
    return "a traced module" if summary["results"]["outputs"] else "a generator alone"


def _shape_text(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _delta_rows(summary: dict[str, Any]) -> list[tuple[object, ...]]:
    deltas, made = summary["deltas"], summary["results"]["deltas"]
    generated: tuple[object, ...] = (
        "generated",
        f"{made} tensors" if made else "no: given with each request",
    )
    if deltas is None:
        return [generated] if made else []
    kinds = ", ".join(f"{count} {kind}" for kind, count in deltas["kinds"].items())
    return [
        ("targets", f"{deltas['targets']} ({kinds})"),
        ("rank", f"{deltas['rank']}"),
        ("numbers", f"{deltas['numbers']:,} for a sample"),
        generated,
    ]


def _axis_text(axis: Axis) -> str:
    if axis.of is not None:
        return f"{axis.of} / {axis.divide}"
    if axis.sum:
        return " + ".join(map(_term_text, axis.sum))
    limits = f"{axis.min} to {axis.max}"
    if axis.multiple != 1:
        limits += f" in steps of {axis.multiple}"
    return f"1 or {axis.one_or}" if axis.one_or is not None else limits


def _term_text(term: Term) -> str:
    factors = [str(term.times)] if term.times != 1 or not term.of else []
    return " · ".join([*factors, *term.of]) + (f" / {term.divide}" if term.divide != 1 else "")


def _notes(name: str, sampler: dict[str, Any], summary: dict[str, Any]) -> str:
    notes = ["draws noise in every step"] if sampler["stochastic"] else []
    if name == summary["default_scheduler"]:
        strength = summary["default_strength"]
        midway = "" if strength is None else f" and a strength of {strength:g}"
        notes.insert(0, f"default, with {plural(summary['default_steps'], 'step')}{midway}")
    if summary["default_strength"] is not None and not sampler["midway"]:
        notes.append("starts from noise alone")
    return "; ".join(notes)
