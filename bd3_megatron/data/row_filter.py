"""Rows of tables: values by column name, nested ones too, and filters of one column and a few comparisons.

Contract: filters are data, not code, and the same on the command line, in recipes and in configurations of streams.
Refuses: values without an order; what no filter can be is refused by its fields (config/schema.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bd3_megatron.config.stream import FilterConfig
from bd3_megatron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class RowFilter(FilterConfig):
    """Keep rows whose column passes every comparison given."""

    # Data instead of expressions: a configuration may not run code, and it is compared when a run resumes.
    def keeps(self, row: Mapping[str, Any]) -> bool:
        """Whether a row passes.

        Raises:
            DataError: a value without an order is compared by at_least or at_most.
        """
        value = cell(row, self.column)
        return (
            (self.equals is None or value == self.equals)
            and (self.one_of is None or value in self.one_of)
            and (self.at_least is None or self._size(value) >= self.at_least)
            and (self.at_most is None or self._size(value) <= self.at_most)
            and (self.matches is None or re.search(self.matches, str(value)) is not None)
        )

    def _size(self, value: Any) -> float:
        """The number, or the number of characters or entries; nan, which passes no comparison, where there is nothing."""
        if value is None:
            # Every comparison with nan is false, so rows without a value are left out and not an error.
            return float("nan")
        # Comparing sizes of texts is the common use: documents of at least so many characters.
        if isinstance(value, str | list):
            return len(value)
        if not isinstance(value, int | float):
            raise DataError(
                f"column {self.column} holds {type(value).__name__}, which has no order; "
                "use equals, one_of or matches there."
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
