"""What is read of a Hugging Face dataset, stated once for recipes, streams and sources, and the section data.stream.

Each field has one name, type, legal range and default, as in `config/schema.py`, which holds the section.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from bd3_megatron.config.ranges import PathText, Pattern, Range
from bd3_megatron.errors import ConfigError, cut


@dataclass(frozen=True, kw_only=True)
class RowFilter:
    column: str
    """Rows are kept whose column passes every comparison given."""
    equals: Annotated[str | int | float | bool, Range(-1e18, 1e18)] | None = None
    """Exactly this."""
    one_of: tuple[Annotated[str | int | float, Range(-1e18, 1e18)], ...] | None = None
    """One of these."""
    at_least: Annotated[float, Range(-1e18, 1e18)] | None = None
    """Least number, or least number of characters of a text."""
    at_most: Annotated[float, Range(-1e18, 1e18)] | None = None
    """Greatest number, or greatest number of characters of a text."""
    matches: Annotated[str, Pattern()] | None = None
    """Regular expression found anywhere in the text."""

    def __post_init__(self) -> None:
        if (self.equals, self.one_of, self.at_least, self.at_most, self.matches) == (None,) * 5:
            raise ConfigError(
                f"a filter on column {cut(self.column)} compares nothing; give equals, one_of, at_least, at_most or matches."
            )


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """What is read of a dataset, wherever one is named."""

    name: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split of the dataset; of a table that is prepared, with slices such as train[:-1000]."""
    column: str = "text"
    """Column that holds the text; a dot leads into a nested one."""
    data_files: str | None = None
    """Pattern of files inside the dataset."""
    revision: str | None = None
    """Version on the hub; name one, or the text may change under those who read it."""
    filters: tuple[RowFilter, ...] = ()
    """Rows to keep."""


@dataclass(frozen=True, kw_only=True)
class TableOptions(DatasetOptions):
    """What is read of a dataset that is prepared, and how."""

    streaming: bool = False
    """Read without a local copy."""
    # a worker's memory holds the tokens of a part: of web text some 300 MB, 100 seconds of one process
    rows_per_part: Annotated[int, Range(1, 1e9)] = 1 << 16
    """Rows that one worker reads at a time."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig(DatasetOptions):
    dataset: PathText
    """Dataset file, folder or hub name, read as a stream and tokenised while training."""
    detokenizer: str = "none"
    """Table of replacements that undoes a corpus's own tokenisation (see data/detokenizers)."""
    # each keeps a window of rows in memory
    shards: Annotated[int, Range(1, 10_000)] | None = None
    """Number of stream shards, the shares the files are dealt to; sample i is of stream shard i mod shards.
    null: one a file, at most 64."""
    shuffle_rows: Annotated[int, Range(1, 1e7)] = 256
    """Rows of a stream shard permuted together; 1: none. A resumed run tokenises at most this many again."""


def options_of(stated: DatasetOptions, kind: type[DatasetOptions]) -> dict[str, Any]:
    """The options of a kind by name, as something states them that has others beside."""
    return {one.name: getattr(stated, one.name) for one in fields(kind)}
