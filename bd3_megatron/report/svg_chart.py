"""Two kinds of chart as hand-written SVG: lines and stacked bars.

Decides: no plotting library is needed to look at a run. Axes begin at zero unless logarithmic; ticks are round numbers;
colours are told apart by people who see red and green alike (Okabe and Ito's palette). Not a plotting library: what a
report does not need is not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999", "#000000")
WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 80, 190, 40, 60


@dataclass(frozen=True)
class Line:
    """One named curve; points in rising x."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], *, log_x: bool = False) -> str:
    """An SVG of curves over a common x axis.

    Args:
        title, x_label, y_label: texts.
        lines: curves; those without points only appear in the legend.
        log_x: x in powers of two; every x must be positive.
    """
    xs = [x for line in lines for x, _ in line.points] or [0.0, 1.0]
    highest = max((y for line in lines for _, y in line.points), default=1.0) or 1.0
    ticks_y = _ticks(highest)
    top = max(ticks_y[-1], highest)
    low, high = (math.log2(min(xs)), math.log2(max(xs))) if log_x else (min(0.0, min(xs)), max(xs))
    span = (high - low) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        along = ((math.log2(x) if log_x else x) - low) / span
        return LEFT + along * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    ticks_x = sorted(set(xs)) if log_x else [t for t in _ticks(high) if t >= low]
    body = _frame(title, x_label, y_label)
    body += [_y_tick(place(max(xs), y)[1], y) for y in ticks_y]
    body += [_x_tick(place(x, 0)[0], _short(x)) for x in ticks_x if x > 0 or not log_x]
    for number, line in enumerate(lines):
        colour = PALETTE[number % len(PALETTE)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        body.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        if len(line.points) <= 32:
            dots = (place(*point) for point in line.points)
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
    return _document(body + _legend([line.name for line in lines]))


def stacked_bars(title: str, y_label: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """An SVG of one stacked bar a name.

    Args:
        bars: {bar: {part: height}}, heights not negative.
    """
    parts = sorted({part for heights in bars.values() for part in heights})
    highest = max((sum(heights.values()) for heights in bars.values()), default=1.0) or 1.0
    ticks = _ticks(highest)
    top = max(ticks[-1], highest)
    scale = (HEIGHT - TOP - BOTTOM) / top
    body = _frame(title, "", y_label) + [_y_tick(HEIGHT - BOTTOM - y * scale, y) for y in ticks]
    slot = (WIDTH - LEFT - RIGHT) / max(len(bars), 1)
    for number, (name, heights) in enumerate(bars.items()):
        x, base = LEFT + (number + 0.2) * slot, float(HEIGHT - BOTTOM)
        for index, part in enumerate(parts):
            height = heights.get(part, 0.0) * scale
            base -= height
            colour = PALETTE[index % len(PALETTE)]
            body.append(
                f'<rect x="{x:.1f}" y="{base:.1f}" width="{slot * 0.6:.1f}" height="{height:.1f}" fill="{colour}"/>'
            )
        body.append(_x_tick(x + slot * 0.3, name))
    return _document(body + _legend(parts))


def _ticks(highest: float) -> list[float]:
    """Four to eight round numbers from 0 to at least most of `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    raw = highest / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    return [i * step for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>'


def _y_tick(y: float, value: float) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
    return line + _text(LEFT - 6, y + 4, _short(value), "end")


def _x_tick(x: float, text: str) -> str:
    return _text(x, HEIGHT - BOTTOM + 18, text)


def _frame(title: str, x_label: str, y_label: str) -> list[str]:
    turned = f'transform="rotate(-90 18 {HEIGHT / 2})"'
    return [
        '<rect width="100%" height="100%" fill="white"/>',
        _text((LEFT + WIDTH - RIGHT) / 2, 22, title, extra='font-size="15"'),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_label),
        _text(18, HEIGHT / 2, y_label, extra=turned),
    ]


def _legend(names: Sequence[str]) -> list[str]:
    rows: list[str] = []
    for number, name in enumerate(names):
        y = TOP + 8 + 20 * number
        colour = PALETTE[number % len(PALETTE)]
        rows.append(f'<rect x="{WIDTH - RIGHT + 14}" y="{y - 9}" width="12" height="12" fill="{colour}"/>')
        rows.append(_text(WIDTH - RIGHT + 32, y + 2, name, "start"))
    return rows


def _document(body: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="12">', *body, "</svg>", ""])
