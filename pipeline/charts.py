"""Line charts as inline SVG: axes with units, a legend, and the value of each point in its hover title.

No script and no file beside the page: colours come from the page's CSS variables, so a chart follows its colour scheme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

WIDTH, HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 12, 44
_MAX_POINTS = 240

Points = Sequence[tuple[float, float]]
Place = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """points: (x, y), x ascending, y finite. colour: name of a CSS variable. faint: raw values behind a smoothed line.

    dots: mark every point; for lines of few values.
    """

    name: str
    points: Points
    colour: str
    faint: bool = False
    dots: bool = False


def line_chart(title: str, unit: str, lines: Sequence[Line], *, log_y: bool = False, from_zero: bool = False) -> str:
    """One chart with its heading and legend as an HTML figure. unit: of y, shown beside the title; x is steps.

    log_y: a logarithmic y axis, taken if all values are positive and span more than a factor of 20.
    from_zero: y begins at 0, for amounts.
    """
    shown = [line for line in lines if line.points]
    values = [y for line in shown for _, y in line.points]
    steps = [x for line in shown for x, _ in line.points]
    log_y = log_y and min(values) > 0 and max(values) / min(values) > 20
    ticks_y = (
        _log_ticks(min(values), max(values)) if log_y else _ticks(0.0 if from_zero else min(values), max(values), 5)
    )
    ticks_x = [tick for tick in _ticks(min(steps), max(steps), 6) if float(tick).is_integer()]
    low_y, high_y = min(*ticks_y, *values), max(*ticks_y, *values)
    low_x, high_x = min(steps), max(max(steps), min(steps) + 1)

    def at_x(x: float) -> float:
        return _LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        share = math.log(y / low_y) / math.log(high_y / low_y) if log_y else (y - low_y) / (high_y - low_y)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks_y:
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    base = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in ticks_x:
        if low_x <= tick <= high_x:
            parts.append(f'<text x="{at_x(tick):.1f}" y="{base + 20}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for line in shown:
        parts.append(_drawn(line, at_x, at_y, unit))
    legend = "".join(
        f'<span class="key"><i style="background:var({line.colour});opacity:{0.45 if line.faint else 1}"></i>'
        f"{escape(line.name)}</span>"
        for line in shown
    )
    keys = f'<div class="legend">{legend}</div>' if len(shown) > 1 else ""
    about = f"{escape(title)}{f', {escape(unit)}' if unit else ''}"
    scale = " (logarithmic)" if log_y else ""
    return (
        f'<figure class="card chart"><figcaption>{about}{scale}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about} by step">{"".join(parts)}</svg>'
        f"{keys}</figure>"
    )


def smoothed(points: Points, span: int) -> Points:
    """The mean of the `span` points around each, fewer at the ends; the line does not lag behind the values."""
    before, after = (span - 1) // 2, span // 2
    sums = [0.0, *accumulate(y for _, y in points)]
    result = []
    for index, (x, _) in enumerate(points):
        low, high = max(0, index - before), min(len(points), index + after + 1)
        result.append((x, (sums[high] - sums[low]) / (high - low)))
    return result


def number(value: float) -> str:
    """A number for an axis or a tile: 4 digits, thousands grouped, small ones as powers of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 1000 and abs(value) < 1e7:
        return f"{value:,.0f}"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:.4g}"


def _drawn(line: Line, at_x: Place, at_y: Place, unit: str) -> str:
    points = _thinned(line.points)
    after = f" {escape(unit)}" if unit else ""
    path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
    style = f'style="stroke:var({line.colour})"'
    parts = [f'<polyline class="line{" faint" if line.faint else ""}" {style} points="{path}"/>']
    if not line.faint:
        radius = 3.5 if line.dots or len(points) == 1 else 0
        for x, y in points:
            parts.append(
                f'<g class="point" style="color:var({line.colour})">'
                f'<circle class="hit" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="7"/>'
                f'<circle class="dot" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="{radius}"/>'
                f"<title>{escape(line.name)}, step {x:,.0f}: {number(y)}{after}</title></g>"
            )
    return "".join(parts)


def _thinned(points: Points) -> Points:
    """At most a few hundred points, evenly spread, the last always among them."""
    if len(points) <= _MAX_POINTS:
        return points
    stride = math.ceil(len(points) / _MAX_POINTS)
    return [*points[:-1:stride], points[-1]]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
