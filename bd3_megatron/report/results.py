"""Tables and charts that a tool leaves in a results.json for the report page to show first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bd3_megatron.config.load import build
from bd3_megatron.errors import ConfigError, DataError
from bd3_megatron.files import read_json_list, write_text
from bd3_megatron.report.chart import Point


@dataclass(frozen=True, kw_only=True)
class ResultSeries:
    """A curve or the points of a scatter."""

    name: str
    points: tuple[Point, ...]
    errors: tuple[float, ...] = ()
    """Half-heights of error bars, one a point, or none."""
    labels: tuple[str, ...] = ()
    """Texts beside the points of a scatter."""


@dataclass(frozen=True, kw_only=True)
class ResultChart:
    """One chart with its own legend."""

    title: str
    x: str
    """Label of the x axis."""
    y: str
    """Label of the y axis."""
    series: tuple[ResultSeries, ...]
    scatter: bool = False
    log_y: bool = False


@dataclass(frozen=True, kw_only=True)
class ResultSection:
    """A heading with sentences, one table and charts."""

    title: str
    text: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    charts: tuple[ResultChart, ...] = ()


def write_results(path: Path, sections: Sequence[ResultSection]) -> None:
    """Write a results.json, whole or not at all."""
    write_text(path, json.dumps([asdict(section) for section in sections], indent=2) + "\n")


def read_results(path: Path) -> list[ResultSection]:
    """Sections that another tool left as JSON.

    Raises:
        DataError: missing, unreadable, or not a list of sections.
    """
    content = read_json_list(path, "give a results.json")
    try:
        # the loader of configurations names the key and the type that is wrong, for any nesting
        found: list[ResultSection] = [build(ResultSection, one, f"[{number}]") for number, one in enumerate(content)]
    except ConfigError as error:
        raise DataError(f"results '{path}' are not what a tool writes: {error}") from error
    for section in found:
        _check_lengths(path, section)
    return found


def _check_lengths(path: Path, section: ResultSection) -> None:
    # a short row would show its numbers under other headings
    if wrong := [row for row in section.rows if len(row) != len(section.columns)]:
        raise DataError(
            f"results '{path}' hold a row of {len(wrong[0])} cells under {len(section.columns)} columns; write one cell a column."
        )
    for series in (series for chart in section.charts for series in chart.series):
        if series.errors and len(series.errors) != len(series.points):
            raise DataError(
                f"results '{path}' hold {len(series.errors)} errors for {len(series.points)} points; write one a point, or none."
            )
