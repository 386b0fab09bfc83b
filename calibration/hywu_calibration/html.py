"""``report.html`` of a variant: one file, without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hywu_calibration.plots import Dot, bars, layers, strip
from hywu_calibration.report import Edit, Quality, Report, Wide, bounded_db

Pixels = npt.NDArray[np.uint8]
STYLE = Path(__file__).with_name("report.css")
SHOWN_EDITS = 6
SHOWN_LAYERS = 12
SIDE = 320  # pixels of the longer side of a picture that is shown

_NAMES = {"fp16": "FP16", "bf16": "BF16", "int8": "INT8", "int8-weights": "INT8 weights", "fp32": "FP32"}
_HEAT = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
"""Colours of a difference map, from none to the largest."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of one edit with deltas on (off, for a bundle without deltas), uint8 ``[H, W, 3]``."""

    edit: Edit
    reference: Pixels
    variant: Pixels


def render(report: Report, pictures: Sequence[Pictures] = ()) -> str:
    """The page. Equal arguments give equal text; ``pictures`` may be more than are shown."""
    sections = [
        _head(report),
        _quality(report),
        _grid(pictures),
        _layers(report),
        _wide(report),
        _size(report),
        _made(report),
    ]
    title = f"Variant {escape(report.variant)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE.read_text()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    on, off = report.final_image.deltas_on, report.final_image.deltas_off
    tiles = [_quality_tile("Deltas on", on)] if on is not None else []
    tiles.append(_quality_tile("Deltas off", off))
    layers_in_all, wide = len(report.layers), report.wide_layers
    if layers_in_all:
        share = f"{wide} kept wide ({wide / layers_in_all:.1%})" if wide else "none kept wide"
        name = _NAMES[report.precision].replace("INT8 weights", "INT8")
        tiles.append(_tile(f"Layers in {name}", f"{layers_in_all - wide}", f"of {layers_in_all}; {share}"))
    size = report.size
    if size.fp32_bytes:
        ratio = f"{size.variant_bytes / size.fp32_bytes:.2f}<small> ×</small>"
        tiles.append(
            _tile("Size", ratio, f"{_mebibytes(size.variant_bytes)}, FP32 {_mebibytes(size.fp32_bytes)}")
        )
    return (
        f"<header><h1>Variant {escape(report.variant)}</h1><p>{_summary(report)}</p></header>\n"
        f'<div class="tiles">{"".join(tiles)}</div>{_verdict(report)}'
    )


def _summary(report: Report) -> str:
    parts = [_NAMES[report.precision], f"{report.samples.count} calibration edits", f"seed {report.seed}"]
    if report.method:
        parts.insert(1, f"thresholds: {report.method}")
    if report.smooth is not None:
        parts.insert(2, f"smoothing {report.smooth:g}")
    return escape(" · ".join(parts))


def _quality_tile(label: str, quality: Quality) -> str:
    detail = f"mean of {len(quality.edits)} edits; worst {quality.least_psnr_db:.1f} dB"
    return _tile(f"{label}: PSNR to FP32", f"{quality.psnr_db:.1f}<small> dB</small>", detail)


def _tile(label: str, value: str, detail: str) -> str:
    return f'<div class="tile"><p>{escape(label)}</p><b>{value}</b><p>{escape(detail)}</p></div>'


def _verdict(report: Report) -> str:
    if report.target is None or report.met is None:
        return ""
    share = f"with at most {report.target.max_wide:.0%} of the layers kept wide"
    asked = f"Asked for: every edit at {report.target.min_psnr_db:g} dB or more, {share}."
    word, kind = ("Met.", "met") if report.met else ("Missed.", "missed")
    return f'<p class="verdict {kind}"><b>{word}</b> {escape(asked)}</p>'


def _quality(report: Report) -> str:
    image = report.final_image
    rows = [("deltas on", image.deltas_on), ("deltas off", image.deltas_off)]
    dots = {
        name: [Dot(e.psnr_db, f"{e.photo}, “{e.prompt}”: {e.psnr_db:.1f} dB") for e in quality.edits]
        for name, quality in rows
        if quality is not None
    }
    target = None if report.target is None else report.target.min_psnr_db
    how = (
        "the variant’s own graphs ran on ONNX Runtime."
        if image.measured == "runtime"
        else "emulated: FP32 graphs on ONNX Runtime in which the result of every narrow node is rounded, as "
        "ONNX Runtime’s CPU does not compute in that type."
    )
    means = {name: quality.psnr_db for name, quality in rows if quality is not None}
    return _section(
        "Edited pictures against FP32",
        f"PSNR of the final 8-bit picture, one dot for each edit; the bar is the mean. Measured: {how}",
        strip(dots, means, target),
    )


def _grid(pictures: Sequence[Pictures]) -> str:
    if not pictures:
        return ""
    shown = _choose(pictures)
    differences = [_difference(p) for p in shown]
    top = max(float(np.quantile(d, 0.999)) for d in differences)
    levels = next((level for level in (1, 2, 4, 8, 16, 32, 64, 128) if level >= top), 255)
    cells = ['<p class="column">FP32</p><p class="column">Variant</p><p class="column">Difference</p>']
    for one, difference in zip(shown, differences):
        edit = one.edit
        heat = np.minimum(difference * (255 / levels), 255).astype(np.uint8)
        sources = (_png(one.reference), _png(one.variant), _png(heat, palette=True))
        labels = ("FP32", "variant", "difference")
        cells += [
            f'<img src="{source}" alt="{escape(edit.photo)}, {escape(edit.prompt)}: {label}">'
            for source, label in zip(sources, labels)
        ]
        numbers = f"{edit.psnr_db:.1f} dB, largest difference {edit.largest_difference}"
        text = f"<b>{escape(edit.prompt or '(no instruction)')}</b> {escape(edit.photo)} · {numbers}"
        cells.append(f'<p class="caption">{text}</p>')
    stops = ", ".join(f"rgb{color}" for color in _HEAT)
    plural = "level" if levels == 1 else "levels"
    scale = (
        f'<p class="scale">0 <i style="background:linear-gradient(90deg, {stops})"></i> '
        f"{levels} {plural} of 255, and more</p>"
    )
    which = (
        "The edit that differs most, first" if len(pictures) > len(shown) else "All edits, the worst first"
    )
    text = f"{which}. The difference is the largest of the three channels, amplified {255 / levels:.0f} ×."
    return _section("Pictures", text, scale + f'<div class="grid">{"".join(cells)}</div>')


def _choose(pictures: Sequence[Pictures]) -> list[Pictures]:
    """The worst edits, a photograph or instruction that was not shown yet before one that was."""
    left = sorted(pictures, key=lambda p: (p.edit.psnr_db, p.edit.photo, p.edit.prompt))
    chosen: list[Pictures] = []
    while left and len(chosen) < SHOWN_EDITS:
        photos, prompts = {p.edit.photo for p in chosen}, {p.edit.prompt for p in chosen}
        best = min(left, key=lambda p: (p.edit.photo in photos) + (p.edit.prompt in prompts))
        left.remove(best)
        chosen.append(best)
    return chosen


def _difference(pictures: Pictures) -> npt.NDArray[np.int16]:
    difference = pictures.reference.astype(np.int16) - pictures.variant.astype(np.int16)
    return np.asarray(np.abs(difference).max(axis=-1), np.int16)


def _png(pixels: Pixels, palette: bool = False) -> str:
    """A picture as a data URI, no larger than ``SIDE``; with ``palette`` ``[H, W]`` in colours of heat."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    if palette:
        places, steps = np.linspace(0, 255, len(_HEAT)), np.arange(256)
        colors = [np.interp(steps, places, [color[i] for color in _HEAT]) for i in range(3)]
        picture.putpalette(np.stack(colors, 1).round().astype(np.uint8).tobytes())
    scale = SIDE / max(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST if palette else Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _layers(report: Report) -> str:
    measured = [layer for layer in report.layers if bounded_db(layer.sqnr_db) is not None]
    if not measured:
        return ""
    narrow = {"int8": "int8", "int8-weights": "int8-weights"}.get(report.precision, report.precision)
    panels: dict[str, list[Dot]] = {}
    for layer in measured:
        text = f"{layer.name} ({layer.op}, {_NAMES[layer.precision]}): {layer.sqnr_db:.1f} dB"
        value = bounded_db(layer.sqnr_db) or 0.0
        panels.setdefault(layer.graph, []).append(Dot(value, text, layer.precision != narrow))
    ordered = dict(sorted(panels.items(), key=lambda item: -len(item[1])))
    worst = sorted(measured, key=lambda layer: (layer.sqnr_db, layer.graph, layer.name))[:SHOWN_LAYERS]
    rows = "".join(
        f"<tr><td>{escape(x.name)}</td><td>{escape(x.graph)}</td><td>{x.op}</td>"
        f'<td>{_NAMES[x.precision]}</td><td class="number">{x.sqnr_db:.1f}</td></tr>'
        for x in worst
    )
    head = (
        "<tr><th>layer</th><th>graph</th><th>op</th><th>precision</th><th class='number'>SQNR, dB</th></tr>"
    )
    missing = len(report.layers) - len(measured)
    note = f" {missing} layers were not measured." if missing else ""
    legend = (
        f'<p class="legend"><i class="narrow"></i> {_NAMES[narrow]} <i class="wide"></i> kept wide</p>'
        if any(dot.hollow for dots in panels.values() for dot in dots)
        else ""
    )
    plots = "".join(layers(name, dots, ordered.values()) for name, dots in ordered.items())
    return _section(
        "Layers",
        "Signal to noise of each layer’s output against FP32, in the order of the graph: higher is better."
        + note,
        legend
        + f'<div class="panels">{plots}</div>'
        + f"<details><summary>The {len(worst)} lowest</summary><table>{head}{rows}</table></details>",
    )


def _wide(report: Report) -> str:
    if not report.wide:
        return _section("What stays wide", "Nothing.", "")
    groups: dict[str, list[Wide]] = {}
    for wide in report.wide:
        groups.setdefault(wide.reason, []).append(wide)
    what = "Layers" if report.precision.startswith("int8") else "Nodes"
    items = []
    for reason, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        names = "".join(_wide_names(members))
        count = f'<b class="number">{len(members)}</b>'
        items.append(f"<details class='reason'><summary>{count} {escape(reason)}</summary>{names}</details>")
    text = f"{what} that compute in a wider type, by reason; open a line for their names."
    return _section("What stays wide", text, "".join(items))


def _wide_names(members: Sequence[Wide]) -> Iterator[str]:
    by_graph: dict[str, list[str]] = {}
    for wide in members:
        by_graph.setdefault(wide.graph, []).append(wide.name)
    for graph, names in by_graph.items():
        listed = ", ".join(f"<code>{escape(name)}</code>" for name in names)
        yield f"<p><b>{escape(graph)}</b> {listed}</p>"


def _size(report: Report) -> str:
    if not report.size.components:
        return ""
    rows = sorted(report.size.components.items(), key=lambda item: (-item[1][0], item[0]))
    rows.append(("total", (report.size.fp32_bytes, report.size.variant_bytes)))
    widest = max(max(pair) for _, pair in rows[:-1])
    head = "<tr><th>component</th><th></th><th class='number'>FP32</th>"
    head += "<th class='number'>variant</th><th class='number'>ratio</th></tr>"
    body = "".join(
        f"<tr{' class=total' if name == 'total' else ''}><td>{escape(name)}</td>"
        f"<td>{bars(before, after, widest) if name != 'total' else ''}</td>"
        f'<td class="number">{_mebibytes(before)}</td><td class="number">{_mebibytes(after)}</td>'
        f'<td class="number">{after / before if before else 1:.2f}</td></tr>'
        for name, (before, after) in rows
    )
    text = "Weights and graphs on disk; linked weights count where they are."
    return _section("Size", text, f"<table>{head}{body}</table>")


def _made(report: Report) -> str:
    samples = report.samples
    photographs = f"{samples.photographs} photographs × {samples.prompts} instructions"
    rows = [
        ("samples", f"{samples.count} edits of {photographs}, {samples.steps} evaluations each"),
        ("seed", str(report.seed)),
        ("thresholds", report.method),
        ("smoothing", None if report.smooth is None else f"α = {report.smooth:g}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    rows += [("skipped", f"{one.file}: {one.reason}") for one in samples.skipped]
    rows += [("note", note) for note in report.notes]
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows if v is not None)
    return _section("How it was made", "", f'<table class="facts">{body}</table>')


def _section(title: str, text: str, content: str) -> str:
    paragraph = f"<p>{text}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{content}</section>"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
