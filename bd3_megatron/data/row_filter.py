"""Rows of tables: values by column name, nested ones too, and filters of one column and a few comparisons.

Contract: filters are data, not code, and the same on the command line, in recipes and in configurations of streams.
Refuses: values without an order; what no filter can be is refused by its fields (config/data.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bd3_megatron.config.data import RowFilter
from bd3_megatron.errors import DataError


# Data instead of expressions: a configuration may not run code, and it is compared when a run resumes.
def keeps(wanted: RowFilter, row: Mapping[str, Any]) -> bool:
    """Whether a row passes every comparison that a filter states.

    Raises:
        DataError: a value without an order is compared by at_least or at_most.
    """
    value = cell(row, wanted.column)
    return (
        (wanted.equals is None or value == wanted.equals)
        and (wanted.one_of is None or value in wanted.one_of)
        and (wanted.at_least is None or _size(value, wanted.column) >= wanted.at_least)
        and (wanted.at_most is None or _size(value, wanted.column) <= wanted.at_most)
        and (wanted.matches is None or re.search(wanted.matches, str(value)) is not None)
    )


def _size(value: Any, column: str) -> float:
    """The number, or the number of characters or entries; nan, which passes no comparison, where there is nothing."""
    if value is None:
        # Every comparison with nan is false, so rows without a value are left out and not an error.
        return float("nan")
    # Comparing sizes of texts is the common use: documents of at least so many characters.
    if isinstance(value, str | list):
        return len(value)
    if not isinstance(value, int | float):
        raise DataError(
            f"column {column} holds {type(value).__name__}, which has no order; use equals, one_of or matches there."
        )
    return value


def cell(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, of a nested one where no column has the name with its dots; None where there is none."""
    # A column may itself have a dot in its name; it wins over a nested one.
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def columns_of(features: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of all columns, nested ones with dots."""
    names: list[str] = []
    for name, kind in features.items():
        names.append(prefix + name)
        if isinstance(kind, Mapping):
            names += columns_of(kind, f"{prefix}{name}.")
    return names
