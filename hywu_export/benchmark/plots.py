"""Plots of a bench report as inline SVG; colours are classes of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH = 992.0
_LEFT = 150.0


def milliseconds(seconds: float) -> str:
    """A time for people, with three figures: ``0.018 ms``, ``222 ms``, ``1.71 s``."""
    if seconds == 0:
        return "0 ms"
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s" if abs(seconds) < 100 else f"{seconds:.0f} s"
    value = 1000 * seconds
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f} ms"


def stage_bars(stages: Mapping[str, Mapping[str, float]]) -> str:
    """A bar for every stage, to its median, with a line from p50 to p99."""
    top = max(numbers["p99"] for numbers in stages.values())
    ticks, right, parts = _ticks(0.0, top, 6), _WIDTH - 90, []
    bottom = 26.0 * len(stages) + 8

    def x(value: float) -> float:
        return _LEFT + value / ticks[-1] * (right - _LEFT)

    for tick in ticks:
        parts.append(_line("axis", x(tick), 0, x(tick), bottom))
        parts.append(_text(x(tick), bottom + 16, milliseconds(tick), "middle"))
    for row, (name, numbers) in enumerate(stages.items()):
        middle = 26.0 * row + 17
        parts.append(_text(_LEFT - 10, middle + 4, name.replace("_", " "), "end", "label"))
        width = max(1.0, x(numbers["p50"]) - _LEFT)
        title = f"<title>{escape(name)}: p50 {milliseconds(numbers['p50'])}</title>"
        parts.append(
            f'<rect class="bar" x="{_LEFT}" y="{middle - 8:.1f}" width="{width:.1f}" height="16" rx="2">'
            f"{title}</rect>"
        )
        parts.append(_line("range", x(numbers["p50"]), middle, x(numbers["p99"]), middle))
        parts.append(_text(x(numbers["p99"]) + 8, middle + 4, milliseconds(numbers["p50"])))
    return _svg(_WIDTH, bottom + 24, parts)


def curves(lines: Mapping[str, Sequence[float]]) -> str:
    """Time over percentile, for at most two stages."""
    low, high = min(min(v) for v in lines.values()), max(max(v) for v in lines.values())
    ticks, right, bottom, parts = _ticks(low, high, 6), _WIDTH - 110, 240.0, []

    def y(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - 10)

    def x(percentile: float) -> float:
        return 80 + percentile / 100 * (right - 80)

    for tick in ticks:
        parts.append(_line("axis", 80, y(tick), right, y(tick)))
        parts.append(_text(72, y(tick) + 4, milliseconds(tick), "end"))
    for percentile in (0, 25, 50, 75, 90, 99):
        parts.append(_line("axis", x(percentile), 10, x(percentile), bottom))
        parts.append(_text(x(percentile), bottom + 16, f"p{percentile}", "middle"))
    for kind, (name, values) in zip(("", " two"), lines.items()):
        places = " ".join(f"{x(p):.1f},{y(value):.1f}" for p, value in enumerate(values))
        parts.append(f'<polyline class="line{kind}" points="{places}"/>')
        parts.append(_text(x(100) + 8, y(values[-1]) + 4, name, "start", "label"))
    return _svg(_WIDTH, bottom + 24, parts)


def heat_map(cells: Sequence[tuple[Mapping[str, Any], float]], rows: str, columns: str | None) -> str:
    """A cell for every case of a sweep, shaded by its value in seconds."""
    ups = list(dict.fromkeys(str(values.get(rows)) for values, _ in cells))
    sides = list(dict.fromkeys(str(values.get(columns)) if columns else "" for values, _ in cells))
    width, height, top = min(150.0, (_WIDTH - _LEFT) / len(sides)), 44.0, 24.0 if columns else 4.0
    highest = max(value for _, value in cells)
    parts = [_text(_LEFT + (i + 0.5) * width, 14, f"{columns} {name}", "middle", "label") for i, name in
             enumerate(sides) if columns]  # fmt: skip
    parts += [
        _text(_LEFT - 10, top + (i + 0.5) * height + 4, f"{rows} {name}", "end", "label")
        for i, name in enumerate(ups)
    ]
    for values, value in cells:
        i = ups.index(str(values.get(rows)))
        j = sides.index(str(values.get(columns)) if columns else "")
        left, up = _LEFT + j * width, top + i * height
        parts.append(
            f'<rect class="heat" x="{left + 1:.1f}" y="{up + 1:.1f}" width="{width - 2:.1f}" '
            f'height="{height - 2:.1f}" rx="3" fill-opacity="{0.12 + 0.55 * value / highest:.2f}"/>'
        )
        parts.append(_text(left + width / 2, up + height / 2 + 4, milliseconds(value), "middle", "on"))
    return _svg(_WIDTH, top + height * len(ups) + 4, parts)


def history(points: Sequence[tuple[str, float]]) -> str:
    """A value of several measurements, oldest first."""
    values = [value for _, value in points]
    ticks, right, bottom, parts = _ticks(0.0, max(values), 5), _WIDTH - 60, 200.0, []

    def y(value: float) -> float:
        return bottom - value / ticks[-1] * (bottom - 24)

    def x(index: int) -> float:
        return 130 + (index + 0.5) / len(points) * (right - 130)

    for tick in ticks:
        parts.append(_line("axis", 80, y(tick), right, y(tick)))
        parts.append(_text(72, y(tick) + 4, milliseconds(tick), "end"))
    places = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values))
    parts.append(f'<polyline class="line" points="{places}"/>')
    for i, (name, value) in enumerate(points):
        parts.append(f'<circle class="dot" cx="{x(i):.1f}" cy="{y(value):.1f}" r="4"/>')
        parts.append(_text(x(i), y(value) - 10, milliseconds(value), "middle", "label"))
        parts.append(_text(x(i), bottom + 18, name, "middle"))
    return _svg(_WIDTH, bottom + 26, parts)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``; two at least."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= about)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>'
