"""Triton kernels of attention by intervals: each query row sees one run of keys, given as two integers.

Imported only where Triton is installed (see `triton_pair`). Checked by Triton's interpreter on the CPU against the
reference; not measured on a GPU. Names: *_n noisy, *_c clean; `lh` tables are int32 [T, 2, rows]; `turns` tables are
int32 [T, tiles, 4]; strides are those of batch, row and head (`_b`, `_r`, `_h`).
Source: the arithmetic of both passes is flash attention 2's (arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(pointer, row, stride, count, H: tl.constexpr):
    """Load rows [tile, H]; rows at or after `count` read as zero."""
    # the last dimension is dense and H a power of two: columns need neither stride nor mask
    column = tl.arange(0, H)
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=row[:, None] < count, other=0.0)


@triton.jit
def _put_rows(pointer, row, stride, count, values, H: tl.constexpr):
    column = tl.arange(0, H)
    address = pointer + row[:, None] * stride + column[None, :]
    tl.store(address, values.to(pointer.dtype.element_ty), mask=row[:, None] < count)


@triton.jit
def _interval(lh, sequence, row, count):
    """Run of keys of each row; rows that do not exist see none."""
    low = tl.load(lh + sequence * 2 * count + row, mask=row < count, other=0)
    high = tl.load(lh + sequence * 2 * count + count + row, mask=row < count, other=0)
    return low, high


@triton.jit
def _turns(turns, sequence, num_tiles, tile):
    address = turns + (sequence * num_tiles + tile) * 4
    return tl.load(address), tl.load(address + 1), tl.load(address + 2), tl.load(address + 3)


@triton.jit
def _scores(q, k, low, high, col, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Scaled base-2 scores [rows, keys], -inf where a row does not see a key."""
    # `scale` holds log2(e) as well: all statistics are in base 2, so that exp2 serves without a further product
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        s = tl.where((col[None, :] >= low[:, None]) & (col[None, :] < high[:, None]), s, float("-inf"))
    return s


@triton.jit
def _online(s, v, out, top, total, PRECISION: tl.constexpr):
    """One step of the online softmax: (sum of weighted values, running maximum, running sum)."""
    new_top = tl.maximum(top, tl.max(s, 1))
    # A row that has seen nothing yet has -inf on both sides; any finite base keeps its sums at zero.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    out = out * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return out, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def _sweep_keys(
    start, stop, k, v, k_row, v_row, num_keys, scale,
    q_n, low_n, high_n, out_n, top_n, sum_n, q_c, low_c, high_c, out_c, top_c, sum_c,
    NOISY: tl.constexpr, CLEAN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Key tiles from start to stop, for one or both query tiles."""
    for first in range(start, stop, BN):
        col = first + tl.arange(0, BN)
        # one load of keys serves both query tiles: half the traffic of one pass for each stream
        k_tile, v_tile = _rows(k, col, k_row, num_keys, H), _rows(v, col, v_row, num_keys, H)
        if NOISY:
            s = _scores(q_n, k_tile, low_n, high_n, col, scale, MASKED, PRECISION)
            out_n, top_n, sum_n = _online(s, v_tile, out_n, top_n, sum_n, PRECISION)
        if CLEAN:
            s = _scores(q_c, k_tile, low_c, high_c, col, scale, MASKED, PRECISION)
            out_c, top_c, sum_c = _online(s, v_tile, out_c, top_c, sum_c, PRECISION)
    return out_n, top_n, sum_n, out_c, top_c, sum_c


@triton.jit
def _sweep_turns(
    start, full, full_stop, stop, k, v, k_row, v_row, num_keys, scale,
    q_n, low_n, high_n, out_n, top_n, sum_n, q_c, low_c, high_c, out_c, top_c, sum_c,
    NOISY: tl.constexpr, CLEAN: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """All key tiles: masked up to `full`, bare up to `full_stop`, masked to the end."""
    # between `full` and `full_stop` every row sees every key: most tiles pay for no comparison
    out_n, top_n, sum_n, out_c, top_c, sum_c = _sweep_keys(
        start, full, k, v, k_row, v_row, num_keys, scale, q_n, low_n, high_n, out_n, top_n, sum_n,
        q_c, low_c, high_c, out_c, top_c, sum_c, NOISY, CLEAN, True, PRECISION, BN, H)  # fmt: skip
    out_n, top_n, sum_n, out_c, top_c, sum_c = _sweep_keys(
        full, full_stop, k, v, k_row, v_row, num_keys, scale, q_n, low_n, high_n, out_n, top_n, sum_n,
        q_c, low_c, high_c, out_c, top_c, sum_c, NOISY, CLEAN, False, PRECISION, BN, H)  # fmt: skip
    return _sweep_keys(
        full_stop, stop, k, v, k_row, v_row, num_keys, scale, q_n, low_n, high_n, out_n, top_n, sum_n,
        q_c, low_c, high_c, out_c, top_c, sum_c, NOISY, CLEAN, True, PRECISION, BN, H)  # fmt: skip


@triton.jit
def _finish(out, lse, row, out_row, count, values, top, total, H: tl.constexpr):
    # a row that saw no key has a total of 0 and stores zeros, not NaN
    base = tl.where(total > 0, total, 1.0)
    _put_rows(out, row, out_row, count, values / base[:, None], H)
    tl.store(lse + row, top + tl.log2(base), mask=row < count)


@triton.jit
def forward_pair(
    q_n, k_n, v_n, out_n, lse_n, q_c, k_c, v_c, out_c, lse_c, lh_nc, lh_nn, lh_cc, turns_c, turns_n,
    q_n_b, q_n_r, q_n_h, k_n_b, k_n_r, k_n_h, v_n_b, v_n_r, v_n_h,
    q_c_b, q_c_r, q_c_h, k_c_b, k_c_r, k_c_h, v_c_b, v_c_r, v_c_h,
    rows_n, rows_c, keys_c, heads, share, tiles, tiles_n, scale,
    NOISY: tl.constexpr, CLEAN: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Outputs [B, rows, heads, H] (dense) and base-2 statistics [B, heads, rows] of one tile of both streams."""
    # Long tiles first: with the causal staircase they hold the most work.
    tile = tiles - 1 - tl.program_id(0)
    # int64, because b times the batch stride passes 2^31 for long sequences
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    g = h // share
    # without documents one table serves all sequences; the product keeps the type
    sequence = b if PACKED else b * 0
    row = tile * BM + tl.arange(0, BM)
    q_tile_n = _rows(q_n + b * q_n_b + h * q_n_h, row, q_n_r, rows_n, H)
    q_tile_c = _rows(q_c + b * q_c_b + h * q_c_h, row, q_c_r, rows_c, H)
    zero, none, nil = (
        tl.zeros([BM, H], tl.float32),
        tl.full([BM], float("-inf"), tl.float32),
        tl.zeros([BM], tl.float32),
    )
    o_n, t_n, s_n, o_c, t_c, s_c = zero, none, nil, zero, none, nil
    if KEYS:
        low_n, high_n = _interval(lh_nc, sequence, row, rows_n)
        low_c, high_c = _interval(lh_cc, sequence, row, rows_c)
        start, full, full_stop, stop = _turns(turns_c, sequence, tiles, tile)
        o_n, t_n, s_n, o_c, t_c, s_c = _sweep_turns(
            start, full, full_stop, stop, k_c + b * k_c_b + g * k_c_h, v_c + b * v_c_b + g * v_c_h, k_c_r, v_c_r,
            keys_c, scale, q_tile_n, low_n, high_n, o_n, t_n, s_n, q_tile_c, low_c, high_c, o_c, t_c, s_c,
            NOISY, CLEAN, PRECISION, BN, H)  # fmt: skip
    if NOISY:
        # the longer stream sets the grid, so noisy tiles may end before clean ones
        if tile < tiles_n:
            # noisy queries alone see noisy keys; the clean arguments only fill the signature
            low_n, high_n = _interval(lh_nn, sequence, row, rows_n)
            start, full, full_stop, stop = _turns(turns_n, sequence, tiles_n, tile)
            o_n, t_n, s_n, o_c, t_c, s_c = _sweep_turns(
                start, full, full_stop, stop, k_n + b * k_n_b + g * k_n_h, v_n + b * v_n_b + g * v_n_h, k_n_r, v_n_r,
                rows_n, scale, q_tile_n, low_n, high_n, o_n, t_n, s_n, q_tile_c, low_n, high_n, o_c, t_c, s_c,
                True, False, PRECISION, BN, H)  # fmt: skip
            address = (b * rows_n * heads + h) * H
            _finish(out_n + address, lse_n + (b * heads + h) * rows_n, row, heads * H, rows_n, o_n, t_n, s_n, H)
    if CLEAN:
        address = (b * rows_c * heads + h) * H
        _finish(out_c + address, lse_c + (b * heads + h) * rows_c, row, heads * H, rows_c, o_c, t_c, s_c, H)


@triton.jit
def _sweep_for_queries(
    start, stop, k, v, k_row, v_row, num_keys, scale, q, dout, lse, delta, low, high, dq,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BN):
        col = first + tl.arange(0, BN)
        k_tile, v_tile = _rows(k, col, k_row, num_keys, H), _rows(v, col, v_row, num_keys, H)
        # probabilities are rebuilt from the statistics: kept, they would take rows x keys numbers
        p = tl.exp2(_scores(q, k_tile, low, high, col, scale, MASKED, PRECISION) - lse[:, None])
        dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        # delta is the row's sum of dout * out, the second term of softmax's gradient
        ds = p * (dp - delta[:, None])
        dq += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    return dq


@triton.jit
def backward_queries(
    q, dout, lse, delta, dq, k_c, v_c, lh_c, turns_c, k_n, v_n, lh_n, turns_n,
    q_b, q_r, q_h, d_b, d_r, d_h, k_c_b, k_c_r, k_c_h, v_c_b, v_c_r, v_c_h, k_n_b, k_n_r, k_n_h, v_n_b, v_n_r, v_n_h,
    rows, keys_c, heads, share, tiles, scale, softmax_scale,
    KEYS: tl.constexpr, OWN: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """dq [B, rows, heads, H] (dense) of one tile of one stream: over clean keys, and over noisy keys if OWN."""
    tile = tiles - 1 - tl.program_id(0)
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    g = h // share
    sequence = b if PACKED else b * 0
    row = tile * BM + tl.arange(0, BM)
    q_tile = _rows(q + b * q_b + h * q_h, row, q_r, rows, H)
    d_tile = _rows(dout + b * d_b + h * d_h, row, d_r, rows, H)
    statistic = (b * heads + h) * rows + row
    lse_tile = tl.load(lse + statistic, mask=row < rows, other=0.0)
    delta_tile = tl.load(delta + statistic, mask=row < rows, other=0.0)
    total = tl.zeros([BM, H], tl.float32)
    if KEYS:
        k, v = k_c + b * k_c_b + g * k_c_h, v_c + b * v_c_b + g * v_c_h
        low, high = _interval(lh_c, sequence, row, rows)
        start, full, full_stop, stop = _turns(turns_c, sequence, tiles, tile)
        total = _sweep_for_queries(start, full, k, v, k_c_r, v_c_r, keys_c, scale, q_tile, d_tile, lse_tile, delta_tile,
                                   low, high, total, True, PRECISION, BN, H)  # fmt: skip
        total = _sweep_for_queries(full, full_stop, k, v, k_c_r, v_c_r, keys_c, scale, q_tile, d_tile, lse_tile,
                                   delta_tile, low, high, total, False, PRECISION, BN, H)  # fmt: skip
        total = _sweep_for_queries(full_stop, stop, k, v, k_c_r, v_c_r, keys_c, scale, q_tile, d_tile, lse_tile,
                                   delta_tile, low, high, total, True, PRECISION, BN, H)  # fmt: skip
    if OWN:
        k, v = k_n + b * k_n_b + g * k_n_h, v_n + b * v_n_b + g * v_n_h
        low, high = _interval(lh_n, sequence, row, rows)
        start, full, full_stop, stop = _turns(turns_n, sequence, tiles, tile)
        total = _sweep_for_queries(start, full, k, v, k_n_r, v_n_r, rows, scale, q_tile, d_tile, lse_tile, delta_tile,
                                   low, high, total, True, PRECISION, BN, H)  # fmt: skip
        total = _sweep_for_queries(full, full_stop, k, v, k_n_r, v_n_r, rows, scale, q_tile, d_tile, lse_tile,
                                   delta_tile, low, high, total, False, PRECISION, BN, H)  # fmt: skip
        total = _sweep_for_queries(full_stop, stop, k, v, k_n_r, v_n_r, rows, scale, q_tile, d_tile, lse_tile,
                                   delta_tile, low, high, total, True, PRECISION, BN, H)  # fmt: skip
    # `scale` carries log2(e), which a gradient must not: `softmax_scale` is the plain factor
    _put_rows(dq + (b * rows * heads + h) * H, row, heads * H, rows, total * softmax_scale, H)


@triton.jit
def _sweep_for_keys(
    start, stop, q, dout, q_row, d_row, lse, delta, lh, sequence, rows, scale, k, v, col, dk, dv,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    for first in range(start, stop, BM):
        row = first + tl.arange(0, BM)
        q_tile, d_tile = _rows(q, row, q_row, rows, H), _rows(dout, row, d_row, rows, H)
        lse_tile = tl.load(lse + row, mask=row < rows, other=0.0)
        delta_tile = tl.load(delta + row, mask=row < rows, other=0.0)
        low, high = _interval(lh, sequence, row, rows)
        p = tl.exp2(_scores(q_tile, k, low, high, col, scale, MASKED, PRECISION) - lse_tile[:, None])
        dv += tl.dot(tl.trans(p.to(d_tile.dtype)), d_tile, input_precision=PRECISION)
        dp = tl.dot(d_tile, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta_tile[:, None])
        dk += tl.dot(tl.trans(ds.to(q_tile.dtype)), q_tile, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _all_rows_for_keys(
    q, dout, q_row, d_row, lse, delta, lh, turns, sequence, tiles, tile, rows, scale, k, v, col, dk, dv,
    PRECISION: tl.constexpr, BM: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Query rows of one stream and head that see a tile of keys: masked, bare, masked."""
    start, full, full_stop, stop = _turns(turns, sequence, tiles, tile)
    dk, dv = _sweep_for_keys(start, full, q, dout, q_row, d_row, lse, delta, lh, sequence, rows, scale, k, v, col,
                             dk, dv, True, PRECISION, BM, H)  # fmt: skip
    dk, dv = _sweep_for_keys(full, full_stop, q, dout, q_row, d_row, lse, delta, lh, sequence, rows, scale, k, v, col,
                             dk, dv, False, PRECISION, BM, H)  # fmt: skip
    return _sweep_for_keys(full_stop, stop, q, dout, q_row, d_row, lse, delta, lh, sequence, rows, scale, k, v, col,
                           dk, dv, True, PRECISION, BM, H)  # fmt: skip


@triton.jit
def backward_keys(
    k, v, dk, dv, q_n, d_n, lse_n, delta_n, lh_n, turns_n, q_c, d_c, lse_c, delta_c, lh_c, turns_c,
    k_b, k_r, k_h, v_b, v_r, v_h, q_n_b, q_n_r, q_n_h, d_n_b, d_n_r, d_n_h, q_c_b, q_c_r, q_c_h, d_c_b, d_c_r, d_c_h,
    keys, rows_n, rows_c, groups, share, tiles, scale, softmax_scale,
    NOISY: tl.constexpr, CLEAN: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, keys, groups, H] (dense) of one tile of keys, over the query streams that see it."""
    tile = tl.program_id(0)
    b, g = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    sequence = b if PACKED else b * 0
    col = tile * BN + tl.arange(0, BN)
    k_tile = _rows(k + b * k_b + g * k_h, col, k_r, keys, H)
    v_tile = _rows(v + b * v_b + g * v_h, col, v_r, keys, H)
    dk_tile, dv_tile = tl.zeros([BN, H], tl.float32), tl.zeros([BN, H], tl.float32)
    # a program owns its keys and visits all query heads that share them: no atomics, one order of summation
    for member in range(0, share):
        h = g * share + member
        head = b * groups * share + h
        if NOISY:
            dk_tile, dv_tile = _all_rows_for_keys(
                q_n + b * q_n_b + h * q_n_h, d_n + b * d_n_b + h * d_n_h, q_n_r, d_n_r,
                lse_n + head * rows_n, delta_n + head * rows_n, lh_n, turns_n, sequence, tiles, tile, rows_n, scale,
                k_tile, v_tile, col, dk_tile, dv_tile, PRECISION, BM, H)  # fmt: skip
        if CLEAN:
            dk_tile, dv_tile = _all_rows_for_keys(
                q_c + b * q_c_b + h * q_c_h, d_c + b * d_c_b + h * d_c_h, q_c_r, d_c_r,
                lse_c + head * rows_c, delta_c + head * rows_c, lh_c, turns_c, sequence, tiles, tile, rows_c, scale,
                k_tile, v_tile, col, dk_tile, dv_tile, PRECISION, BM, H)  # fmt: skip
    address = (b * keys * groups + g) * H
    _put_rows(dk + address, col, groups * H, keys, dk_tile * softmax_scale, H)
    _put_rows(dv + address, col, groups * H, keys, dv_tile, H)
