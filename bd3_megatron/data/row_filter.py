"""Rows of tables: values by column name, nested ones too, and filters of one column and a few comparisons.

Contract: filters are data, not code, and the same on the command line, in recipes and in configurations of streams.
Refuses: filters that compare nothing, unknown keys, patterns that are no regular expression, values without an order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bd3_megatron.config.schema import FilterConfig
from bd3_megatron.errors import ConfigError, DataError, either

# Data instead of expressions: a configuration may not run code, and it is compared when a run resumes.
COMPARISONS = ("equals", "one_of", "at_least", "at_most", "matches")


@dataclass(frozen=True, kw_only=True)
class RowFilter(FilterConfig):
    """Keep rows whose column passes every comparison given."""

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in COMPARISONS):
            raise ConfigError(f"filter on {self.column} compares nothing; give {either(COMPARISONS)}.")
        if self.matches is not None:
            try:
                # Compiled here so that a bad pattern is refused on the login node.
                re.compile(self.matches)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"filter pattern {self.matches!r:.80} is no regular expression ({error}); mend it."
                ) from error

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str) -> RowFilter:
        """A filter from the keys people write.

        Args:
            values: column and comparisons.
            where: the recipe's source or the option, for the error.

        Raises:
            ConfigError: no column, an unknown key, or a filter that cannot be.
        """
        known = [one.name for one in fields(RowFilter)]
        for key in values:
            if key not in known:
                raise ConfigError(f"{where} has an unknown key {str(key):.80}; use {', '.join(known)}.")
        if not isinstance(values.get("column"), str):
            raise ConfigError(f"{where} names no column; add it.")
        for key in ("at_least", "at_most"):
            value = values.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ConfigError(f"{where} has {key}={value!r:.80}, which is no number; give one.")
        stated: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return RowFilter(**stated)

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
