"""One table, three forms: aligned text, Markdown, JSON. Knows nothing of what is in it. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SOURCE_PREFIX = "eval/source/"
"""Of the keys of one part of a mixture in metrics.jsonl: eval/source/NAME/nll_nats_per_token and its like."""
NORMAL_95 = 1.959964
"""Half-width of a 95 % interval in standard errors."""
Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A key of the rows, its heading, and how its numbers are written."""

    key: str
    heading: str
    form: str = ""
    """Python's format specification for numbers; "" for str()."""


def render(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """The table as text; JSON holds all keys of the rows, unrounded, with null for what is not finite.

    Args:
        columns: what is shown, in order (JSON shows everything).
        rows: by key; missing or None is shown as a dash.
        form: one of FORMS.
    """
    return FORMS[form](columns, rows)


def _aligned(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    cells = _cells(columns, rows)
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _markdown(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in _cells(columns, rows))
    return "\n".join([head, f"|{'---|' * len(columns)}", *body])


def _json(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    # NaN and Infinity are no JSON
    return json.dumps([{key: _finite(value) for key, value in row.items()} for row in rows], indent=2)


FORMS: Mapping[str, Callable[[Sequence[Column], Sequence[Mapping[str, Any]]], str]] = {
    "text": _aligned,
    "markdown": _markdown,
    "json": _json,
}
"""What writes a table, by the name that users give."""


def _cells(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Headings, then the rows as shown."""
    return [
        [column.heading for column in columns],
        *([_cell(row.get(c.key), c.form) for c in columns] for row in rows),
    ]


def _cell(value: Value, form: str) -> str:
    if value is None:
        return "-"
    # Text has no number format.
    return str(value) if isinstance(value, str) else format(value, form)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
