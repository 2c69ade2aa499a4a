"""What an attention backend takes and gives back: the noisy and the clean stream, each with its queries, keys, values.

Decides: the layout (B, rows, heads, head dim), and what must agree before a backend may start.
Refuses: row counts that differ from the visibility's, head counts that do not divide, streams that do not match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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
