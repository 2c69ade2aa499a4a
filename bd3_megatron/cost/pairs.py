"""How many query-key pairs of one head there are: allowed by visibility, needed by the loss, executed by a backend.

The rule is that of attention/visibility: noisy sees its own block and all clean blocks before it; clean sees clean
blocks up to its own; nothing crosses a document. With documents a count costs one pass over the blocks.
Torch-free; tested against the predicate itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bd3_megatron.cost.shape import Shape
from bd3_megatron.errors import ConfigError, ShapeError, check_multiple

# The value of attention/tiles, which imports torch and so cannot be imported here.
FLEX_TILE = 128


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of one head and one sequence (means over sequences may be fractions)."""

    noisy: float
    """Of one noisy stream: L(L+S)/2 without documents."""
    clean: float
    """Of the clean stream, all rows: L(L+S)/2 without documents."""
    dead_rows: float
    """Clean rows nobody in the loss sees: S without documents."""
    dead_pairs: float
    """Pairs whose query is a dead row: S L without documents."""


def attended_pairs(length: int, block_size: int, documents: Sequence[int] | None = None) -> Pairs:
    """Allowed pairs of one sequence.

    Args:
        length: L, clean tokens.
        block_size: S, divides L (1: causal).
        documents: lengths of the packed documents in order, adding up to L; None: one document.

    Raises:
        ShapeError: the documents do not add up to L, or one is empty.
        ConfigError: S does not divide L.
    """
    check_multiple("seq_len", length, "block_size", block_size)
    if documents is None:
        # a noisy stream: own blocks L S, clean blocks before L (L - S) / 2; a clean one: the same sum
        half = length * (length + block_size) // 2
        return Pairs(noisy=half, clean=half, dead_rows=block_size, dead_pairs=block_size * length)
    if sum(documents) != length or min(documents) < 1:
        raise ShapeError(
            f"documents {list(documents)} add up to {sum(documents)} tokens with a shortest of {min(documents)}; "
            f"give positive lengths adding up to seq_len={length}."
        )
    return _sum([_document_pairs(start, size, block_size) for start, size in _placed(documents)])


def mean_pairs(samples: Sequence[Pairs]) -> Pairs:
    """Average over sequences with different documents.

    Raises:
        ShapeError: there is none.
    """
    if not samples:
        raise ShapeError("no sequence was given to average attended pairs over; give at least one.")
    total = _sum(samples)
    n = len(samples)
    return Pairs(
        noisy=total.noisy / n, clean=total.clean / n, dead_rows=total.dead_rows / n, dead_pairs=total.dead_pairs / n
    )


def _placed(documents: Sequence[int]) -> list[tuple[int, int]]:
    starts = [sum(documents[:i]) for i in range(len(documents))]
    return list(zip(starts, documents, strict=True))


def _document_pairs(start: int, size: int, block_size: int) -> Pairs:
    """Pairs of a document at [start, start + size): ragged first and last block, whole blocks between."""
    stop = start + size
    first_end = min(stop, (start // block_size + 1) * block_size)
    inner, tail = divmod(stop - first_end, block_size)
    parts = [first_end - start, *[block_size] * inner, *([tail] if tail else [])]
    # a document with many whole blocks: sums of squares and of prefixes in closed form would save nothing worth a bug
    own = sum(p * p for p in parts)
    before = seen = 0
    for part in parts:
        before += part * seen
        seen += part
    # no noisy row of the document sees the clean rows of its last block: they are dead, with all their pairs
    return Pairs(noisy=own + before, clean=own + before, dead_rows=parts[-1], dead_pairs=parts[-1] * size)


def _sum(samples: Sequence[Pairs]) -> Pairs:
    return Pairs(
        noisy=sum(s.noisy for s in samples),
        clean=sum(s.clean for s in samples),
        dead_rows=sum(s.dead_rows for s in samples),
        dead_pairs=sum(s.dead_pairs for s in samples),
    )


def executed_pairs(
    shape: Shape, backend: str, *, pairs: Pairs | None = None, dropped_rows: int = 0, tile: int = FLEX_TILE
) -> float:
    """Pairs of one head, sequence and layer that a backend computes.

    Args:
        shape: sizes.
        backend: structured, dense, flex or triton.
        pairs: allowed pairs (documents); None: no documents.
        dropped_rows: clean rows, the last of the sequence, that are not computed at all (0 or S).
        tile: edge of a FlexAttention tile.

    Raises:
        ConfigError: an unknown backend.
    """
    pairs = pairs or attended_pairs(shape.length, shape.block)
    if backend == "structured":
        noisy = shape.views * pairs.noisy if shape.noisy_rows else 0
        clean = pairs.clean - dropped_rows * shape.length if shape.clean_rows else 0
        return noisy + clean
    # the reference computes the whole square, allowed or not
    if backend == "dense":
        return float((shape.rows - dropped_rows) ** 2)
    if backend in ("flex", "triton"):
        return float(_tiled_pairs(shape, dropped_rows, tile))
    raise ConfigError(f"attention backend {backend!r} has no count; use structured, dense, flex or triton.")


def _tiled_pairs(shape: Shape, dropped_rows: int, tile: int) -> int:
    """Pairs in all tiles that hold at least one allowed pair; L^2 + 2 tile L when S properly divides the tile.

    Streams are tiled each on its own; rows are padded to whole tiles, as the kernel's tail tiles are computed in full.
    """
    length, block = shape.length, shape.block
    clean_length = length - dropped_rows
    own = before = causal = 0
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        first, last = start // block * block, -(-stop // block) * block
        own += _tiles(first, last, tile)
        # noisy rows of this tile see clean [0, block start of its last row)
        before += _tiles(0, min((stop - 1) // block * block, clean_length), tile)
        if start < clean_length:
            causal += _tiles(0, min(last, clean_length), tile)
    area = tile * tile
    noisy = (own + (before if shape.clean_rows else 0)) * shape.views if shape.noisy_rows else 0
    return area * (noisy + (causal if shape.clean_rows else 0))


def _tiles(start: int, stop: int, tile: int) -> int:
    return -(-stop // tile) - start // tile if stop > start else 0
