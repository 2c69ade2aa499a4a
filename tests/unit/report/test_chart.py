"""Charts: every colour can be told from every other, odd series are drawn, a file stands alone."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest

from bd3_megatron.report.chart import (
    DASHES,
    LONGEST_LABEL,
    MAX_POINTS,
    PALETTE,
    Series,
    Stroke,
    histogram,
    line_chart,
    short,
    smoothed,
    stacked_bars,
    stroke,
    thinned,
)

COLOUR_VISIONS = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red cones": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green cones": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "no blue cones": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
"""Linear RGB as people see it: Machado, Oliveira and Fernandes 2009, severity 1."""
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.072175), (0.0193339, 0.119192, 0.9503041))
WHITE = (0.95047, 1.0, 1.08883)
JUST_TOLD_APART = 2.3
"""CIE 1976 colour difference that is just noticed side by side; thin lines in a legend need ten times that."""

Triple = tuple[float, ...]


def channels(colour: str) -> Triple:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def linear(colour: str) -> Triple:
    return tuple(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour))


def times(matrix: tuple[Triple, ...], vector: Triple) -> Triple:
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def lab(rgb: Triple) -> Triple:
    seen = times(TO_XYZ, tuple(min(1.0, max(0.0, c)) for c in rgb))
    x, y, z = (
        math.cbrt(v / w) if v / w > 216 / 24389 else (24389 / 27 * v / w + 16) / 116
        for v, w in zip(seen, WHITE, strict=True)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("vision", COLOUR_VISIONS)
def test_any_two_colours_are_told_apart_by_everybody(vision: str) -> None:
    seen = {colour: lab(times(COLOUR_VISIONS[vision], linear(colour))) for colour in PALETTE}
    nearest = min(math.dist(seen[a], seen[b]) for a, b in itertools.combinations(PALETTE, 2))
    assert nearest > 10 * JUST_TOLD_APART, f"two colours are {nearest:.1f} apart"


def test_colours_stay_different_when_a_picture_is_quantised() -> None:
    for bits in (2, 3, 4):
        kept = {tuple(math.floor(c * 255) >> (8 - bits) for c in channels(colour)) for colour in PALETTE}
        assert len(kept) == len(PALETTE), f"{bits} bits a channel merge two colours"


def test_every_colour_shows_on_white() -> None:
    assert all(1.05 / (times(TO_XYZ, linear(colour))[1] + 0.05) > 2.3 for colour in PALETTE)


def test_strokes_do_not_come_again_before_every_dash_was_used() -> None:
    count = len(PALETTE) * len(DASHES)
    assert len({stroke(number) for number in range(count)}) == count
    assert stroke(count) == stroke(0) and {stroke(number).dash for number in range(len(PALETTE))} == {""}


def test_thinning_keeps_extremes_and_smoothing_starts_unbiased() -> None:
    points = [(float(i), 0.0) for i in range(5000)]
    points[2345] = (2345.0, 9.0)
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS and (2345.0, 9.0) in kept
    assert smoothed([(0.0, 4.0), (1.0, 4.0)]) == [(0.0, 4.0), (1.0, 4.0)]


@pytest.mark.parametrize(
    "points", [[(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, 1e-9), (2.0, 1e12)], [(1.0, -3.0), (2.0, 4.0)]]
)
def test_odd_series_are_drawn(points: list[tuple[float, float]]) -> None:
    for log_x, log_y, from_zero in itertools.product((False, True), repeat=3):
        series = [Series("s", points, stroke(0))]
        drawn = line_chart("t <b>", "x", "y", series, log_x=log_x, log_y=log_y, from_zero=from_zero).inline()
        assert "nan" not in drawn and "inf" not in drawn and "t &lt;b&gt;" in drawn


def test_a_file_stands_alone_and_names_its_series() -> None:
    series = [
        Series("half \udcff\x07 a name", [(8.0, 1.0), (1024.0, 0.5)], stroke(3)),
        Series("n" * 99, [], stroke(11)),
    ]
    chart = line_chart("curves", "devices", "share", series, log_x=True, from_zero=True, legend=True)
    root = ElementTree.fromstring(chart.file())
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "half \ufffd\ufffd a name" in texts and {"8", "1024"} <= set(texts)
    assert f"{'n' * (LONGEST_LABEL - 1)}\u2026" in texts, "a long name is cut"
    dashed = [e for e in root.iter("{http://www.w3.org/2000/svg}line") if e.get("stroke-dasharray")]
    assert len(dashed) == 1, "the second series has its dash in the legend"


def test_a_position_is_where_the_axes_say() -> None:
    """On 1 to 100, 10 lies in the middle of a logarithmic axis and at a tenth of a linear one."""
    series = [Series("s", [(0.0, 1.0), (1.0, 10.0), (2.0, 100.0)], Stroke("#123456"))]
    for log_y, middle in ((True, 0.5), (False, 0.1)):
        chart = line_chart("t", "x", "y", series, log_y=log_y, from_zero=not log_y)
        low, tenth, high = (float(e.get("cy") or "nan") for e in chart.drawing.iter("circle"))
        assert (low - tenth) / (low - high) == pytest.approx(middle, abs=0.02)


def test_bars_are_as_wide_as_their_shares() -> None:
    chart = stacked_bars("time", {"a": {"x": 0.75, "y": 0.25}})
    widths = [float(e.get("width") or "nan") for e in chart.drawing.iter("rect")]
    assert widths[0] / widths[1] == pytest.approx(3.0, rel=0.01) and "x 75.0%" in chart.inline()


def test_a_histogram_holds_every_value_and_its_tail_one_bin() -> None:
    values = [1.0] * 150 + [2.0] * 49 + [500.0]
    (outline,) = list(histogram("h", "s", {"a": (stroke(0), values)}, bins=10).drawing.iter("polyline"))
    assert "nan" not in (outline.get("points") or "nan")
    assert not list(histogram("h", "s", {}).drawing.iter("polyline")), "no values are no bars"


def test_numbers_of_axes_are_short() -> None:
    numbers = (0, 0.0003, 0.05, 999, 1024, 1234.5, 20_000, 1.5e6, 2e9)
    assert [short(v) for v in numbers] == ["0", "3e-4", "0.05", "999", "1024", "1.234k", "20k", "1.5M", "2G"]
