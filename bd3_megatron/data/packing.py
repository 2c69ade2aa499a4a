"""Packing: from documents of any length to rows of exactly L tokens, by three rules.

Contract: `wrap` cuts documents laid end to end every L tokens; `isolated` pads each document to a multiple of the
diffusion block S and restarts positions with it; `pad` gives every document rows of its own.
Refuses: sequence lengths or blocks that do not fit, special tokens with isolated rows, splits shorter than one row.
Costs: 10 to 50 microseconds a row; `isolated` and `pad` read all document ends once at the start (8 bytes a document).
Source: wrap as in the official dataloader's _group_texts, without its loss of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.shards import TokenShards
from bd3_megatron.errors import ConfigError, DataError, check_multiple, counted

MODES = ("wrap", "isolated", "pad")
_MAX_CACHED_SHARDS = 4096

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PackingRule:
    """How documents become rows."""

    seq_len: int
    """L, tokens of a row."""
    mode: str = "wrap"
    """wrap, isolated or pad."""
    block_size: int | None = None
    """Diffusion block S: isolated documents begin at its multiples, and end tokens fill the block in which one ends."""
    append_eos: bool = True
    """An end token after every document."""
    wrap_special: bool = False
    """Rows are BOS + L-2 tokens + EOS (LM1B and the zero-shot sets of the paper)."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"packing={self.mode} is not known; use wrap, isolated or pad.")
        # With `wrap_special` a row spends two positions on BOS and EOS, and must hold one token of text beside them.
        if self.seq_len < 1 + 2 * self.wrap_special:
            raise ConfigError(f"seq_len={self.seq_len} holds no text; use {1 + 2 * self.wrap_special} or more.")
        # BOS at position 0 would shift every document off the diffusion-block boundary that `isolated` guarantees.
        if self.wrap_special and self.mode != "wrap":
            raise ConfigError(f"wrap_special=True needs packing=wrap, not {self.mode}; switch one of them off.")
        if self.mode != "isolated":
            return
        if self.block_size is None or self.block_size < 1:
            raise ConfigError(
                f"packing=isolated aligns documents to diffusion blocks, and block_size is {self.block_size}; "
                "give a divisor of seq_len."
            )
        check_multiple("seq_len", self.seq_len, "block_size", self.block_size)

    @property
    def payload(self) -> int:
        """Places of the virtual stream in one row."""
        return self.seq_len - 2 * self.wrap_special

    @property
    def alignment(self) -> int:
        """Documents begin at multiples of this in the virtual stream."""
        if self.mode == "isolated":
            assert self.block_size is not None  # __post_init__
            return self.block_size
        # The three modes are one rule: a document takes ceil((length + E) / a) * a places of a virtual stream, E being
        # 1 where an end token follows it and a = 1, S or L; rows are cut from that stream.
        return self.seq_len if self.mode == "pad" else 1

    @property
    def fill(self) -> int:
        """End tokens with loss follow a document up to a multiple of this; 1: none do."""
        # Positions of a block are revealed in any order. Were the rest of a block without loss, the model would learn the
        # law of a position given that the text reaches it, and texts would come out too long.
        return 1 if self.mode == "wrap" or not self.append_eos else self.block_size or 1

    @property
    def pads(self) -> bool:
        """Rows may hold padding; then the last incomplete row is filled up, not dropped."""
        return self.mode != "wrap"


def rule_of_recipe(
    recipe: Mapping[str, bool],
    *,
    seq_len: int,
    mode: str,
    block_size: int | None,
    append_eos: bool | None = None,
    wrap_special: bool | None = None,
) -> PackingRule:
    """The rule that a split's recipe gives, where nothing else is asked for.

    Args:
        recipe: append_eos and wrap_special, where the split has rules of its own.
        seq_len: L.
        mode: wrap, isolated or pad.
        block_size: diffusion block S, for isolated.
        append_eos: None: the recipe's, else True.
        wrap_special: None: the recipe's, else False; only wrap has such rows.

    Raises:
        ConfigError: the parts do not fit together.
    """
    special = recipe.get("wrap_special", False) if wrap_special is None else wrap_special
    return PackingRule(
        seq_len=seq_len,
        mode=mode,
        block_size=block_size,
        append_eos=recipe.get("append_eos", True) if append_eos is None else append_eos,
        # A recipe states the paper's setting, which is wrap; another mode drops the special tokens instead of failing.
        wrap_special=special and mode == "wrap",
    )


class PackedArrays(NamedTuple):
    """Rows as numpy arrays; see CleanBatch for the meaning of the optional ones."""

    tokens_BL: Ints
    document_id_BL: Ints | None
    is_padding_BL: NDArray[np.bool_] | None
    position_BL: Ints | None
    is_fill_BL: NDArray[np.bool_] | None
    is_supervised_BL: NDArray[np.bool_] | None

    def row(self, number: int) -> PackedArrays:
        """One row, its arrays [L] being views."""
        rest = [None if array is None else array[number] for array in self[1:]]
        return PackedArrays(self.tokens_BL[number], *rest)


@dataclass
class PackedRows:
    """The rows of one split under one rule; row ids are in [0, num_rows)."""

    shards: TokenShards
    rule: PackingRule
    num_rows: int = field(init=False)
    _shard_places: Ints = field(init=False, repr=False)
    _places: dict[int, Ints] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        # Rows that begin and end anywhere would give an answer without its prompt, or prompts alone.
        if self.shards.num_supervised is not None and not self.rule.pads:
            raise ConfigError(
                f"packing={self.rule.mode} cuts documents anywhere, and {self.shards.where} holds prompts with their answers; "
                "use packing=isolated, or pad."
            )
        lengths = [self._stream_length(shard) for shard in range(self.shards.num_shards)]
        # int64: a corpus exceeds 2^31 tokens, and cumsum must not fall back to the platform's int.
        self._shard_places = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        total = int(self._shard_places[-1])
        whole, rest = divmod(total, self.rule.payload)
        # Under wrap the last incomplete row of the whole split is dropped; the official code drops one per 1000
        # documents.
        self.num_rows = whole + (1 if rest and self.rule.pads else 0)
        if self.num_rows == 0:
            raise DataError(
                f"{self.shards.where} holds {counted(total, 'token')}, fewer than one row of seq_len={self.rule.seq_len}; "
                "use a shorter seq_len, more text, or packing=pad."
            )

    @property
    def utilisation(self) -> float:
        """Share of positions that hold text or its special tokens."""
        rows = self.num_rows * self.rule.seq_len
        if not self.rule.pads:
            # Wrapped rows are full: every position holds text or one of its special tokens.
            return 1.0
        real = sum(self._num_real(shard) for shard in range(self.shards.num_shards))
        return real / rows

    def read(self, row_ids: Ints) -> PackedArrays:
        """Rows by id.

        Args:
            row_ids: int64 [B] in [0, num_rows).

        Returns:
            tokens int64 [B, L] and what else the rule yields.

        Raises:
            DataError: a token outside the vocabulary (a damaged shard).
        """
        size, length = len(row_ids), self.rule.seq_len
        tokens_BL = np.full((size, length), self.shards.special.pad, dtype=np.int64)
        first = int(self.rule.wrap_special)
        payload_BL = tokens_BL[:, first : first + self.rule.payload]
        if self.rule.wrap_special:
            tokens_BL[:, 0], tokens_BL[:, -1] = self.shards.special.bos, self.shards.special.eos
        isolated = self.rule.mode == "isolated"
        # Padding until a document is written over it, so what lies behind the last shard needs no code of its own.
        padding_BL = np.ones((size, length), dtype=np.bool_) if self.rule.pads else None
        document_BL = np.zeros((size, length), dtype=np.int64) if isolated else None
        position_BL = np.zeros((size, length), dtype=np.int64) if isolated else None
        fill_BL = np.zeros((size, length), dtype=np.bool_) if self.rule.fill > 1 else None
        supervised_BL = None if self.shards.num_supervised is None else np.zeros((size, length), dtype=np.bool_)
        rows = PackedArrays(tokens_BL, document_BL, padding_BL, position_BL, fill_BL, supervised_BL)
        for row, row_id in enumerate(row_ids.tolist()):
            if padding_BL is None:
                self._fill_wrapped(payload_BL[row], row_id)
            else:
                self._fill_aligned(rows.row(row), row_id)
        self._check_vocabulary(tokens_BL, row_ids)
        return rows

    # Loader processes recompute document places: to pickle them costs 8 bytes a document for every process.
    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_places": {}}

    def _fill_wrapped(self, out: Ints, row_id: int) -> None:
        """Copy a row without alignment: the tokens between two places lie end to end, only end tokens come between."""
        for shard, start, stop, offset in self._spans(row_id):
            tokens = self.shards.tokens(shard)
            span = out[offset : offset + stop - start]
            if not self.rule.append_eos:
                span[:] = tokens[start:stop]
                continue
            places = self._places_of(shard)
            first = int(np.searchsorted(places, start, side="right")) - 1
            last = int(np.searchsorted(places, stop, side="right")) - 1
            # An end token takes the last position of its document: documents first..last-1 end inside the span.
            source = start - first
            written = 0
            for end in (places[first + 1 : last + 1] - 1 - start).tolist():
                span[written:end] = tokens[source : source + end - written]
                source += end - written
                span[end] = self.shards.special.eos
                written = end + 1
            span[written:] = tokens[source : source + len(span) - written]

    def _fill_aligned(self, row: PackedArrays, row_id: int) -> None:
        """Write a row of padded documents; its arrays [L] hold padding already. Documents are numbered from 0 in a row,
        positions restart with each, and what is left behind the last shard counts as one more."""
        number = end = 0
        for shard, start, stop, offset in self._spans(row_id):
            places, end = self._places_of(shard), offset + stop - start
            first = int(np.searchsorted(places, start, side="right")) - 1
            last = int(np.searchsorted(places, stop, side="left"))
            starts = self._starts(shard, first, last)
            edges = places[first : last + 1].copy()
            # A row may begin and end inside a document; only the part inside the row counts.
            edges[0], edges[-1] = start, stop
            of_place = np.repeat(np.arange(last - first), np.diff(edges))
            place = np.arange(start, stop)
            within = place - places[first:last][of_place]
            length = np.diff(starts)[of_place]
            text_left = length - within
            is_text = text_left > 0
            # behind the end token, up to the end of the block in which it stands
            filled = -(-(length + 1) // self.rule.fill) * self.rule.fill if row.is_fill_BL is not None else length + 1
            is_fill = (text_left < 0) & (within < filled)
            span = row.tokens_BL[offset:end]
            span[is_text] = self.shards.tokens(shard)[(starts[:-1][of_place] + within)[is_text]]
            if self.rule.append_eos:
                span[(text_left == 0) | is_fill] = self.shards.special.eos
            if row.is_padding_BL is not None:
                row.is_padding_BL[offset:end] = (text_left <= -int(self.rule.append_eos)) & ~is_fill
            if row.is_fill_BL is not None:
                row.is_fill_BL[offset:end] = is_fill
            supervised = self.shards.supervised(shard)
            if row.is_supervised_BL is not None and supervised is not None:
                # what ends a document is supervised as its last token is: after an answer, the model is to stop
                row.is_supervised_BL[offset:end] = supervised[starts[:-1][of_place] + np.minimum(within, length - 1)]
            if row.document_id_BL is not None and row.position_BL is not None:
                row.document_id_BL[offset:end] = of_place + number
                row.position_BL[offset:end] = place - edges[:-1][of_place]
            number += last - first
        if row.document_id_BL is not None and row.position_BL is not None:
            row.document_id_BL[end:] = number
            row.position_BL[end:] = np.arange(len(row.position_BL) - end)

    def _spans(self, row_id: int) -> list[tuple[int, int, int, int]]:
        """(shard, start, stop, offset in row) of the parts of a row, in the shards' virtual streams."""
        start = row_id * self.rule.payload
        stop = min(start + self.rule.payload, int(self._shard_places[-1]))
        shard = int(np.searchsorted(self._shard_places, start, side="right")) - 1
        spans, offset = [], 0
        # One row may cross shards, and a shard may be shorter than a row.
        while start < stop:
            base, end = int(self._shard_places[shard]), int(self._shard_places[shard + 1])
            until = min(stop, end)
            if until > start:
                spans.append((shard, start - base, until - base, offset))
                offset += until - start
                start = until
            shard += 1
        return spans

    def _places_of(self, shard: int) -> Ints:
        """Where each document of a shard begins in its virtual stream, and the end after the last: [num_documents + 1]."""
        found = self._places.get(shard)
        if found is None:
            ends = self.shards.document_ends(shard).astype(np.int64)
            lengths: Ints = np.diff(ends, prepend=0)
            found = np.concatenate([[0], np.cumsum(self._num_places(lengths))]).astype(np.int64)
            # The oldest entry goes: the limit bounds memory where a corpus has many thousand shards.
            if len(self._places) >= _MAX_CACHED_SHARDS:
                self._places.pop(next(iter(self._places)))
            self._places[shard] = found
        return found

    def _starts(self, shard: int, first: int, last: int) -> Ints:
        """Where documents [first, last) begin in the shard's tokens, and where the last ends: [last - first + 1]."""
        # Converted before use: numpy turns stored uint64 and int64 together into float64, which is exact only to 2^53.
        ends = self.shards.document_ends(shard)[max(first - 1, 0) : last].astype(np.int64)
        return np.concatenate([[0], ends]) if first == 0 else ends

    def _num_places(self, lengths: Ints) -> Ints:
        step = self.rule.alignment
        return -(-(lengths + int(self.rule.append_eos)) // step) * step

    def _stream_length(self, shard: int) -> int:
        # Without alignment the sizes in the header suffice; opening a split then reads no document ends.
        if self.rule.alignment == 1:
            return self._num_real(shard)
        return int(self._places_of(shard)[-1])

    def _num_real(self, shard: int) -> int:
        num_tokens, num_documents = self.shards.shard_size(shard)
        return num_tokens + num_documents * self.rule.append_eos

    def _check_vocabulary(self, tokens_BL: Ints, row_ids: Ints) -> None:
        # Indexed datasets of others may store signed tokens.
        if tokens_BL.size and not (int(tokens_BL.min()) >= 0 and int(tokens_BL.max()) < self.shards.vocab_size):
            outside = np.argwhere((tokens_BL < 0) | (tokens_BL >= self.shards.vocab_size))
            row, place = (int(n) for n in outside[0])
            raise DataError(
                f"row {int(row_ids[row])} of {self.shards.where} holds token {int(tokens_BL[row, place])}, outside "
                f"[0, {self.shards.vocab_size}): the shard is damaged; find it with tools/inspect_shards.py --verify."
            )
