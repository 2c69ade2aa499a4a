"""Cuts the visibility rule into unmasked rectangles: integer arithmetic on row ranges, no tensor, no mask.

Every allowed pair is in exactly one rectangle and no other pair is in any: the pair count is exact. Relies on
`Visibility` for ranges that rise, whole noisy blocks and present keys; refuses documents that are not contiguous.
Costs about 2 log2(blocks) calls per document or chunk; covers are remembered, being pure functions of integers.
Source: dyadic (segment-tree) decomposition of a causal mask; the mask is BD3-LM's (arXiv 2503.09573, section 3).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from bd3_megatron.errors import ShapeError

Ranges = tuple[tuple[int, int], ...]
Who = Literal["noisy", "clean", "pair"]


@dataclass(frozen=True)
class RowRun:
    """A run of query rows held together in memory: `pair` runs hold the noisy and the clean row of each position."""

    who: Who
    noisy_start: int
    """First row in the noisy stream's tensors (0 when the run holds none)."""
    clean_start: int
    """First row in the clean stream's query tensor (0 when the run holds none)."""
    num_rows: int


@dataclass(frozen=True)
class RectangleSeries:
    """`count` equal unmasked rectangles (or, with `causal`, one square triangle), evenly spaced, done in one call."""

    run: int
    who: Who
    """Which rows of the run ask."""
    keys: Literal["noisy", "clean"]
    row: int
    """First query row of the first rectangle, counted in the run."""
    key: int
    """First key row of the first rectangle, counted in the stream's key tensor."""
    num_rows: int
    num_keys: int
    count: int = 1
    spacing: int = 0
    """Distance in rows (and in keys) between neighbouring rectangles."""
    causal: bool = False
    first: bool = False
    """True for the series in which these rows meet their first keys; it opens their softmax statistics."""

    @property
    def num_pairs(self) -> int:
        """Query-key pairs of one head that the rule allows here."""
        streams = 2 if self.who == "pair" else 1
        per_call = self.num_rows * (self.num_keys + 1) // 2 if self.causal else self.num_rows * self.num_keys
        return streams * self.count * per_call


@dataclass(frozen=True)
class RectangleCover:
    """Runs (by row ranges alone) and the series over them (by row ranges and documents)."""

    runs: tuple[RowRun, ...]
    series: tuple[RectangleSeries, ...]

    @property
    def num_pairs(self) -> int:
        """Query-key pairs of one head and one sequence."""
        return sum(series.num_pairs for series in self.series)


@dataclass(frozen=True)
class _Span:
    """Rows of one run, one document, and either whole blocks only or part of a single block."""

    who: Who
    start: int
    stop: int
    noisy_start: int
    clean_start: int
    document: tuple[int, int]


# Bounded: with packed documents every sequence may bring a layout of its own.
@lru_cache(maxsize=512)
def cover_of(block_size: int, noisy_rows: Ranges, clean_rows: Ranges, document_ends: tuple[int, ...]) -> RectangleCover:
    """Cut one visibility into runs and series.

    Clean keys are counted by position: a visibility guarantees that every clean key a row here can see is present, so
    the key tensor begins with position 0 and has no gap up to the last one needed.

    Args:
        block_size: S.
        noisy_rows: positions whose noisy rows are here (queries and keys): rising half-open ranges of whole blocks.
        clean_rows: positions whose clean queries are here: rising half-open ranges.
        document_ends: ends of the documents of one sequence, ascending, the last one being L.

    Returns:
        The cover; equal arguments give the same object.
    """
    runs: list[RowRun] = []
    series: list[RectangleSeries] = []
    for span in _spans(block_size, noisy_rows, clean_rows, document_ends):
        _extend_runs(runs, span)
        row = runs[-1].num_rows - (span.stop - span.start)
        series.extend(_span_series(span, len(runs) - 1, row, block_size))
    return RectangleCover(tuple(runs), tuple(series))


def _spans(block_size: int, noisy_rows: Ranges, clean_rows: Ranges, document_ends: tuple[int, ...]) -> Iterator[_Span]:
    """Cut the rows wherever a stream, a document or the block around a ragged edge begins or ends, in memory order."""
    edges = {edge for pair in noisy_rows + clean_rows for edge in pair} | set(document_ends)
    cuts = edges | {around for edge in edges for around in _block_around(edge, block_size)}
    noisy, clean = _pieces(noisy_rows, cuts), _pieces(clean_rows, cuts)
    documents = list(pairwise((0, *document_ends)))
    order = [*noisy, *(piece for piece in clean if piece not in noisy)]
    for start, stop in order:
        # Noisy and clean rows of a position see the same clean keys before their block, so they share a call.
        who: Who = "clean" if (start, stop) not in noisy else "pair" if (start, stop) in clean else "noisy"
        document = documents[bisect_right(document_ends, start)]
        yield _Span(who, start, stop, noisy.get((start, stop), 0), clean.get((start, stop), 0), document)


def _block_around(edge: int, block_size: int) -> tuple[int, ...]:
    below = edge // block_size * block_size
    return (below, below + block_size) if edge % block_size else ()


def _pieces(ranges: Ranges, cuts: set[int]) -> dict[tuple[int, int], int]:
    """Pieces of `ranges` between cuts -> first row of the piece in the stream's tensor."""
    pieces: dict[tuple[int, int], int] = {}
    row = 0
    rising = sorted(cuts)
    for start, stop in ranges:
        inside = rising[bisect_right(rising, start) : bisect_left(rising, stop)]
        for a, b in pairwise((start, *inside, stop)):
            pieces[a, b] = row
            row += b - a
    return pieces


def _extend_runs(runs: list[RowRun], span: _Span) -> None:
    """Let the last run grow by `span` if the span follows it in memory in every stream; else open a run."""
    num_rows = span.stop - span.start
    if runs and runs[-1].who == span.who:
        last = runs[-1]
        # A run must be one strided view, so its rows are neighbours in every stream's tensor.
        noisy_follows = span.who == "clean" or span.noisy_start == last.noisy_start + last.num_rows
        clean_follows = span.who == "noisy" or span.clean_start == last.clean_start + last.num_rows
        if noisy_follows and clean_follows:
            runs[-1] = RowRun(last.who, last.noisy_start, last.clean_start, last.num_rows + num_rows)
            return
    runs.append(RowRun(span.who, span.noisy_start, span.clean_start, num_rows))


def _span_series(span: _Span, run: int, row: int, block_size: int) -> Iterator[RectangleSeries]:
    """Own blocks first (they open the statistics), then the staircase inside the span, then everything before it."""
    size = span.stop - span.start
    document_start, document_stop = span.document
    block_start = span.start // block_size * block_size
    whole = size % block_size == 0
    key = span.start if whole else max(block_start, document_start)
    num_keys = block_size if whole else min(block_start + block_size, document_stop) - key
    # Whole blocks are a series of equal rectangles; a ragged piece of a block is one.
    own = (block_size, num_keys, size // block_size, block_size) if whole else (size, num_keys, 1, 0)
    # With blocks of one token a clean stream is causal and a noisy one strictly causal: one stock causal call each.
    causal = block_size == 1 and size > 1
    if span.who != "clean":
        # Noisy rows come in whole blocks, so the keys before a ragged piece stand right before it.
        yield RectangleSeries(run, "noisy", "noisy", row, span.noisy_start - span.start + key, *own, first=True)
    if span.who != "noisy" and causal:
        yield RectangleSeries(run, "clean", "clean", row, key, size, size, causal=True, first=True)
    elif span.who != "noisy":
        yield RectangleSeries(run, "clean", "clean", row, key, *own, first=True)
    if causal and span.who != "clean":
        # Strictly before: the causal square of the same keys, one row later.
        yield RectangleSeries(run, "noisy", "clean", row + 1, key, size - 1, size - 1, causal=True)
    elif whole and not causal:
        yield from _staircase(span, run, row, block_size)
    # Rows whose block lies behind a cut (a ragged document edge, a context-parallel chunk, a stream that ends earlier)
    # see everything from their document's start up to the cut.
    if document_start < block_start:
        yield RectangleSeries(run, span.who, "clean", row, document_start, size, block_start - document_start)


def _staircase(span: _Span, run: int, row: int, block_size: int) -> Iterator[RectangleSeries]:
    """Inside a run of whole blocks: rows of every odd group of 2^j blocks see the group before, for every j."""
    size, half = span.stop - span.start, block_size
    # Every row sees the blocks before its own: a staircase, halved again and again. Rectangles of one size are equal
    # and evenly spaced, so they make one batched call.
    while half < size:
        full, rest = divmod(size, 2 * half)
        if full:
            yield RectangleSeries(run, span.who, "clean", row + half, span.start, half, half, full, 2 * half)
        # The last group may be cut short by the run's end; its rows still see the whole group before them.
        if rest > half:
            at = full * 2 * half
            yield RectangleSeries(run, span.who, "clean", row + at + half, span.start + at, rest - half, half)
        half *= 2


def document_ends(ids_L: Sequence[int]) -> tuple[int, ...]:
    """Ends of the documents of one sequence.

    Args:
        ids_L: document id of every position.

    Returns:
        Positions at which a document ends, ascending; the last is L.

    Raises:
        ShapeError: if a document's positions are not contiguous (the visibility rule goes by id, rectangles by range).
    """
    ends = [i for i in range(1, len(ids_L)) if ids_L[i] != ids_L[i - 1]]
    starts = [0, *ends]
    if len({ids_L[i] for i in starts}) != len(starts):
        raise ShapeError(
            "document_id_BL names one document at two separate places of a sequence; give each run of positions its own id."
        )
    return (*ends, len(ids_L))
