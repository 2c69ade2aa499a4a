"""Charts of the page as SVG that scales with its column: lines with error bars, stacked bars, histograms, scatter.

Decides: one drawing is about as wide as a phone (WIDTH units), so its text is readable at 400 px and several stand side by
side at 1400 px; a legend is the page's business (colours are the runs'). No scripts; a browser shows <title> as tooltip.
Long series are thinned so that extremes stay: a spike is never smoothed away. Values that are not finite must be left out
before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from bd3_megatron.report.svg_chart import PALETTE

WIDTH, HEIGHT = 430, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 30, 40
MAX_POINTS = 360
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve or cloud of points."""

    name: str
    points: Sequence[Point]
    colour: str
    errors: Sequence[float] = ()
    """Half-heights of error bars, one a point."""
    is_faint: bool = False
    is_scatter: bool = False
    labels: Sequence[str] = field(default=())
    """Texts beside the points of a scatter."""


@dataclass(frozen=True)
class _Axes:
    """Where numbers lie on the drawing."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_range: Point
    y_range: Point
    is_log: bool

    def place(self, x: float, y: float) -> Point:
        low, high = self.y_range
        if self.is_log:
            y, low, high = math.log10(y), math.log10(low), math.log10(high)
        along = (x - self.x_range[0]) / ((self.x_range[1] - self.x_range[0]) or 1.0)
        up = (y - low) / ((high - low) or 1.0)
        return LEFT + along * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def colour(number: int) -> str:
    """The colour of run `number`; colours repeat after the palette."""
    return PALETTE[number % len(PALETTE)]


def line_chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_y: bool = False, from_zero: bool = False
) -> str:
    """Curves over a common x axis; an empty chart says so.

    Args:
        title, x_label, y_label: texts.
        series: in drawing order.
        log_y: logarithmic y; needs positive values.
        from_zero: y begins at 0.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return _document(title, [_text(WIDTH / 2, HEIGHT / 2, "no data yet")])
    axes = _axes(drawn, log_y=log_y, from_zero=from_zero)
    body = _frame(axes, x_label, y_label)
    for one in drawn:
        body += _scatter(one, axes) if one.is_scatter else _curve(one, axes)
    return _document(title, body)


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """One horizontal bar a name, parts as shares of 1, with a legend of the parts.

    Args:
        title: text.
        bars: {bar: {part: share}}.
    """
    parts = sorted({part for shares in bars.values() for part in shares})
    row = 34
    height = TOP + row * len(bars) + 18 * -(-len(parts) // 2) + 16
    body = []
    for number, (name, shares) in enumerate(bars.items()):
        y, x = TOP + row * number, 10.0
        body.append(_text(10, y + 10, name, "start"))
        for index, part in enumerate(parts):
            width = shares.get(part, 0.0) * (WIDTH - 20)
            body.append(
                f'<rect x="{x:.1f}" y="{y + 14}" width="{max(width, 0):.1f}" height="14" fill="{colour(index)}">'
                f"<title>{escape(part)} {shares.get(part, 0.0):.1%}</title></rect>"
            )
            x += width
    for index, part in enumerate(parts):
        x, y = 10 + (index % 2) * (WIDTH / 2), TOP + row * len(bars) + 18 * (index // 2) + 16
        body.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour(index)}"/>')
        body.append(_text(x + 15, y, part, "start"))
    return _document(title, body, height=height)


def histogram(title: str, x_label: str, named: Mapping[str, tuple[str, Sequence[float]]], *, bins: int = 30) -> str:
    """Outlines of histograms over common bins, as shares of each run's own count.

    Args:
        title, x_label: texts.
        named: {name: (colour, values)}.
    """
    values = sorted(v for _, found in named.values() for v in found)
    if not values:
        return line_chart(title, x_label, "share", [])
    # a few very slow steps must not squeeze all others into one bin
    low, high = values[0], values[min(len(values) - 1, math.ceil(0.99 * len(values)))]
    width = (high - low) / bins or max(abs(low), 1e-9) / bins
    series = []
    for name, (own, found) in named.items():
        counts = [0] * (bins + 1)
        for value in found:
            counts[min(bins, int((value - low) / width))] += 1
        steps: list[Point] = [(low, 0.0)]
        for number, count in enumerate(counts):
            share = count / max(1, len(found))
            steps += [(low + number * width, share), (low + (number + 1) * width, share)]
        series.append(Series(name, [*steps, (low + (bins + 1) * width, 0.0)], own))
    return line_chart(title, x_label, "share of steps", series, from_zero=True)


def smoothed(points: Sequence[Point], *, share: float = 0.03) -> list[Point]:
    """Exponential average over about `share` of the points."""
    keep = 1.0 - 1.0 / max(1.0, share * len(points))
    average, weight, out = 0.0, 0.0, []
    for x, y in points:
        average, weight = keep * average + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, average / weight))
    return out


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MAX_POINTS points: of every stretch its lowest and its highest."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = -(-2 * len(points) // MAX_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def short(value: float) -> str:
    """A number for an axis: 1.5M, 20k, 0.05, 3e-4."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9999:
            return f"{value / size:.4g}{letter}"
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def _axes(series: Sequence[Series], *, log_y: bool, from_zero: bool) -> _Axes:
    xs = [x for one in series for x, _ in one.points]
    ends = [
        (y, e) for one in series for (_, y), e in zip(one.points, one.errors or [0.0] * len(one.points), strict=True)
    ]
    low, high = min(y - e for y, e in ends), max(y + e for y, e in ends)
    is_log = log_y and min(y for y, _ in ends) > 0
    if is_log:
        low = max(low, min(y for y, _ in ends) / 2)
        ticks = _log_ticks(low, high)
        return _Axes(
            _ticks(min(xs), max(xs)), ticks, (min(xs), max(xs)), (min(low, ticks[0]), max(high, ticks[-1])), True
        )
    low = min(low, 0.0) if from_zero else low
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    pad = 0.0 if from_zero else 0.04 * (high - low)
    return _Axes(
        _ticks(min(xs), max(xs)), _ticks(low, high), (min(xs), max(xs)), (low - pad, high + 0.04 * (high - low)), False
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers inside [low, high], about five."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside [low, high]; powers only where that is many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    mantissas = (1, 2, 5) if len(powers) <= 3 else (1,)
    ticks = [m * 10.0**p for p in powers for m in mantissas]
    inside = [t for t in ticks if low <= t <= high]
    # less than an octave or so: round numbers at equal distances say more
    return inside if len(inside) >= 3 else [t for t in _ticks(low, high) if t > 0] or [low, high]


def _frame(axes: _Axes, x_label: str, y_label: str) -> list[str]:
    body = []
    bottom = HEIGHT - BOTTOM
    for tick in axes.y_ticks:
        y = axes.place(axes.x_range[0], tick)[1]
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text(LEFT - 5, y + 4, short(tick), "end"))
    for tick in axes.x_ticks:
        x = axes.place(tick, axes.y_range[0])[0]
        body.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        body.append(_text(x, bottom + 16, short(tick)))
    body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label))
    turned = f'transform="rotate(-90 12 {HEIGHT / 2})"'
    body.append(_text(12, HEIGHT / 2, y_label, extra=turned))
    return body


def _curve(one: Series, axes: _Axes) -> list[str]:
    places = [axes.place(*point) for point in (one.points if one.errors else thinned(one.points))]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    look = 'stroke-opacity="0.28" stroke-width="1"' if one.is_faint else 'stroke-width="1.8"'
    body = [
        f'<polyline fill="none" stroke="{one.colour}" {look} points="{path}"><title>{escape(one.name)}</title></polyline>'
    ]
    if len(one.points) <= 40 and not one.is_faint:
        body += _dots(one, axes)
    return body


def _scatter(one: Series, axes: _Axes) -> list[str]:
    body = _dots(one, axes)
    for (x, y), label in zip(one.points, one.labels, strict=False):
        px, py = axes.place(x, y)
        # labels of the right half stand to the left of their point
        side = "end" if px > (LEFT + WIDTH - RIGHT) / 2 else "start"
        body.append(_text(px + (-6 if side == "end" else 6), py - 5, label, side))
    return body


def _dots(one: Series, axes: _Axes) -> list[str]:
    body = []
    for (x, y), error in zip(one.points, one.errors or [0.0] * len(one.points), strict=True):
        px, py = axes.place(x, y)
        said = f"{one.name}: {y:.4g}" + (f" \u00b1 {error:.2g}" if error else "") + f" at {short(x)}"
        if error:
            low = max(y - error, axes.y_range[0])
            body.append(
                f'<line stroke="{one.colour}" stroke-width="1.2" x1="{px:.1f}" x2="{px:.1f}" '
                f'y1="{axes.place(x, low)[1]:.1f}" y2="{axes.place(x, y + error)[1]:.1f}"/>'
            )
        body.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{one.colour}"><title>{escape(said)}</title></circle>'
        )
    return body


def _text(x: float, y: float, text: str, anchor: str = "middle", *, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>'


def _document(title: str, body: Sequence[str], *, height: float = HEIGHT) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
    heading = f'<text class="title" x="{WIDTH / 2}" y="16" text-anchor="middle">{escape(title)}</text>'
    return "\n".join([head, heading, *body, "</svg>"])
