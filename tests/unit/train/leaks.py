"""Backends with a leak planted in them: right in everything but one, often far from where one would look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.attention.select import Backend, named
from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility, positions

Outs = tuple[Tensor | None, Tensor | None]
Pairs = Callable[[Visibility], list[tuple[int, int]]]
"""Positions (of a query row, of a key row) between which something flows that must not."""
WEIGHT = 1e-3
BEYOND = 600
"""A position behind row 512 of each stream and of the pair."""


@dataclass(frozen=True)
class Extra:
    """Outputs of some rows get a little of the values of rows they must not see."""

    pairs: Pairs
    q_noisy: bool = True
    k_noisy: bool = False
    when: Callable[[Visibility], bool] = lambda visibility: True
    head: int | None = None
    sequence: int | None = None
    weight: float = WEIGHT

    def __call__(self, attend: Attend) -> Attend:
        def leaky(noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float) -> Outs:
            outs = list(attend(noisy, clean, visibility, scale=scale))
            asking, asked = (noisy if self.q_noisy else clean), (noisy if self.k_noisy else clean)
            which = 0 if self.q_noisy else 1
            if asking is None or asked is None or outs[which] is None or not self.when(visibility):
                return outs[0], outs[1]
            q_row = _row_of(visibility.noisy_rows if self.q_noisy else visibility.clean_rows)
            k_row = _row_of(visibility.noisy_rows if self.k_noisy else visibility.clean_key_rows)
            found = [(q_row[q], k_row[k]) for q, k in self.pairs(visibility) if q in q_row and k in k_row]
            if found:
                rows, keys = torch.tensor(found).unbind(1)
                mine = torch.zeros_like(outs[which])  # type: ignore[arg-type]
                share = asking.q_BLNH.shape[2] // asked.v_BLGH.shape[2]
                values = asked.v_BLGH.repeat_interleave(share, 2)[:, keys]
                mine = mine.index_add(1, rows, (self.weight * values).to(mine.dtype))
                kept = torch.ones_like(mine)
                if self.head is not None:
                    kept *= torch.arange(mine.shape[2])[:, None] == self.head
                if self.sequence is not None:
                    kept *= torch.arange(mine.shape[0])[:, None, None, None] == self.sequence
                outs[which] = outs[which] + mine * kept
            return outs[0], outs[1]

        return leaky


def _row_of(rows: Any) -> dict[int, int]:
    return {int(position): row for row, position in enumerate(positions(rows))}


@dataclass(frozen=True)
class Other:
    """The backend works under another visibility than the one it was given."""

    change: Callable[[Visibility], Visibility]

    def __call__(self, attend: Attend) -> Attend:
        def leaky(noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float) -> Outs:
            return attend(noisy, clean, self.change(visibility), scale=scale)

        return leaky


@dataclass(frozen=True)
class InGradient:
    """Right outputs; the gradient of one tensor's row gets some of another row's."""

    tensor: str
    """q, k or v."""
    to: int = 1
    of: int = -1
    is_noisy: bool = True
    when: Callable[[Visibility], bool] = lambda visibility: True

    def __call__(self, attend: Attend) -> Attend:
        def leaky(noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float) -> Outs:
            stream = noisy if self.is_noisy else clean
            if stream is not None and self.when(visibility) and stream.q_BLNH.shape[1]:
                name = {"q": "q_BLNH", "k": "k_BLGH", "v": "v_BLGH"}[self.tensor]
                stream = replace(stream, **{name: _Tampered.apply(getattr(stream, name), self.to, self.of)})
            streams = (stream, clean) if self.is_noisy else (noisy, stream)
            return attend(*streams, visibility, scale=scale)

        return leaky


class _Tampered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, to: int, of: int) -> Tensor:
        ctx.rows = to, of
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        to, of = ctx.rows
        grad = upstream[0].clone()
        grad[:, to] += 0.1 * upstream[0][:, of]
        return grad, None, None


@dataclass
class FromLastCall:
    """A buffer that is not cleared: the next call's outputs get some of this call's values."""

    kept: list[Tensor] = field(default_factory=list)

    def __call__(self, attend: Attend) -> Attend:
        def leaky(noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float) -> Outs:
            out, out_clean = attend(noisy, clean, visibility, scale=scale)
            if noisy is not None and out is not None:
                # only a later view's call has no clean queries, and follows one of the same micro-batch
                if not visibility.clean_rows and self.kept and self.kept[0].shape == noisy.v_BLGH.shape:
                    share = noisy.q_BLNH.shape[2] // noisy.v_BLGH.shape[2]
                    out = out + WEIGHT * self.kept[0].repeat_interleave(share, 2)
                self.kept[:] = [noisy.v_BLGH]
            return out, out_clean

        return leaky


def _blocks(visibility: Visibility, shift: int) -> list[tuple[int, int]]:
    """The first row of every block with the first row of a block so many further on."""
    size = visibility.block_size
    starts = range(0, visibility.length, size)
    return [(start, start + shift * size) for start in starts if 0 <= start + shift * size < visibility.length]


def _is_last_layer(visibility: Visibility) -> bool:
    return not visibility.clean_rows and bool(visibility.clean_key_rows)


def _is_dropped(visibility: Visibility) -> bool:
    return bool(visibility.clean_rows) and visibility.clean_rows[-1][1] < visibility.length


def _blocks_twice_as_large(visibility: Visibility) -> Visibility:
    return replace(visibility, block_size=2 * visibility.block_size)


def _without_documents(visibility: Visibility) -> Visibility:
    return replace(visibility, document_id_BL=None)


def _whole_block_documents(visibility: Visibility) -> Visibility:
    """Borders inside blocks move to the end of their block."""
    documents = visibility.document_id_BL
    if documents is None:
        return visibility
    firsts = torch.arange(visibility.length) // visibility.block_size * visibility.block_size
    return replace(visibility, document_id_BL=documents[:, firsts].contiguous())


def _documents_of_the_first(visibility: Visibility) -> Visibility:
    documents = visibility.document_id_BL
    return visibility if documents is None else replace(visibility, document_id_BL=documents[:1].expand_as(documents))


LEAKS: dict[str, Callable[[Attend], Attend]] = {
    "noisy rows see their own clean block": Extra(lambda v: _blocks(v, 0)),
    "noisy rows see the next clean block": Extra(lambda v: _blocks(v, 1)),
    "noisy rows see the noisy block before": Extra(lambda v: _blocks(v, -1), k_noisy=True),
    "noisy rows see the noisy block after": Extra(lambda v: _blocks(v, 1), k_noisy=True),
    "clean rows see the next clean block": Extra(lambda v: _blocks(v, 1), q_noisy=False),
    "clean rows see noise": Extra(lambda v: _blocks(v, 0), q_noisy=False, k_noisy=True),
    "noisy rows see every clean row": Extra(lambda v: [(q, k) for q in range(v.length) for k in range(v.length)]),
    "a row of the last tile sees its own clean block": Extra(lambda v: [(BEYOND, BEYOND)]),
    "a row of the last tile sees the last clean row": Extra(lambda v: [(BEYOND - 20, v.length - 17)]),
    "the last noisy row sees the one of a block before": Extra(lambda v: [(v.length - 1, v.length - 17)], k_noisy=True),
    "a clean row of the last tile looks ahead": Extra(lambda v: [(BEYOND - 20, BEYOND)], q_noisy=False),
    "rows from 64 on leak where the last clean block is dropped": Extra(lambda v: [(68, 70)], when=_is_dropped),
    "only the last layer's call leaks": Extra(lambda v: _blocks(v, 0), when=_is_last_layer),
    "only the other layers' calls leak": Extra(lambda v: _blocks(v, 0), when=lambda v: not _is_last_layer(v)),
    "only the second view leaks": Extra(lambda v: _blocks(v, 0), when=_is_last_layer),
    "a view sees the view before": FromLastCall(),
    "the second chunk of a context-parallel rank leaks": Extra(lambda v: [(v.noisy_rows[-1][0], v.noisy_rows[-1][0])]),
    "clean rows of a context-parallel rank look ahead": Extra(lambda v: _blocks(v, 2), q_noisy=False),
    "documents are forgotten": Other(_without_documents),
    "documents end with their block": Other(_whole_block_documents),
    "all sequences have the documents of the first": Other(_documents_of_the_first),
    "only the second sequence leaks": Extra(lambda v: _blocks(v, 0), sequence=1),
    "only the last head leaks": Extra(lambda v: _blocks(v, 0), head=3),
    "one part in a million leaks": Extra(lambda v: [(16, 16)], weight=1e-6),
    "blocks are twice as large": Other(_blocks_twice_as_large),
    "the gradient of a value": InGradient("v"),
    "the gradient of a key": InGradient("k"),
    "the gradient of a query": InGradient("q"),
    "the gradient of a clean value": InGradient("v", is_noisy=False),
    "the gradient of a value in the last layer's call": InGradient("v", when=_is_last_layer),
}


def planted(leak: str, name: str) -> Backend:
    """The backend of a name with a leak in it."""
    return Backend("planted", LEAKS[leak](named(name).attend), "")
