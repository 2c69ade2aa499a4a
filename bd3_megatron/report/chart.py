"""Charts as SVG: lines with error bars, scatter, histograms and stacked bars, for the report page and for files.

One drawing is WIDTH units wide, about a phone, so its text stays readable at 400 px and three stand side by side at
1400 px. No scripts; a browser shows <title> as a tooltip. Values that are not finite must be left out before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree

from markupsafe import Markup

# Ten colours of which no two are nearer than 30 (CIE 1976 Lab) in normal vision or under simulated red, green or blue
# blindness (Machado et al. 2009), all darker than 2.3:1 against white, and distinct when a channel keeps two bits.
# A maximin search over 4,096 colours found them, two of them given. Add none by eye: the tests measure all pairs.
PALETTE = (
    "#0066bb", "#ee8800", "#bb1100", "#9900ff", "#99aa77", "#cc88bb", "#665555", "#000077", "#550000", "#330033",
)  # fmt: skip
DASHES = ("", "8 4", "2 3", "10 3 2 3")
"""Dash patterns of strokes beyond the palette: the colours come again, the pattern does not."""
WIDTH, HEIGHT = 430, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 30, 40
LEGEND_ROW = 16
LONGEST_TITLE, LONGEST_LABEL = 56, 64
"""Characters that fit across the drawing; longer texts are cut and stay whole as the tooltip."""
MAX_POINTS = 360
INK, GREY, GRID_LINE = "#1b1f24", "#57606a", "#e6e9ec"
Point = tuple[float, float]


@dataclass(frozen=True)
class Stroke:
    """How a series is told from the others."""

    colour: str
    dash: str = ""
    """SVG dash pattern; empty: solid."""


@dataclass(frozen=True)
class Series:
    """One curve or cloud of points."""

    name: str
    points: Sequence[Point]
    stroke: Stroke
    errors: Sequence[float] = ()
    """Half-heights of error bars, one a point."""
    is_faint: bool = False
    """Raw values under their own average: thin, pale, and absent from the legend."""
    is_scatter: bool = False
    labels: Sequence[str] = field(default=())
    """Texts beside the points of a scatter."""


@dataclass(frozen=True)
class Chart:
    """A finished drawing."""

    title: str
    drawing: ElementTree.Element
    height: float

    def inline(self) -> Markup:
        """The `<svg>` element for an HTML page, which sets its width and font."""
        return Markup(ElementTree.tostring(self.drawing, encoding="unicode"))

    def file(self) -> str:
        """The text of an .svg file that stands alone."""
        # a viewer without CSS takes the size from here; twice the drawing's own reads well on a screen
        size = {"width": f"{2 * WIDTH}", "height": f"{2 * self.height:g}"}
        look = {"font-family": "sans-serif", "font-size": "11.5"}
        root = ElementTree.Element(
            "svg", {"xmlns": "http://www.w3.org/2000/svg", **self.drawing.attrib, **size, **look}
        )
        ElementTree.SubElement(root, "rect", width="100%", height="100%", fill="white")
        root.extend(copy.deepcopy(self.drawing))
        # a line an element: a redrawn chart shows as few changed lines
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode") + "\n"


def stroke(number: int) -> Stroke:
    """The stroke of series `number`; no two among the first 40 are equal."""
    return Stroke(PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)])


@dataclass(frozen=True)
class _Scale:
    """Where numbers of one axis lie, as a share of its length."""

    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool

    def share(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return (value - low) / ((high - low) or 1.0)


@dataclass(frozen=True)
class _Axes:
    x: _Scale
    y: _Scale

    def position(self, x: float, y: float) -> Point:
        across, up = self.x.share(x), self.y.share(y)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    legend: bool = False,
) -> Chart:
    """Curves over a common x axis; an empty chart says so.

    Args:
        title, x_label, y_label: texts.
        series: in drawing order.
        log_x: logarithmic x with a tick at every value; needs positive values.
        log_y: logarithmic y; linear where a value is not positive.
        from_zero: y begins at 0.
        legend: name the series below the chart; without it the page around must.
    """
    # a run that has not logged the key yet keeps its line of the legend, so that colours mean the same in every chart
    drawn = [s for s in series if s.points]
    named = [(s.name, s.stroke) for s in series if not s.is_faint] if legend else []
    root, height = _root(title, HEIGHT, named)
    if not drawn:
        _text(root, WIDTH / 2, HEIGHT / 2, "no data yet")
        return Chart(title, root, height)
    axes = _axes(drawn, log_x=log_x, log_y=log_y, from_zero=from_zero)
    _frame(root, axes, x_label, y_label)
    for one in drawn:
        _scatter(root, one, axes) if one.is_scatter else _curve(root, one, axes)
    return Chart(title, root, height)


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]]) -> Chart:
    """One horizontal bar a name, with a legend of the parts.

    Args:
        title: text.
        bars: {bar: {part: share}}; the shares of a bar add up to 1.
    """
    # sorted, so that a part has one colour in the bars of every run
    parts = sorted({part for shares in bars.values() for part in shares})
    row = 34
    bottom = TOP + row * len(bars)
    root, height = _root(title, bottom, [(part, stroke(index)) for index, part in enumerate(parts)])
    for number, (name, shares) in enumerate(bars.items()):
        y, x = TOP + row * number, 10.0
        _text(root, 10, y + 10, name, "start", most=LONGEST_LABEL)
        for index, part in enumerate(parts):
            width = max(shares.get(part, 0.0), 0.0) * (WIDTH - 20)
            bar = _rect(root, (x, y + 14, width, 14), stroke(index).colour)
            ElementTree.SubElement(bar, "title").text = f"{part} {shares.get(part, 0.0):.1%}"
            x += width
    return Chart(title, root, height)


def histogram(
    title: str, x_label: str, named: Mapping[str, tuple[Stroke, Sequence[float]]], *, bins: int = 30
) -> Chart:
    """Outlines of histograms over common bins, as shares of each run's own count.

    Args:
        title, x_label: texts.
        named: {name: (stroke, values)}.
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
        outline: list[Point] = [(low, 0.0)]
        for number, count in enumerate(counts):
            share = count / max(1, len(found))
            outline += [(low + number * width, share), (low + (number + 1) * width, share)]
        series.append(Series(name, [*outline, (low + (bins + 1) * width, 0.0)], own))
    return line_chart(title, x_label, "share of steps", series, from_zero=True)


def smoothed(points: Sequence[Point], *, share: float = 0.03) -> list[Point]:
    """Exponential average over about `share` of the points."""
    keep = 1.0 - 1.0 / max(1.0, share * len(points))
    # dividing by the weight so far removes the pull of the zero that the average starts from
    average, weight, out = 0.0, 0.0, []
    for x, y in points:
        average, weight = keep * average + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, average / weight))
    return out


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MAX_POINTS points: of every stretch its lowest and its highest, so that a spike stays."""
    if len(points) <= MAX_POINTS:
        return list(points)
    # two points are kept of every stretch
    size = -(-2 * len(points) // MAX_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def short(value: float) -> str:
    """A number for an axis: 1.5M, 20k, 1024, 0.05, 3e-4."""
    if abs(value) < 1e4 and value == int(value):
        return f"{value:.0f}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9999:
            return f"{value / size:.4g}{letter}"
    # learning rates: Python would write 3e-04
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def _axes(series: Sequence[Series], *, log_x: bool, log_y: bool, from_zero: bool) -> _Axes:
    # error bars count for the range of y: a bar that leaves the chart would look shorter than it is
    xs = [x for one in series for x, _ in one.points]
    ends = [
        (y, e) for one in series for (_, y), e in zip(one.points, one.errors or [0.0] * len(one.points), strict=True)
    ]
    low, high = min(y - e for y, e in ends), max(y + e for y, e in ends)
    x_ticks = sorted(set(xs)) if log_x else _ticks(min(xs), max(xs))
    x = _Scale(min(xs), max(xs), x_ticks, is_log=log_x)
    if log_y and (least := min(y for y, _ in ends)) > 0:
        # an error bar that reaches zero cannot be drawn on a logarithmic axis
        low = max(low, least / 2)
        ticks = _log_ticks(low, high)
        return _Axes(x, _Scale(min(low, ticks[0]), max(high, ticks[-1]), ticks, is_log=True))
    low = min(low, 0.0) if from_zero else low
    # a constant series would have a range of zero; it is drawn through the middle
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    pad = 0.04 * (high - low)
    return _Axes(x, _Scale(low - (0.0 if from_zero else pad), high + pad, _ticks(low, high), is_log=False))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers inside [low, high], about five."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    # 2.5 as well as 2 and 5: steps of a quarter are what people read on a share
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


def _root(title: str, bottom: float, named: Sequence[tuple[str, Stroke]]) -> tuple[ElementTree.Element, float]:
    """The drawing's element with its title, and with a legend below `bottom`; and its height."""
    # two columns only where every name fits into half of the width
    columns = 2 if max((len(name) for name, _ in named), default=0) <= LONGEST_LABEL // 2 - 6 else 1
    rows = -(-len(named) // columns)
    height = bottom + (LEGEND_ROW * rows + 6 if named else 0)
    root = ElementTree.Element("svg", viewBox=f"0 0 {WIDTH} {height:g}", role="img")
    root.set("aria-label", _printable(title))
    heading = {"font-size": "13", "font-weight": "600"}
    _text(root, WIDTH / 2, 16, title, most=LONGEST_TITLE, extra=heading)
    for index, (name, own) in enumerate(named):
        x, y = 10 + (index % columns) * WIDTH / columns, bottom + LEGEND_ROW * (index // columns) + 12
        _line(root, (x, y - 4), (x + 18, y - 4), {**_pen(own), "stroke-width": "6"})
        _text(root, x + 24, y, name, "start", most=LONGEST_LABEL // columns)
    return root, height


def _frame(root: ElementTree.Element, axes: _Axes, x_label: str, y_label: str) -> None:
    bottom, ink = HEIGHT - BOTTOM, {"stroke": GREY}
    for tick in axes.y.ticks:
        y = axes.position(axes.x.low, tick)[1]
        _line(root, (LEFT, y), (WIDTH - RIGHT, y), {"stroke": GRID_LINE})
        _text(root, LEFT - 5, y + 4, short(tick), "end")
    for tick in axes.x.ticks:
        x = axes.position(tick, axes.y.low)[0]
        _line(root, (x, bottom), (x, bottom + 4), ink)
        _text(root, x, bottom + 16, short(tick))
    _line(root, (LEFT, bottom), (WIDTH - RIGHT, bottom), ink)
    _text(root, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label)
    _text(root, 12, HEIGHT / 2, y_label, extra={"transform": f"rotate(-90 12 {HEIGHT / 2:g})"})


def _curve(root: ElementTree.Element, one: Series, axes: _Axes) -> None:
    # error bars belong to points, so a series that has them is drawn whole
    drawn = [axes.position(*point) for point in (one.points if one.errors else thinned(one.points))]
    weight = {"stroke-opacity": "0.28", "stroke-width": "1"} if one.is_faint else {"stroke-width": "1.8"}
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    curve = ElementTree.SubElement(root, "polyline", {"fill": "none", **_pen(one.stroke), **weight, "points": path})
    ElementTree.SubElement(curve, "title").text = _printable(one.name)
    # few points are measurements that one wants to hover over; many would hide the curve
    if len(one.points) <= 40 and not one.is_faint:
        _dots(root, one, axes)


def _scatter(root: ElementTree.Element, one: Series, axes: _Axes) -> None:
    _dots(root, one, axes)
    for (x, y), label in zip(one.points, one.labels, strict=False):
        px, py = axes.position(x, y)
        # labels of the right half stand to the left of their point
        side = "end" if px > (LEFT + WIDTH - RIGHT) / 2 else "start"
        _text(root, px + (-6 if side == "end" else 6), py - 5, label, side)


def _dots(root: ElementTree.Element, one: Series, axes: _Axes) -> None:
    for (x, y), error in zip(one.points, one.errors or [0.0] * len(one.points), strict=True):
        px, py = axes.position(x, y)
        if error:
            ends = (axes.position(x, max(y - error, axes.y.low))[1], axes.position(x, y + error)[1])
            _line(root, (px, ends[0]), (px, ends[1]), {"stroke": one.stroke.colour, "stroke-width": "1.2"})
        at = {"cx": f"{px:.1f}", "cy": f"{py:.1f}", "r": "2.6", "fill": one.stroke.colour}
        said = f"{one.name}: {y:.4g}" + (f" \u00b1 {error:.2g}" if error else "") + f" at {short(x)}"
        ElementTree.SubElement(ElementTree.SubElement(root, "circle", at), "title").text = _printable(said)


def _pen(own: Stroke) -> dict[str, str]:
    return {"stroke": own.colour} | ({"stroke-dasharray": own.dash} if own.dash else {})


def _line(root: ElementTree.Element, start: Point, end: Point, attributes: Mapping[str, str]) -> None:
    ends = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
    ElementTree.SubElement(root, "line", {name: f"{value:.1f}" for name, value in ends.items()} | dict(attributes))


def _rect(root: ElementTree.Element, box: tuple[float, float, float, float], colour: str) -> ElementTree.Element:
    sizes = dict(zip(("x", "y", "width", "height"), (f"{value:.1f}" for value in box), strict=True))
    return ElementTree.SubElement(root, "rect", {**sizes, "fill": colour})


def _text(
    root: ElementTree.Element,
    x: float,
    y: float,
    text: str,
    anchor: str = "middle",
    *,
    most: int = LONGEST_LABEL,
    extra: Mapping[str, str] | None = None,
) -> None:
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": INK}
    element = ElementTree.SubElement(root, "text", at | dict(extra or {}))
    element.text = _printable(text if len(text) <= most else f"{text[: most - 1]}\u2026")
    if len(text) > most:
        ElementTree.SubElement(element, "title").text = _printable(text)


def _printable(text: str) -> str:
    """Text without what XML cannot hold: control characters, and halves of characters from undecodable file names."""
    return "".join(c if c in "\t\n\r" or (c >= " " and not "\ud800" <= c <= "\udfff") else "\ufffd" for c in text)
