"""Proves on a run's own rows, heads and dtype that attention sees exactly what the visibility rule allows, forward and backward.

Inputs are codes instead of data. With queries of zero all weights are 1 / (keys that are seen), and values that are one-hot in
the number of their key's piece make every output a list of the pieces its row has seen, head by head; one-hot queries and
upstream gradients make the gradients of keys and values the same list from the other side. A piece is a run of rows that see,
and are seen, alike: part of one block, document and view. What must not be seen must be exactly zero, what must be seen must
have its exact weight. No row, head or sequence is left out. Costs a forward and a backward for every 2 H pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.attention.probe import TOLERANCES
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.visibility import Rows, positions, sees

AttentionCall = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries [Q, B, N, H], keys, values [K, B, G, H]) -> outputs [Q, B, N x H], as a layer calls attention."""

# one row of 16 that is missing or too many changes a weight by 6 %, which bf16 shows
_PIECE_ROWS = 16
# fp32 sums of a few thousand equal weights
_FP32_TOLERANCE = 1e-4
_MOST_VIOLATIONS = 2000


@dataclass(frozen=True)
class Violation:
    """A block whose row sees what it must not, does not see what it must, or sees it with a wrong weight."""

    query: str
    """Such as "noisy block 3", or of several views "noisy block 3 of view 1"."""
    source: str
    found: bool
    """Influence was found and must not be; else it is missing or has the wrong weight."""
    where: str
    """The quantity that shows it."""

    def __str__(self) -> str:
        wrong = "influences it and must not" if self.found else "must influence it as the rule says and does not"
        return f"{self.query}: {self.source} {wrong} ({self.where})"


@dataclass(frozen=True)
class Side:
    """Query rows or key rows of one call: [rows] tables, and the piece of each row in each sequence."""

    view_R: Tensor
    """View of a noisy row; the number of views for clean rows."""
    position_R: Tensor
    piece_TR: Tensor
    """T = B with documents, else 1."""
    pieces: dict[str, Tensor]
    """[T, pieces] of each: "view", "block", "document", "size" (0 where a sequence has fewer pieces)."""

    @property
    def num_pieces(self) -> int:
        return self.pieces["size"].shape[1]


@dataclass(frozen=True)
class VisibilityCase:
    """One call of attention, and what it must see."""

    call: AttentionCall
    queries: Side
    """Whose gradients meet in a key: with context parallelism those of all ranks."""
    keys: Side
    own_q: Tensor
    """Which of these rows the call is given, int64."""
    own_k: Tensor
    request: AttentionRequest
    num_views: int

    @property
    def tolerance(self) -> float:
        """Of a weight, relative; a row too many or too few among 16 changes one by more."""
        return max(TOLERANCES[self.request.dtype], _FP32_TOLERANCE)


def side(rows: list[tuple[int, Rows]], block_size: int, document_id_BL: Tensor | None, device: torch.device) -> Side:
    """Rows of several streams with their pieces.

    Args:
        rows: (view, ranges of positions), in the order of the tensors.
        block_size: S.
        document_id_BL: int64 [B, L], or None.
        device: of the tables.
    """
    position_R = torch.cat([positions(ranges) for _, ranges in rows])
    view_R = torch.cat([torch.full_like(positions(ranges), view) for view, ranges in rows])
    block_R = position_R // block_size
    document_TR = torch.zeros_like(position_R)[None] if document_id_BL is None else document_id_BL[:, position_R]
    part_R = position_R % block_size // _PIECE_ROWS
    fixed_4R = torch.stack([view_R, block_R, part_R, position_R - torch.arange(len(position_R))])
    starts_TR = (fixed_4R.diff(dim=1) != 0).any(0)[None] | (document_TR.diff(dim=1) != 0)
    piece_TR = torch.nn.functional.pad(starts_TR.long().cumsum(1), (1, 0))
    count = int(piece_TR.max()) + 1 if piece_TR.numel() else 0

    def of_pieces(value_TR: Tensor) -> Tensor:
        return value_TR.new_zeros(len(piece_TR), count).scatter_(1, piece_TR, value_TR.expand_as(piece_TR)).to(device)

    ones_TR = torch.ones_like(piece_TR)
    size_TI = torch.zeros(len(piece_TR), count, dtype=torch.int64).scatter_add_(1, piece_TR, ones_TR).to(device)
    table = {"view": of_pieces(view_R[None]), "block": of_pieces(block_R[None]), "document": of_pieces(document_TR)}
    return Side(view_R, position_R, piece_TR.to(device), table | {"size": size_TI})


def violations(problem: VisibilityCase) -> list[Violation]:
    """Everything that one call of attention sees wrongly; collective over the ranks that share the call's rows.

    Returns:
        Violations, each pair of blocks once; empty when visibility is right.
    """
    found: dict[tuple[str, str, bool], Violation] = {}
    # none stops at what it finds: ranks that share rows must make the same calls
    for check in [_keys_coded, _queries_coded] if problem.request.needs_grad else [_keys_coded]:
        for each in check(problem):
            found.setdefault((each.query, each.source, each.found), each)
    return list(found.values())


def _keys_coded(problem: VisibilityCase) -> Iterator[Violation]:
    """Values and keys name their piece: outputs and gradients of queries list what each row has seen."""
    request, k_side = problem.request, problem.keys
    scale, piece_Tq = request.head_dim**-0.5, problem.queries.piece_TR[:, problem.own_q]
    seen_TI = _num_seen(problem)
    for window in _windows(k_side.num_pieces, request.head_dim):
        code = _code(k_side.piece_TR[:, problem.own_k], window, request, heads=1)
        zero = _zeros(problem, len(problem.own_q), request.num_heads)
        query, key, value = (t.requires_grad_(request.needs_grad) for t in (zero, code, code.clone()))
        out = problem.call(query, key, value).unflatten(2, (request.num_heads, -1))
        upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        # a row that sees n keys gives each the weight 1 / n
        weight_TIW = (
            _allowed(problem, slice(None), window) * k_side.pieces["size"][:, None, window] / seen_TI[..., None]
        )
        weight = _of_rows(weight_TIW, piece_Tq)
        yield from _compare(problem, "outputs", _decoded(out, window, request), (weight, weight), piece_Tq, window)
        if request.needs_grad:
            (d_query,) = torch.autograd.grad(out, query, upstream)
            up = _decoded(upstream, window, request)
            expected = scale * weight * (up - (weight * up).sum(-1, keepdim=True))
            # rounding is relative to the two terms of which this is the difference
            made = _decoded(d_query, window, request)
            limits = (expected, 4 * scale * weight)
            yield from _compare(problem, "gradients of queries", made, limits, piece_Tq, window)


def _queries_coded(problem: VisibilityCase) -> Iterator[Violation]:
    """Queries and upstream gradients name their piece: gradients of values and keys list who has seen each key."""
    request, q_side = problem.request, problem.queries
    scale, piece_Tk = request.head_dim**-0.5, problem.keys.piece_TR[:, problem.own_k]
    seen_TI, all_values = _num_seen(problem), _random_values(problem)
    for window in _windows(q_side.num_pieces, request.head_dim):
        code = _code(
            q_side.piece_TR[:, problem.own_q], window, request, heads=request.num_heads // request.num_kv_heads
        )
        zero = _zeros(problem, len(problem.own_k), request.num_kv_heads)
        query, key, value = (t.requires_grad_() for t in (code.clone(), zero, all_values[problem.own_k]))
        d_key, d_value = torch.autograd.grad(problem.call(query, key, value), (key, value), code.flatten(2))
        allowed_TWJ = _allowed(problem, window)
        # the rows of a piece and the heads of a group meet in a key
        from_each = request.num_heads // request.num_kv_heads * q_side.pieces["size"][:, window] / seen_TI[:, window]
        weight = _of_rows((allowed_TWJ * from_each[..., None]).transpose(1, 2), piece_Tk)
        made = _decoded(d_value, window, request)
        yield from _compare(problem, "gradients of values", made, (weight, weight), piece_Tk, window, of_keys=True)
        values = _decoded(all_values, window, request)
        mean = _mean_values(problem, values, allowed_TWJ, seen_TI[:, window])
        expected = scale * weight * (values[:, problem.own_k] - mean)
        made = _decoded(d_key, window, request)
        limits = (expected, 4 * scale * weight)
        yield from _compare(problem, "gradients of keys", made, limits, piece_Tk, window, of_keys=True)


def _windows(num_pieces: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, num_pieces)) for start in range(0, num_pieces, width))


def _allowed(problem: VisibilityCase, q_window: slice, k_window: slice = slice(None)) -> Tensor:
    """Whether pieces of queries see pieces of keys: bool [T, I, J]."""
    q = {name: table[:, q_window, None] for name, table in problem.queries.pieces.items()}
    k = {name: table[:, None, k_window] for name, table in problem.keys.pieces.items()}
    q_noisy, k_noisy = q["view"] < problem.num_views, k["view"] < problem.num_views
    visible = sees(
        q_is_noisy=q_noisy,
        q_block=q["block"],
        k_is_noisy=k_noisy,
        k_block=k["block"],
        q_document=q["document"],
        k_document=k["document"],
    )
    # a noisy view sees itself and the clean rows, no other view
    return visible & (~k_noisy | (q["view"] == k["view"])) & (q["size"] > 0) & (k["size"] > 0)


def _num_seen(problem: VisibilityCase) -> Tensor:
    """Keys that a row of each query piece sees: [T, I], at least 1."""
    size_TJ = problem.keys.pieces["size"]
    # not all at once: with blocks of one token there are as many pieces as rows
    parts = [
        (_allowed(problem, slice(None), window) * size_TJ[:, None, window]).sum(-1)
        for window in _windows(problem.keys.num_pieces, 256)
    ]
    return torch.stack(parts).sum(0).clamp_min(1)


def _channels(window: slice, request: AttentionRequest, device: torch.device) -> Tensor:
    """The channel of every piece of a window: [B, G, W], shifted from sequence to sequence and group to group."""
    number = torch.arange(window.stop - window.start, device=device)
    batch = torch.arange(request.batch, device=device)[:, None, None]
    group = torch.arange(request.num_kv_heads, device=device)[None, :, None]
    return (number + batch + group) % request.head_dim


def _code(piece_TR: Tensor, window: slice, request: AttentionRequest, *, heads: int) -> Tensor:
    """One-hot [R, B, G x heads, H] of each row's piece within the window, zero outside of it."""
    channel_BGW = _channels(window, request, piece_TR.device)
    number_BR = (piece_TR - window.start).expand(request.batch, -1)
    inside_BR = (number_BR >= 0) & (number_BR < window.stop - window.start)
    index_BGR = torch.where(inside_BR, number_BR, 0)[:, None].expand(-1, request.num_kv_heads, -1)
    hot = torch.nn.functional.one_hot(channel_BGW.gather(2, index_BGR), request.head_dim) * inside_BR[:, None, :, None]
    per_head = hot.to(request.dtype).permute(2, 0, 1, 3)[:, :, :, None]
    return per_head.expand(-1, -1, -1, heads, -1).flatten(2, 3).contiguous()


def _decoded(rows: Tensor, window: slice, request: AttentionRequest) -> Tensor:
    """[R, B, heads, H] -> what it holds of every piece of the window, fp32 (fp64): [B, R, G, heads / G, W]."""
    wide = rows.detach().to(torch.promote_types(rows.dtype, torch.float32)).transpose(0, 1)
    grouped = wide.unflatten(2, (request.num_kv_heads, -1))
    index = _channels(window, request, rows.device)[:, None, :, None]
    return grouped.gather(4, index.expand(*grouped.shape[:4], -1))


def _of_rows(table_TIW: Tensor, piece_TR: Tensor) -> Tensor:
    """A table by pieces as one by rows: [T, R, 1, 1, W]."""
    return table_TIW.gather(1, piece_TR[..., None].expand(-1, -1, table_TIW.shape[2]))[:, :, None, None]


def _zeros(problem: VisibilityCase, rows: int, heads: int) -> Tensor:
    request = problem.request
    shape = (rows, request.batch, heads, request.head_dim)
    return torch.zeros(shape, dtype=request.dtype, device=problem.keys.piece_TR.device)


def _random_values(problem: VisibilityCase) -> Tensor:
    """Values of all keys, [K, B, G, H], equal on every rank."""
    request, rows = problem.request, len(problem.keys.position_R)
    shape = (rows, request.batch, request.num_kv_heads, request.head_dim)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return values.to(problem.keys.piece_TR.device, request.dtype)


def _mean_values(problem: VisibilityCase, values: Tensor, allowed_TWJ: Tensor, seen_TW: Tensor) -> Tensor:
    """Mean, over the keys that a query piece sees, of the channel that names it: [B, 1, G, 1, W]."""
    values_BKGW = values[:, :, :, 0]
    batch, _, groups, width = values_BKGW.shape
    piece_BK = problem.keys.piece_TR.expand(batch, -1)
    index = piece_BK[..., None, None].expand_as(values_BKGW)
    sums = values_BKGW.new_zeros(batch, problem.keys.num_pieces, groups, width).scatter_add_(1, index, values_BKGW)
    total_BGW = torch.einsum("bwj,bjgw->bgw", allowed_TWJ.to(sums.dtype).expand(batch, -1, -1), sums)
    return (total_BGW / seen_TW[:, None])[:, None, :, None]


def _compare(
    problem: VisibilityCase,
    where: str,
    made: Tensor,
    limits: tuple[Tensor, Tensor],
    piece_TR: Tensor,
    window: slice,
    *,
    of_keys: bool = False,
) -> Iterator[Violation]:
    """Where [B, R, G, heads, W] is not (expected, unit of its tolerance); a unit of zero means exactly zero."""
    expected, unit = limits
    is_forbidden = (unit == 0).expand_as(made)
    # negated, so that NaN is wrong too
    is_wrong = torch.where(is_forbidden, made != 0, ~((made - expected).abs() <= problem.tolerance * unit))
    if not is_wrong.any():
        return
    piece_BR = piece_TR.expand(made.shape[0], -1)
    forbidden_BRW, wrong_BRW = is_forbidden[:, :, 0, 0], is_wrong.flatten(2, 3).any(2)
    sequence, row, number = wrong_BRW.nonzero()[:_MOST_VIOLATIONS].unbind(1)
    table = torch.stack(
        [sequence, piece_BR[sequence, row], number + window.start, forbidden_BRW[sequence, row, number]]
    )
    for b, piece, other, found in table.unique(dim=1).t().tolist():
        query, key = (other, piece) if of_keys else (piece, other)
        names = _name(problem, problem.queries, b, query), _name(problem, problem.keys, b, key)
        yield Violation(*names, found=bool(found), where=where)


def _name(problem: VisibilityCase, side: Side, sequence: int, piece: int) -> str:
    row = sequence if len(side.piece_TR) > 1 else 0
    block, view = int(side.pieces["block"][row, piece]), int(side.pieces["view"][row, piece])
    if view == problem.num_views:
        return f"clean block {block}"
    return f"noisy block {block}" + (f" of view {view}" if problem.num_views > 1 else "")
