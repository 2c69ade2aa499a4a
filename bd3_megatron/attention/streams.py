"""What an attention backend takes and gives back: the noisy and the clean stream, each with its queries, keys, values.

Decides: the layout (B, rows, heads, head dim), what must agree before a backend may start, and how rows of both streams are
joined and cut without copies where they are neighbours in memory.
Refuses: row counts that differ from the visibility's, head counts that do not divide, streams that do not match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bd3_megatron.attention.visibility import Rows, Visibility, num_rows
from bd3_megatron.errors import ShapeError, check_divides, check_shape


@dataclass(frozen=True)
class Stream:
    """Queries, keys and values of one half, rotary angles already applied."""

    q_BLNH: Tensor
    """[B, query rows, N, H]; rows follow visibility.noisy_rows or clean_rows."""
    k_BLGH: Tensor
    """[B, key rows, G, H]; rows follow visibility.noisy_rows or clean_key_rows; G divides N."""
    v_BLGH: Tensor
    """[B, key rows, G, H]."""


class Attend(Protocol):
    """A backend: softmax(scale q k^T) v under the visibility, for both streams at once."""

    def __call__(
        self, noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns (out_noisy_BLNH, out_clean_BLNH), None for a stream that is absent."""
        ...


class AttendRows(Protocol):
    """A backend that works on the rows of both streams as one tensor, and need not have them cut."""

    def __call__(
        self, q_BQNH: Tensor, k_BRGH: Tensor, v_BRGH: Tensor, visibility: Visibility, *, scale: float
    ) -> Tensor:
        """Of queries and keys [noisy; clean] the outputs [noisy; clean]; an absent stream has no rows."""
        ...


def attend_joined(
    attend_rows: AttendRows, noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """Both streams through a backend that works on all rows at once, as `Attend` has them.

    Raises:
        ShapeError: the streams do not fit the visibility.
    """
    check_streams(noisy, clean, visibility)
    streams = [s for s in (noisy, clean) if s is not None]
    q, k, v = (
        joined_rows(rows, dim=1)
        for rows in ([s.q_BLNH for s in streams], [s.k_BLGH for s in streams], [s.v_BLGH for s in streams])
    )
    out = attend_rows(q, k, v, visibility, scale=scale)
    if noisy is None or clean is None:
        return (out, None) if clean is None else (None, out)
    # noisy rows stand first, so one cut parts the outputs of the two streams
    rows = num_rows(visibility.noisy_rows)
    part_noisy, part_clean = parted(out, [rows, out.size(1) - rows], dim=1)
    return part_noisy, part_clean


def joined_rows(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenated along `dim`: a view where the pieces lie one behind the other in one tensor's memory, else a copy.

    Its gradient is handed back as views.
    """
    return pieces[0] if len(pieces) == 1 else _Joined.apply(dim, *pieces)  # type: ignore[no-any-return]


def parted(rows: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """Cut along `dim` into views whose gradients are joined: without a copy where they lie one behind the other."""
    return _Parted.apply(rows, tuple(sizes), dim)  # type: ignore[no-any-return]


def empty_neighbours(like: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Uninitialised tensors [B, rows, heads, H] like those given, None for None, that `joined_rows` along the rows is a view of.

    Rows are outermost in memory, as megatron-core has them.
    """
    present = [t for t in like if t is not None]
    batch, _, *heads = present[0].shape
    rows = present[0].new_empty(sum(t.size(1) for t in present), batch, *heads)
    pieces = iter(rows.transpose(0, 1).split([t.size(1) for t in present], dim=1))
    return [None if t is None else next(pieces) for t in like]


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dim: int, *pieces: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [piece.size(dim) for piece in pieces]
        return _concatenated(pieces, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split(ctx.sizes, dim=ctx.dim)


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        return rows.split(sizes, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _concatenated(grads, ctx.dim), None, None


def _concatenated(pieces: Sequence[Tensor], dim: int) -> Tensor:
    # a piece without rows has no neighbour and adds nothing
    some = [piece for piece in pieces if piece.size(dim)] or pieces[:1]
    first = some[0]
    end = first.storage_offset()
    for piece in some:
        follows = piece.storage_offset() == end and piece.stride() == first.stride()
        if not follows or piece.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return torch.cat(list(some), dim)
        end += piece.size(dim) * piece.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(piece.size(dim) for piece in some)
    return first.as_strided(shape, first.stride())


def check_joined(q_BQNH: Tensor, k_BRGH: Tensor, visibility: Visibility) -> None:
    """Refuse joined rows that are not the visibility's.

    Raises:
        ShapeError: another number of rows.
    """
    noisy, clean = num_rows(visibility.noisy_rows), num_rows(visibility.clean_rows)
    check_shape("q_BQNH", q_BQNH.shape, (None, noisy + clean, None, None))
    check_shape("k_BRGH", k_BRGH.shape, (None, noisy + num_rows(visibility.clean_key_rows), None, None))


def check_streams(noisy: Stream | None, clean: Stream | None, visibility: Visibility) -> None:
    """Refuse streams that do not fit the visibility or each other.

    Raises:
        ShapeError: a stream is missing or too many, or its shapes are not [B, rows, heads, H] with G dividing N.
    """
    streams: list[Stream] = []
    for name, stream, q_rows, k_rows in (
        ("noisy", noisy, visibility.noisy_rows, visibility.noisy_rows),
        ("clean", clean, visibility.clean_rows, visibility.clean_key_rows),
    ):
        # keys decide: the last layer and further noisy views have clean keys without clean queries
        if (stream is None) != (not k_rows):
            found, wanted = ("absent", "has rows for it") if stream is None else ("given", "has no rows for it")
            raise ShapeError(f"The {name} stream is {found}, but the visibility {wanted}; give both or neither.")
        if stream is not None:
            _check_stream(name, stream, q_rows, k_rows)
            streams.append(stream)
    if not streams:
        raise ShapeError("Neither a noisy nor a clean stream was given; give at least one.")
    batch, _, num_heads, head_dim = streams[0].q_BLNH.shape
    # with one stream these compare it with itself
    check_shape("clean k_BLGH", streams[-1].k_BLGH.shape, (batch, None, streams[0].k_BLGH.shape[2], head_dim))
    check_shape("clean q_BLNH", streams[-1].q_BLNH.shape, (batch, None, num_heads, head_dim))
    # document ids cover whole sequences, also where the rows are a context-parallel slice
    documents = visibility.document_id_BL
    if documents is not None:
        check_shape("document_id_BL", documents.shape, (batch, visibility.length))


def _check_stream(name: str, stream: Stream, q_rows: Rows, k_rows: Rows) -> None:
    check_shape(f"{name} q_BLNH", stream.q_BLNH.shape, (None, num_rows(q_rows), None, None))
    batch, _, num_heads, head_dim = stream.q_BLNH.shape
    check_shape(f"{name} k_BLGH", stream.k_BLGH.shape, (batch, num_rows(k_rows), None, head_dim))
    check_shape(f"{name} v_BLGH", stream.v_BLGH.shape, stream.k_BLGH.shape)
    check_divides("num_kv_heads", stream.k_BLGH.shape[2], "num_heads", num_heads, kind=ShapeError)
