"""The report of a measurement: one HTML file, without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hywu_export.benchmark.files import differences, ratios
from hywu_export.benchmark.plots import curves, heat_map, history, milliseconds, stage_bars

STYLE = Path(__file__).with_name("report.css")
_COLUMNS = ("count", "p50", "p90", "p95", "p99", "mean")


def render(result: Mapping[str, Any], others: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> str:
    """The page; equal arguments give equal text. ``others``: earlier measurements by name, oldest first."""
    title = f"{result['bundle']}: {result['backend']}"
    sections = [
        _head(result),
        _stages(result),
        _curves(result),
        _sweep(result),
        _history(result, others),
        _machine(result),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE.read_text()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def headline(result: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    request, version = result["request"], result["versions"]["backend"]
    parts = [f"{request['width']}x{request['height']}", f"batch {request['batch']}"]
    parts.append(f"{request['evaluations']} evaluations")
    if result["variant"]:
        parts.append(str(result["variant"]))
    return f"{result['bundle']} on {result['backend']} {version}: {', '.join(parts)}"


def _head(result: Mapping[str, Any]) -> str:
    stages, change = result["stages"], result.get("delta_change", {})
    tiles = [
        _tile("Edit, median", milliseconds(stages["edit"]["p50"]), f"{result['runs']} edits"),
    ]
    step = stages.get("steady_step", stages["step"])
    tiles.append(_tile("Steady step, median", milliseconds(step["p50"]), f"p99 {milliseconds(step['p99'])}"))
    for key, label in (("with_generate", "generated"), ("without_generate", "given")):
        if key in change:
            share = f"{change['of_a_step']:.1%} of a step" if key == "without_generate" else ""
            tiles.append(_tile(f"New deltas, {label}", milliseconds(change[key]["p50"]), share))
    overhead = result.get("delta_overhead", {})
    if "ratio" in overhead:
        tiles.append(_tile("Deltas in a step", f"{overhead['ratio']:+.1%}", "over the graph without them"))
    if "edits_per_second" in result:
        tiles.append(_tile("Edits per second", f"{result['edits_per_second']:.3g}", ""))
    for meter in result.get("energy", []):
        tiles.append(
            _tile(
                "Energy of an edit",
                f"{meter['joules_per_edit']:.3g} J",
                f"{meter['of']}, {meter['watts']:.1f} W",
            )
        )
    if result["peak_memory"]:
        tiles.append(
            _tile("Peak memory", f"{result['peak_memory'] / 1e6:.0f} MB", "resident, of the process")
        )
    doubts = "".join(f"<li>{escape(text)}</li>" for text in result["warnings"])
    doubts = f'<ul class="doubts">{doubts}</ul>' if doubts else ""
    when = f"<p>{escape(str(result['date']))}</p>" if "date" in result else ""
    return (
        f"<header><h1>{escape(headline(result))}</h1>{when}</header>\n"
        f'<div class="tiles">{"".join(tiles)}</div>{doubts}'
    )


def _tile(label: str, value: str, detail: str) -> str:
    number, _, unit = value.partition(" ")
    shown = f"{escape(number)}<small> {escape(unit)}</small>" if unit else escape(number)
    return f'<div class="tile"><p>{escape(label)}</p><b>{shown}</b><p>{escape(detail)}</p></div>'


def _stages(result: Mapping[str, Any]) -> str:
    stages = result["stages"]
    rows = "".join(
        f"<tr><td>{_label(name)}</td>"
        + "".join(f'<td class="number">{n[c] if c == "count" else milliseconds(n[c])}</td>' for c in _COLUMNS)
        + f'<td class="number">{n["variation"]:.1%}</td></tr>'
        for name, n in stages.items()
    )
    head = "".join(f'<th class="number">{c}</th>' for c in (*_COLUMNS, "spread"))
    return (
        "<section><h2>Stages</h2><p>Bars reach the median, lines p99.</p>"
        f"{stage_bars(stages)}<table><tr><th>stage</th>{head}</tr>{rows}</table></section>"
    )


def _curves(result: Mapping[str, Any]) -> str:
    lines = result.get("curves", {})
    parts = "".join(curves({name: values}) for name, values in lines.items())
    return f"<section><h2>Percentiles</h2>{parts}</section>" if parts else ""


def _sweep(result: Mapping[str, Any]) -> str:
    cases = result.get("sweep", [])
    if not cases:
        return ""
    names = list(cases[0]["values"])
    rows, columns = names[0], names[1] if len(names) > 1 else None
    parts = []
    for others in _rest(cases, names[2:]):
        shown = [c for c in cases if all(c["values"][name] == value for name, value in others.items())]
        title = ", ".join(f"{name} {value}" for name, value in others.items())
        cells = [(c["values"], c["result"]["stages"]["edit"]["p50"]) for c in shown]
        parts.append((f"<p>{escape(title)}</p>" if title else "") + heat_map(cells, rows, columns))
    return f"<section><h2>Sweep</h2><p>Median of a whole edit.</p>{''.join(parts)}</section>"


def _rest(cases: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    seen = []
    for case in cases:
        values = {name: case["values"][name] for name in names}
        if values not in seen:
            seen.append(values)
            yield values


def _history(result: Mapping[str, Any], others: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    if not others:
        return ""
    points = [(name, old["stages"]["edit"]["p50"]) for name, old in others if "edit" in old["stages"]]
    points.append(("now", result["stages"]["edit"]["p50"]))
    name, last = others[-1]
    rows = "".join(
        f'<tr><td>{_label(stage)}</td><td class="number">{milliseconds(old)}</td>'
        f'<td class="number">{milliseconds(new)}</td><td class="number">{new / old:.3f}</td></tr>'
        for stage, (old, new) in ratios(last, result).items()
        if old > 0
    )
    changed = "".join(f"<li>{escape(text)}</li>" for text in differences(last, result))
    changed = f"<p>What else differs from {escape(name)}:</p><ul>{changed}</ul>" if changed else ""
    return (
        f"<section><h2>History</h2><p>Median of a whole edit.</p>{history(points)}{changed}"
        f'<table><tr><th>stage</th><th class="number">{escape(name)}</th><th class="number">now</th>'
        f'<th class="number">now / then</th></tr>{rows}</table></section>'
    )


def _machine(result: Mapping[str, Any]) -> str:
    facts: dict[str, Any] = {
        "runtime": f"{result['runtime']}, hywu {result['versions']['hywu']}",
        "threads": result["threads"] or "as the backend decides",
        **result.get("machine", {}),
        **{f"GPU {key}": value for key, value in result.get("device", {}).items()},
        **{f"{when}, {key}": v for when, s in result.get("state", {}).items() for key, v in s.items()},
        "warm-up": f"{result['warm_up']['edits']} edits",
        "first edit": milliseconds(result["cold"]["first_edit"]),
        "loading graphs": milliseconds(result["cold"]["load"]),
    }
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(_words(value))}</td></tr>"
        for key, value in facts.items()
    )
    return f'<section><h2>Machine</h2><table class="facts">{rows}</table></section>'


def _label(stage: str) -> str:
    return escape(stage.replace("_", " "))


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
