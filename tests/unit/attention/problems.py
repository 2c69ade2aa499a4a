"""Random streams for a visibility, a backend's outputs and gradients on them, and the shapes worth trying."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility, num_rows


@dataclass(frozen=True)
class Problem:
    """Streams that fit a visibility, and weights on the outputs that make a scalar of them."""

    noisy: Stream | None
    clean: Stream | None
    visibility: Visibility
    weights: list[Tensor | None]


def problem(
    visibility: Visibility,
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    generator = torch.Generator().manual_seed(7)

    def draw(rows: int, num_heads: int) -> Tensor:
        values = torch.randn(batch, rows, num_heads, head_dim, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    def stream(q_rows: int, k_rows: int) -> Stream | None:
        return Stream(draw(q_rows, heads[0]), draw(k_rows, heads[1]), draw(k_rows, heads[1])) if k_rows else None

    noisy_rows = num_rows(visibility.noisy_rows)
    noisy = stream(noisy_rows, noisy_rows)
    clean = stream(num_rows(visibility.clean_rows), num_rows(visibility.clean_key_rows))
    weights = [None if s is None else draw(s.q_BLNH.shape[1], heads[0]).detach() for s in (noisy, clean)]
    return Problem(noisy, clean, visibility, weights)


def outputs(attend: Attend, p: Problem) -> list[Tensor]:
    return [o for o in attend(p.noisy, p.clean, p.visibility, scale=0.3) if o is not None]


def outputs_and_gradients(attend: Attend, p: Problem) -> list[Tensor]:
    outs = outputs(attend, p)
    inputs = [t for s in (p.noisy, p.clean) if s is not None for t in (s.q_BLNH, s.k_BLGH, s.v_BLGH)]
    grads = torch.autograd.grad(outs, inputs, [w for w in p.weights if w is not None], allow_unused=True)
    return [*outs, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True))]


def worst_difference(actual: list[Tensor], expected: list[Tensor], *, relative: bool = False) -> float:
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        if e.numel():
            unit = e.double().abs().max().clamp_min(1e-3).item() if relative else 1.0
            worst = max(worst, (a.double() - e.double()).abs().max().item() / unit)
    return worst


def zigzag(length: int, block_size: int, rank: int, size: int, documents: Tensor | None = None) -> Visibility:
    """Context-parallel rows: chunks `rank` and its mirror of 2 * size; clean keys gathered from everybody."""
    chunk = length // (2 * size)
    first, last = rank * chunk, (2 * size - 1 - rank) * chunk
    rows = ((first, first + chunk), (last, last + chunk)) if first + chunk < last else ((first, last + chunk),)
    return Visibility(block_size, length, rows, rows, ((0, length),), documents)


def random_documents(length: int, seed: int, batch: int = 2, *, aligned_to: int = 1) -> Tensor:
    """Rising ids with random borders, on multiples of `aligned_to`; every sequence has its own layout."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 5, (batch, length // aligned_to), generator=generator).sort(-1)[0]
    return coarse.repeat_interleave(aligned_to, dim=1)


def visibilities(length: int, block_size: int) -> Iterator[Visibility]:
    """Every kind of visibility a run meets, at one length and block size."""
    rows = ((0, length),)
    layouts = [None, random_documents(length, 1), random_documents(length, 2, aligned_to=block_size)]
    for documents in layouts:
        yield Visibility.pair(length, block_size, documents)
        yield Visibility.clean_only(length, block_size, documents)
        # Last layer: clean rows ask nothing.
        yield Visibility(block_size, length, rows, (), rows, documents)
        if block_size == length:
            yield Visibility.noisy_only(length, documents)
        else:
            # The last clean block is dead and dropped.
            kept = ((0, length - block_size),)
            yield Visibility(block_size, length, rows, kept, kept, documents)
        if length % (4 * block_size) == 0:
            yield from (zigzag(length, block_size, rank, 2, documents) for rank in range(2))
