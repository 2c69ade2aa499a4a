"""One shard of a stream: documents read in order, tokenised, packed to rows, shuffled in windows; resumable.

Contract: a stream shard owns a fixed share of the stream's files and yields rows 0, 1, 2, ... without end. A row depends
on the plan and its number only, never on who asks or when the run was interrupted. Rows follow the rules of `packing.py`.
Costs: resuming tokenises at most one window again; asking for a later row tokenises and drops what lies between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.config.load import build
from bd3_megatron.config.ranges import Range
from bd3_megatron.data.cleaning import clean
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.detokenizers import detokenizer
from bd3_megatron.data.held_out import is_held_out
from bd3_megatron.data.packing import Ints, PackedArrays, PackingRule
from bd3_megatron.data.source import BadDocument, Dialogue
from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.errors import ConfigError, DataError
from bd3_megatron.rng import Purpose, permutation_index

# The key of a permutation is the number of the stream shard above 40 bits of window number, so no two share an order.
_WINDOW_BITS = 40
WindowCount = Annotated[int, Range(0, 2**_WINDOW_BITS - 1)]


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What a stream consists of; part of a run's identity, since it decides every row."""

    dataset: HubDataset
    """The stream (streaming=True)."""
    tokenizer_folder: Path
    rule: PackingRule
    num_shards: int
    """Stream shards; at most the stream's number of files. Rows of stream shard j are samples j, j + num_shards, ..."""
    shuffle_rows: int
    """Rows permuted together; 1: none."""
    seed: int = 1
    """run.seed."""
    detokenizer: str = "none"
    held_out_fraction: float = 0.0
    """Documents that a prepared folder with this fraction holds out are left out."""


@dataclass(frozen=True, kw_only=True)
class StreamShardState:
    """The position of a stream shard before a window of rows."""

    window: WindowCount = 0
    epoch: WindowCount = 0
    """How often the files of the stream shard have ended."""
    # A document may span rows: the state points to its beginning and counts what earlier rows took, since a tokenizer
    # cannot start in the middle of a text.
    used_places: WindowCount = 0
    """Places of the document at `stream` that earlier rows took."""
    stream: dict[str, Any] | None = None
    """The datasets library's own state before that document; None: the beginning."""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class RowPacker:
    """Documents in, rows out; holds back what does not fill a row."""

    def __init__(self, rule: PackingRule, special: SpecialIds) -> None:
        self._rule, self._special = rule, special
        self._tokens: Ints = np.zeros(0, dtype=np.int64)
        self._is_padding: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._is_fill: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._document: Ints = np.zeros(0, dtype=np.int64)
        self._num_documents = 0

    @property
    def num_places(self) -> int:
        """Places held back."""
        return len(self._tokens)

    def is_ready(self) -> bool:
        return self.num_places >= self._rule.payload

    def add(self, tokens: NDArray[np.uint32]) -> int:
        """Append a document; returns how many places it takes."""
        # Documents without tokens take no places, as in the packing of prepared shards.
        if len(tokens) == 0:
            return 0
        real = len(tokens) + int(self._rule.append_eos)
        places = -(-real // self._rule.alignment) * self._rule.alignment
        content = np.full(places, self._special.pad, dtype=np.int64)
        content[: len(tokens)] = tokens
        filled = -(-real // self._rule.fill) * self._rule.fill
        # The end token and the fill are one stretch: EOS up to the multiple of `fill`, with loss.
        content[len(tokens) : filled] = self._special.eos
        self._tokens = np.concatenate([self._tokens, content])
        place = np.arange(places)
        self._is_padding = np.concatenate([self._is_padding, place >= filled])
        self._is_fill = np.concatenate([self._is_fill, (place >= real) & (place < filled)])
        self._document = np.concatenate([self._document, np.full(places, self._num_documents)])
        self._num_documents += 1
        return places

    def drop(self, places: int) -> None:
        """Forget the first places."""
        self._tokens, self._is_padding = self._tokens[places:], self._is_padding[places:]
        self._is_fill, self._document = self._is_fill[places:], self._document[places:]

    def row(self) -> PackedArrays:
        """The next row, every array of shape [L]."""
        rule, payload = self._rule, self._rule.payload
        tokens = self._tokens[:payload]
        if rule.wrap_special:
            tokens = np.concatenate([[self._special.bos], tokens, [self._special.eos]])
        padding = self._is_padding[:payload].copy() if rule.pads else None
        fill = self._is_fill[:payload].copy() if rule.fill > 1 else None
        document = position = None
        if rule.mode == "isolated":
            # Document ids count from 0 in every row, so a row does not depend on how many documents came before it.
            document = self._document[:payload] - self._document[0]
            starts = np.flatnonzero(np.diff(document, prepend=-1))
            position = np.arange(payload) - np.repeat(starts, np.diff(starts, append=payload))
        row = PackedArrays(np.array(tokens, dtype=np.int64), document, padding, position, fill, None)
        self.drop(payload)
        return row


class StreamShard:
    """Rows of one stream shard, asked for in increasing order."""

    def __init__(self, plan: StreamPlan, shard: int, state: StreamShardState | None = None) -> None:
        """Open a stream shard where a state left it.

        Args:
            plan: the stream.
            shard: in [0, plan.num_shards).
            state: from `state_before`; None: the beginning.
        """
        self._plan, self._shard = plan, shard
        self._tokenizer = load_tokenizer(plan.tokenizer_folder)
        self._rules = detokenizer(plan.detokenizer)
        self._state = state or StreamShardState()
        self._rows: list[PackedArrays] = []
        self._packer = RowPacker(plan.rule, self._tokenizer.special)
        # The library deals files to its shards by number, so a stream shard has the same files in every process.
        self._dataset = plan.dataset.open().shard(num_shards=plan.num_shards, index=shard)
        if self._state.stream is not None:
            self._dataset.load_state_dict(self._state.stream)
        self._documents = iter(self._dataset)
        self._epoch, self._window = self._state.epoch, self._state.window
        self._before_document, self._places = self._state.stream, 0
        self._skip_places = self._state.used_places
        self._has_read = False
        self._num_rows = 0
        # A pass that began in the middle may end at once; one from the beginning that gives nothing never will.
        self._pass_may_be_empty = self._state.stream is not None

    def row(self, number: int) -> PackedArrays:
        """Row `number`, every array of shape [L].

        Raises:
            DataError: a row before the state's window was asked for, or the stream holds no text.
        """
        size = self._plan.shuffle_rows
        window, place = divmod(number, size)
        if window < self._state.window:
            raise DataError(
                f"stream shard {self._shard} stands at row {self._state.window * size} and was asked for row {number}; "
                "resume the stream from the state saved with the checkpoint."
            )
        # Windows that are passed over must be tokenised too: only the text tells where the next row begins.
        while not self._rows or self._state.window < window:
            self._read_window(keep=self._window == window)
        if size == 1:
            return self._rows[0]
        key = self._shard << _WINDOW_BITS | window
        # The permutation is a function of the window, so a resumed run shuffles as the first run did.
        return self._rows[int(permutation_index(self._plan.seed, Purpose.DATA_ORDER, key, size, place))]

    def state_before(self, number: int) -> StreamShardState:
        """State from which row `number` of the current or the next window can be read again."""
        return self._state if number < self._window * self._plan.shuffle_rows else self._current()

    def _current(self) -> StreamShardState:
        if not self._has_read:
            return self._state
        held_back = self._packer.num_places
        return StreamShardState(
            window=self._window,
            epoch=self._epoch,
            # Held-back places always belong to the last document: rows are taken as soon as one is full.
            used_places=self._places - held_back if held_back else 0,
            stream=self._before_document if held_back else self._dataset.state_dict(),
        )

    def _read_window(self, *, keep: bool) -> None:
        """Read the next window; `keep` is False for windows that are only passed over."""
        self._state, self._rows = self._current(), []
        for _ in range(self._plan.shuffle_rows):
            while not self._packer.is_ready():
                self._read_document()
            row = self._packer.row()
            # One row of a window that is passed over stays, so that `row` sees that a window was read.
            if keep or not self._rows:
                self._rows.append(row)
        self._window += 1

    def _read_document(self) -> None:
        # Before its first document the library reports the beginning of the stream, whatever state was loaded.
        before = self._dataset.state_dict() if self._has_read else self._state.stream
        self._has_read = True
        text = next(self._kept_texts(), None)
        if text is None:
            self._begin_again()
            return
        places = self._packer.add(self._tokenizer.encode(text))
        if places:
            self._before_document, self._places = before, places
            self._pass_may_be_empty = True
        # These places went into rows before the interruption.
        if self._skip_places:
            self._packer.drop(self._skip_places)
            self._skip_places = 0

    def _kept_texts(self) -> Iterator[str]:
        dataset = self._plan.dataset
        for row in self._documents:
            self._num_rows += 1
            document = dataset.document(row, self._where)
            if isinstance(document, BadDocument):
                raise DataError(f"{document.where} {document.reason}; {document.remedy}.")
            # the configuration of a stream names one column of plain text
            assert not isinstance(document, Dialogue)
            cleaned = None if document is None else clean(document, self._rules)
            # The same rule by content as in prepared folders, so a held-out document is never trained on.
            if cleaned is not None and not is_held_out(cleaned.key, self._plan.held_out_fraction):
                yield cleaned.text

    def _where(self) -> str:
        return f"row {self._num_rows - 1}, counted by this process, of stream shard {self._shard} of {self._plan.dataset.path}"

    def _begin_again(self) -> None:
        if not self._pass_may_be_empty:
            raise DataError(
                f"stream shard {self._shard} of {self._plan.dataset.path} holds no text; use fewer stream shards or other data."
            )
        self._epoch += 1
        self._pass_may_be_empty = False
        self._dataset = self._plan.dataset.open().shard(num_shards=self._plan.num_shards, index=self._shard)
        self._documents = iter(self._dataset)


def shard_states(content: Mapping[str, Any]) -> dict[int, StreamShardState]:
    """States of stream shards from JSON, where keys are texts.

    Raises:
        DataError: not what a checkpoint holds.
    """
    if not isinstance(content, Mapping) or not all(shard.isdecimal() for shard in content):
        raise DataError("the saved stream state names no stream shards by number; use another checkpoint.")
    try:
        return {int(shard): build(StreamShardState, state, f"shards.{shard}") for shard, state in content.items()}
    except ConfigError as error:
        raise DataError(
            f"the saved stream state is damaged ({str(error).rstrip('.')}); use another checkpoint."
        ) from error
