"""The section data: prepared folders, mixtures and streams, and what is read of a dataset wherever one is named.

Each field has one name, type, legal range and default, as in `config/schema.py`, which holds the section.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from bd3_megatron.config.ranges import MOST_STEPS, MOST_TOKENS, PathText, Pattern, Range
from bd3_megatron.errors import ConfigError, cut

Weight = Annotated[float, Range(0, 1e9)]
NumPieces = Annotated[int, Range(2, 1e7)]
# the bound of data/held_out.py: a part that is larger than the rest is a slip
HeldOutShare = Annotated[float, Range(0, 0.5)]
DEFAULT_NUM_PIECES = 2048
DEFAULT_HELD_OUT = 0.05


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
    messages: str | None = None
    """Column of chats in place of `column`: a chat template writes them, and the assistant's turns are predicted."""
    prompt_column: str | None = None
    """Column of what is given, in place of `column`."""
    answer_column: str | None = None
    """Column of what is predicted, with prompt_column."""


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


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    mixture: dict[PathText, Weight]
    """Prepared folders with their weights in this stage; a folder that other stages name has weight 0 here."""
    steps: Annotated[int, Range(1, MOST_STEPS)] | None = None
    """Length in optimizer steps; the last stage may leave both out and holds to the end."""
    tokens: Annotated[int, Range(1, MOST_TOKENS)] | None = None
    """Length in clean tokens, instead of steps."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: PathText | None = None
    """Folder made by tools/prepare_data.py (train/, valid/, tokenizer/); null: made from `text` under run.dir/data.
    With mixture, stages or stream it gives tokenizer and held-out rows only."""
    text: tuple[PathText, ...] = ()
    """Text files or folders to prepare where path is null; `builtin:python-docs` is text every Python has."""
    tokenizer: PathText = "bytes"
    """With `text`: bytes, sentencepiece (trained on the text), or a folder with a fast tokenizer."""
    tokenizer_vocab_size: NumPieces = DEFAULT_NUM_PIECES
    """With a trained tokenizer: its number of pieces."""
    valid_fraction: HeldOutShare = DEFAULT_HELD_OUT
    """With `text`: share of documents held out for evaluation."""
    # of a single token nothing can be predicted
    seq_len: Annotated[int, Range(2, 1e8)]
    """Clean tokens L of a sample; the model sees 2L rows."""
    packing: Literal["wrap", "isolated", "pad"] = "wrap"
    """wrap: the stream cut every L tokens (paper). isolated: documents do not see each other. pad: one document a row.
    Under the last two, end tokens with loss fill the diffusion block in which a document ends."""
    # processes, on each rank
    num_workers: Annotated[int, Range(0, 1000)] = 0
    """Loader processes per rank; 0 reads in the training process. The batches do not depend on it."""
    shuffle: bool = True
    """Permute samples anew in every epoch (a stateless bijection of the sample number)."""
    mixture: dict[PathText, Weight] = field(default_factory=dict)
    """Prepared folders with their weights, to train on instead of path's train/. Name new ones last when resuming."""
    stages: tuple[StageConfig, ...] = ()
    """Curriculum of mixtures, instead of `mixture`: all lengths in steps, or all in tokens."""
    stream: StreamConfig | None = None
    """Train on a stream that is too big to prepare, instead of path's train/."""

    @property
    def mixtures(self) -> tuple[StageConfig, ...]:
        """The stages; one where there is no curriculum; none without a mixture."""
        return self.stages or ((StageConfig(mixture=self.mixture),) if self.mixture else ())

    @property
    def mixed_folders(self) -> tuple[str, ...]:
        """Folders of all mixtures in the order in which they are first named, which numbers the sources."""
        return tuple(dict.fromkeys(folder for stage in self.mixtures for folder in stage.mixture))


def options_of(stated: DatasetOptions, kind: type[DatasetOptions]) -> dict[str, Any]:
    """The options of a kind by name, as something states them that has others beside."""
    return {one.name: getattr(stated, one.name) for one in fields(kind)}
