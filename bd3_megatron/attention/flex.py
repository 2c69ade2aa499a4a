"""Attention of the pair of streams through torch's FlexAttention, with a tile table that is computed, not evaluated.

The pair is laid out as [noisy; clean] rows; tiles of 128 x 128 are skipped, run bare, or run with the visibility rule inside
the kernel. Executes whole tiles: L^2 + 256 L pairs where the rule allows L^2 + S L. Refuses training on CPU (FlexAttention
has no backward there), fp64 on CUDA, and the FLASH kernels where they are not installed, not fast (before Hopper), too wide
(head_dim > 128) or not deterministic. Never runs unfused on CUDA: too many graphs are an error. Not measured on a GPU yet.
Source: torch 2.13 nn/attention/flex_attention.py; arXiv 2412.05496.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bd3_megatron.attention import machine
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.streams import Stream, attend_joined, check_joined
from bd3_megatron.attention.tiles import TILE, executed_tiles, tile_table
from bd3_megatron.attention.visibility import Rows, Visibility, num_rows, on_device, sees
from bd3_megatron.errors import BackendError

KernelName = Literal["TRITON", "FLASH"]

# A graph a phase, kind of call (pair, last layer, further views), gradient mode and batch size: LLaDA2's curriculum of five
# sizes needs some 30. torch's own limit is 8, and beyond it torch runs the unfused form, which holds all L^2 scores.
MAX_GRAPHS = 128


def attend(
    noisy: Stream | None,
    clean: Stream | None,
    visibility: Visibility,
    *,
    scale: float,
    kernel: KernelName = "TRITON",
    call: Callable[..., Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Attention of both streams under the visibility rule.

    Args:
        noisy: queries, keys and values of the noisy rows; None if the stream is absent.
        clean: queries of the clean rows, keys and values of the clean key rows; None if absent.
        visibility: who is here and which documents they belong to.
        scale: factor on the scores.
        kernel: FlexAttention's code generator on CUDA; CPU ignores it.
        call: FlexAttention itself; None: compiled on CUDA, eager on CPU.

    Returns:
        Outputs [B, rows, N, H] in the input's dtype, None for an absent stream.

    Raises:
        BackendError: if a gradient is asked of it on CPU, or the run needs more graphs than `MAX_GRAPHS`.
        ShapeError: if the streams do not fit the visibility.
    """
    return attend_joined(partial(flex_rows, kernel=kernel, call=call), noisy, clean, visibility, scale=scale)


def flex_rows(
    q_BQNH: Tensor,
    k_BRGH: Tensor,
    v_BRGH: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    kernel: KernelName = "TRITON",
    call: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The same of rows that nobody has cut, [noisy; clean]."""
    check_joined(q_BQNH, k_BRGH, visibility)
    q, k, v = (rows.transpose(1, 2) for rows in (q_BQNH, k_BRGH, v_BRGH))
    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise BackendError(_NO_BACKWARD_ON_CPU)
    if call is None:
        call = _eager if on_cpu else compiled()
    # kernel options belong to the code generator; the eager form on CPU has none
    options: dict[str, Any] = {} if on_cpu else {"kernel_options": {"BACKEND": kernel}}
    options |= {"scale": scale, "enable_gqa": q.size(1) != k.size(1)}
    try:
        out = call(q, k, v, block_mask=block_mask(visibility, q.device), **options)
    # torch's own message names dynamo's limits, not the curriculum that ran into them
    except FailOnRecompileLimitHit as limit:
        raise BackendError(_too_many_graphs(visibility)) from limit
    return out.transpose(1, 2)


def refuse(request: AttentionRequest) -> str | None:
    """Why FlexAttention's Triton kernels (on CPU its eager form) cannot serve the request, or None."""
    if request.device_type == "cpu":
        return _NO_BACKWARD_ON_CPU if request.needs_grad else None
    if request.device_type != "cuda":
        return f"flex attention has no kernel for device {request.device_type!r}; use structured or dense."
    if not machine.has("triton"):
        return "flex attention on CUDA is compiled by Triton, which is not installed; install triton or use structured."
    if request.dtype == torch.float64:
        return "flex attention has no fp64 kernel on CUDA; use bfloat16, float16 or float32, or the dense backend."
    return None


def refuse_flash(request: AttentionRequest) -> str | None:
    """Why FlexAttention's FLASH kernels (FlashAttention 4) cannot serve the request, or None."""
    if (reason := refuse(request)) is not None:
        return reason
    if request.device_type != "cuda" or machine.capability() < (9, 0):
        return "flex attention's FLASH kernels need a Hopper or Blackwell GPU; use flex with its Triton kernels."
    if not machine.has("flash_attn") or not machine.has("flash_attn.cute"):
        return "flex attention's FLASH kernels need the package flash-attn-4, which is not installed."
    if request.dtype not in (torch.bfloat16, torch.float16) or request.head_dim > 128:
        return (
            f"flex attention's FLASH kernels take bfloat16 or float16 and head_dim <= 128, not {request.dtype} and "
            f"head_dim={request.head_dim}; use flex with its Triton kernels."
        )
    if request.deterministic and machine.capability() < (10, 0):
        return (
            "flex attention's FLASH backward is not deterministic before Blackwell; use flex with its Triton kernels."
        )
    return None


def executed_pairs(visibility: Visibility, *, batch: int = 1) -> int:
    """Query-key pairs of one head that the GPU kernels compute: whole tiles, summed over the batch."""
    return executed_tiles(visibility, batch=batch) * TILE * TILE


def block_mask(visibility: Visibility, device: torch.device) -> BlockMask:
    """FlexAttention's tile table and in-kernel rule for one visibility, which remembers it.

    Args:
        visibility: rows and documents.
        device: where the table lives.

    Returns:
        A BlockMask over [noisy; clean] query rows x [noisy; clean] key rows.
    """
    return visibility.table(("flex", device), lambda: _build(visibility, device))


_NO_BACKWARD_ON_CPU = "flex attention has no backward on CPU (torch 2.13); use structured, which is exact there."


def _too_many_graphs(visibility: Visibility) -> str:
    return (
        f"flex attention would need more than {MAX_GRAPHS} compiled graphs (this call: length={visibility.length}, "
        f"block_size={visibility.block_size}), and beyond that torch runs it unfused; use fewer block sizes in the "
        "curriculum, or another attention.backend."
    )


def _build(visibility: Visibility, device: torch.device) -> BlockMask:
    partial, full = tile_table(visibility)
    noisy = num_rows(visibility.noisy_rows)
    # without seq_lengths torch would take the rows for a multiple of TILE
    return BlockMask.from_kv_blocks(
        *_ordered(partial, device),
        *_ordered(full, device),
        BLOCK_SIZE=TILE,
        mask_mod=_mask_mod(visibility, device),
        seq_lengths=(noisy + num_rows(visibility.clean_rows), noisy + num_rows(visibility.clean_key_rows)),
    )


def _ordered(tiles_BQK: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per query tile: how many key tiles, and their numbers first in a row (int32 [B, 1, Q], [B, 1, Q, K])."""
    # BlockMask reads only the first `count` numbers of a row; the stable sort keeps them in rising order
    order = torch.argsort(tiles_BQK.to(torch.int8), dim=-1, descending=True, stable=True)
    count = tiles_BQK.sum(-1, dtype=torch.int32)
    return on_device(count[:, None], device), on_device(order[:, None].to(torch.int32).contiguous(), device)


def _mask_mod(visibility: Visibility, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`sees` as FlexAttention calls it: on indices of batch, head, query row, key row."""
    # positions are piecewise linear in the row, so the kernel computes them and loads no table but the document ids
    block_size, border = visibility.block_size, num_rows(visibility.noisy_rows)
    q_position = _position_of((*visibility.noisy_rows, *visibility.clean_rows))
    k_position = _position_of((*visibility.noisy_rows, *visibility.clean_key_rows))
    documents = None if visibility.document_id_BL is None else on_device(visibility.document_id_BL, device)

    def allowed(batch: Tensor, head: Tensor, q_row: Tensor, k_row: Tensor) -> Tensor:
        q, k = q_position(q_row), k_position(k_row)
        return sees(
            q_is_noisy=q_row < border,
            q_block=torch.div(q, block_size, rounding_mode="floor"),
            k_is_noisy=k_row < border,
            k_block=torch.div(k, block_size, rounding_mode="floor"),
            q_document=None if documents is None else documents[batch, q],
            k_document=None if documents is None else documents[batch, k],
        )

    return allowed


def _position_of(ranges: Rows) -> Callable[[Tensor], Tensor]:
    """Row of the pair -> clean position, as a sum of steps: one per range, no table."""
    shifts: list[tuple[int, int]] = []
    row = 0
    for start, stop in ranges:
        shifts.append((row, start - row))
        row += stop - start

    def position(index: Tensor) -> Tensor:
        result = index
        for first_row, shift in shifts:
            result = torch.where(index >= first_row, index + shift, result)
        return result

    return position


# Cached: each call of torch.compile has graphs of its own, and all layers are to share one set.
@cache
def compiled(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """FlexAttention compiled by torch: one fused graph a shape, and FailOnRecompileLimitHit beyond `MAX_GRAPHS`.

    Args:
        backend: torch.compile's; whoever counts graphs gives its own.
    """
    # torch's stubs do not list these two; without fullgraph torch would give up at the limit and go on unfused
    limits: dict[str, Any] = {"recompile_limit": MAX_GRAPHS, "isolate_recompiles": True}
    return torch.compile(flex_attention, backend=backend, fullgraph=True, dynamic=False, **limits)


def _eager(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        # On CPU the unfused form is what we want: it is there to be compared with the reference.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(q, k, v, **options)
