"""Small plots as inline SVG; colours are classes of the page's style sheet, texts on dots tool tips."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH = 992.0
_PANEL, _PANEL_HEIGHT = 480.0, 178.0
_ROW = 52.0


@dataclass(frozen=True)
class Dot:
    """A value in dB, what it says when pointed at, and whether it stands out."""

    value: float
    text: str
    hollow: bool = False


def strip(rows: Mapping[str, Sequence[Dot]], means: Mapping[str, float], target: float | None = None) -> str:
    """A row of dots over one axis of dB for each entry, with the mean, and a line at the target."""
    values = [dot.value for dots in rows.values() for dot in dots] + ([] if target is None else [target])
    ticks = _ticks(min(values), max(values), 8)
    left, right, top = 84.0, _WIDTH - 12, 22.0
    bottom = top + _ROW * len(rows)

    def x(value: float) -> float:
        return _place(value, ticks, left, right)

    parts = _vertical_grid(ticks, x, top, bottom)
    if target is not None:
        at = x(target)
        parts.append(
            f'<line class="target" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 6:.1f}" y2="{bottom:.1f}"/>'
        )
        anchor = "end" if at > 900 else "middle"
        parts.append(
            f'<text class="target-label" x="{at:.1f}" y="{top - 10:.1f}" text-anchor="{anchor}">'
            f"asked for {target:g}</text>"
        )
    for row, (name, dots) in enumerate(rows.items()):
        middle = top + _ROW * (row + 0.5)
        parts.append(f'<text class="label" x="0" y="{middle + 4:.1f}">{escape(name)}</text>')
        spread = _beeswarm([x(dot.value) for dot in dots], 5.0, _ROW / 2 - 9)
        for dot, (at, aside) in zip(dots, spread):
            parts.append(_circle(dot, at, middle + aside, 5))
        at = x(means[name])
        parts.append(
            f'<line class="mean" x1="{at:.1f}" x2="{at:.1f}" y1="{middle - 19:.1f}" y2="{middle + 19:.1f}">'
            f"<title>mean {means[name]:.1f} dB</title></line>"
        )
    return _svg(_WIDTH, bottom + 24, parts)


def layers(title: str, dots: Sequence[Dot], together: Iterable[Sequence[Dot]]) -> str:
    """One graph's layers from first to last, on an axis of dB that all graphs ``together`` share."""
    values = [dot.value for others in together for dot in others]
    ticks = _ticks(min(values), max(values), 5)
    left, right, top, bottom = 34.0, _PANEL - 6, 26.0, _PANEL_HEIGHT - 10
    parts = [f'<text class="label" x="0" y="12">{escape(title)}</text>']
    parts.append(f'<text x="{right:.1f}" y="12" text-anchor="end">{_count(len(dots), "layer")}</text>')
    for tick in ticks:
        at = _place(tick, ticks, bottom, top)
        parts.append(f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    step = (right - left) / len(dots)
    radius = min(4.0, max(2.2, step / 2))
    for i, dot in enumerate(dots):
        parts.append(_circle(dot, left + (i + 0.5) * step, _place(dot.value, ticks, bottom, top), radius))
    return _svg(_PANEL, _PANEL_HEIGHT, parts)


def bars(before: int, after: int, widest: int) -> str:
    """Two bars, one above the other, in units of ``widest``."""
    width = 220.0
    parts = [
        f'<rect class="{kind}" x="0" y="{y}" height="6" rx="1.5" '
        f'width="{max(1.0, width * size / max(widest, 1)):.1f}"/>'
        for kind, y, size in (("before", 0, before), ("after", 8, after))
    ]
    return _svg(width, 14, parts)


def _circle(dot: Dot, x: float, y: float, radius: float) -> str:
    kind = "hollow" if dot.hollow else "dot"
    title = f"<title>{escape(dot.text)}</title>"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">{title}</circle>'


def _vertical_grid(ticks: Sequence[float], x: object, top: float, bottom: float) -> list[str]:
    parts = []
    assert callable(x)
    for i, tick in enumerate(ticks):
        at = x(tick)
        unit = " dB" if i == len(ticks) - 1 else ""
        anchor = "end" if unit else "middle"
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(
            f'<text x="{at + (12 if unit else 0):.1f}" y="{bottom + 17:.1f}" text-anchor="{anchor}">'
            f"{tick:g}{unit}</text>"
        )
    return parts


def _beeswarm(places: Sequence[float], radius: float, room: float) -> list[tuple[float, float]]:
    """Places on a line with a distance from it, so that dots overlap as little as the room allows."""
    placed: dict[int, tuple[float, float]] = {}
    steps = max(1, int(room / radius))
    offsets = [0.0] + [sign * k * radius for k in range(1, steps + 1) for sign in (1, -1)]
    for i in sorted(range(len(places)), key=places.__getitem__):
        near = [spot for spot in placed.values() if abs(spot[0] - places[i]) < 2 * radius]

        def clearance(offset: float, at: float = places[i], near: list[tuple[float, float]] = near) -> float:
            return min((math.hypot(spot[0] - at, spot[1] - offset) for spot in near), default=math.inf)

        free = [offset for offset in offsets if clearance(offset) >= 2 * radius]
        placed[i] = (places[i], free[0] if free else max(offsets, key=clearance))
    return [placed[i] for i in range(len(places))]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``; two at least."""
    span = max(high - low, 1.0)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= about)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 6) for i in range(first, max(last, first + 1) + 1)]


def _place(value: float, ticks: Sequence[float], start: float, end: float) -> float:
    return start + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>'
