"""Forwards of the plain model for scoring, under the attention package: no mask of 2L x 2L rows.

Decides which rows run and which backend serves them. Three forwards: noisy rows beside their clean sequence, clean text
whose keys are kept, and noisy blocks that look back on kept keys. Costs: exactly the allowed pairs of rows for the first
two; Q x (C + Q) booleans for Q noisy rows over C kept keys in the third. Knows no noise and no likelihoods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from bd3_megatron.attention import structured
from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.select import choose
from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.diffusion.token_nll import masked_token_nll, next_token_nll
from bd3_megatron.hf.attention_bd3 import grouped_attention
from bd3_megatron.hf.plain_bd3 import ModelShape, PlainBD3, run_layers

LOGIT_BYTES = 64 * 2**20
"""Size of one chunk's logits in fp32."""
PROBE_BATCH = 2
"""Sequences on which a GPU's backends are compared; what they are asked later may be more or fewer."""


def noisy_hidden(model: PlainBD3, noisy_BL: Tensor, clean_BL: Tensor, document_id_BL: Tensor | None) -> Tensor:
    """Normed hidden states of the noisy rows, each beside the clean sequence it belongs to: [B, L, D].

    Args:
        model: plain, block objective.
        noisy_BL, clean_BL: int64, on the model's device.
        document_id_BL: int64 on the CPU; None: one document a row.
    """
    shape, length = model.model.shape, noisy_BL.shape[1]
    # One block fills the sequence (MDLM): no noisy row sees a clean one, so the clean half is dead work.
    if shape.block_size >= length:
        rows = Visibility.noisy_only(length, document_id_BL)
        return _sequence_hidden(model, noisy_BL, rows)
    rows = Visibility.pair(length, shape.block_size, document_id_BL)
    backend = _backend_for(model, rows)
    last, scale = shape.num_hidden_layers - 1, shape.head_dim**-0.5

    def attend(q_BQNH: Tensor, k_BRGH: Tensor, v_BRGH: Tensor, layer: int) -> Tensor:
        noisy, clean = (
            Stream(q_BQNH[:, part], k_BRGH[:, part], v_BRGH[:, part]) for part in (slice(length), slice(length, None))
        )
        # behind the last layer nobody looks at clean rows
        seen = rows.without_clean_queries if layer == last else rows
        mixed = backend(noisy, clean, seen, scale=scale)
        return torch.cat([part for part in mixed if part is not None], dim=1)

    position = torch.arange(length, device=noisy_BL.device)
    ids_BR = torch.cat([noisy_BL, clean_BL], dim=1)
    return run_layers(model.model, ids_BR, position.repeat(2)[None], attend, keep_BQ=position.expand(len(noisy_BL), -1))


def next_token_hidden(model: PlainBD3, ids_BL: Tensor, document_id_BL: Tensor | None = None) -> Tensor:
    """Normed hidden states of an autoregressive model: [B, L, D]; arguments as in `noisy_hidden`."""
    return _sequence_hidden(model, ids_BL, Visibility.clean_only(ids_BL.shape[1], 1, document_id_BL))


def _sequence_hidden(model: PlainBD3, ids_BL: Tensor, rows: Visibility) -> Tensor:
    """Hidden states of one stream alone."""
    shape, is_noisy = model.model.shape, bool(rows.noisy_rows)
    backend = _backend_for(model, rows)

    def attend(q_BQNH: Tensor, k_BRGH: Tensor, v_BRGH: Tensor, layer: int) -> Tensor:
        stream = Stream(q_BQNH, k_BRGH, v_BRGH)
        noisy, clean = (stream, None) if is_noisy else (None, stream)
        mixed = backend(noisy, clean, rows, scale=shape.head_dim**-0.5)
        return cast(Tensor, mixed[0] if is_noisy else mixed[1])

    return run_layers(model.model, ids_BL, torch.arange(ids_BL.shape[1], device=ids_BL.device)[None], attend)


@dataclass(frozen=True)
class CleanKeys:
    """Rotated keys and values of clean text, by layer; of every sequence the first C positions."""

    keys_nBGCH: Sequence[Tensor]
    values_nBGCH: Sequence[Tensor]


def clean_keys(model: PlainBD3, ids_BC: Tensor) -> CleanKeys:
    """Encode clean text, block by block in one forward.

    Args:
        model: plain, block objective.
        ids_BC: int64, whole blocks, on the model's device; what fills the end of a shorter sequence is seen by nobody
            before it.
    """
    shape, (batch, length) = model.model.shape, ids_BC.shape
    keys, values = [], []
    rows = Visibility.clean_only(length, shape.block_size) if length else None
    backend = None if rows is None else _backend_for(model, rows)

    def attend(q_BQNH: Tensor, k_BRGH: Tensor, v_BRGH: Tensor, layer: int) -> Tensor:
        keys.append(k_BRGH.transpose(1, 2))
        values.append(v_BRGH.transpose(1, 2))
        # of the last layer only the keys are wanted: one row runs through it, for its shape
        if rows is None or backend is None or q_BQNH.shape[1] < length:
            return torch.zeros_like(q_BQNH)
        mixed = backend(None, Stream(q_BQNH, k_BRGH, v_BRGH), rows, scale=shape.head_dim**-0.5)
        return cast(Tensor, mixed[1])

    if rows is not None:
        keep_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=ids_BC.device)
        run_layers(model.model, ids_BC, torch.arange(length, device=ids_BC.device)[None], attend, keep_BQ=keep_B1)
    return CleanKeys(keys, values)


def blocks_hidden(model: PlainBD3, past: CleanKeys, noisy_BGS: Tensor, start_BG: Tensor) -> Tensor:
    """Normed hidden states of noisy blocks that look back on clean text: [B, G, S, D].

    Args:
        model: plain, block objective.
        past: of the same B sequences.
        noisy_BGS: int64, G noisy blocks of every sequence, which do not see each other.
        start_BG: int64, the position of each block's first token; the block sees the clean positions before it.
    """
    device, (batch, groups, size) = noisy_BGS.device, noisy_BGS.shape
    length = past.keys_nBGCH[0].shape[2] if past.keys_nBGCH else 0
    row_group_R = torch.arange(groups, device=device).repeat_interleave(size)
    # Noisy blocks of one sequence do not see each other.
    own_RR = (row_group_R[:, None] == row_group_R).expand(batch, -1, -1)
    # A noisy block sees the clean blocks before its own, as in the pair.
    before_BRC = torch.arange(length, device=device) < start_BG.repeat_interleave(size, dim=1)[:, :, None]
    sees_BRK = torch.cat([before_BRC, own_RR], dim=2)

    def attend(q_BQNH: Tensor, k_BRGH: Tensor, v_BRGH: Tensor, layer: int) -> Tensor:
        own = (k_BRGH.transpose(1, 2), v_BRGH.transpose(1, 2))
        if not length:
            return grouped_attention(q_BQNH, *own, sees_BRK)
        kept = (past.keys_nBGCH[layer], past.values_nBGCH[layer])
        keys_BGKH, values_BGKH = (torch.cat(pair, dim=2) for pair in zip(kept, own, strict=True))
        return grouped_attention(q_BQNH, keys_BGKH, values_BGKH, sees_BRK)

    position_BR = (start_BG[:, :, None] + torch.arange(size, device=device)).flatten(1)
    return run_layers(model.model, noisy_BGS.flatten(1), position_BR, attend).unflatten(1, (groups, size))


def token_scores(model: PlainBD3, hidden_RD: Tensor, target_R: Tensor, *, mask_id: int | None) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood [R] in nats, fp32 or of an fp64 model fp64; whether no token is likelier: bool [R]).

    Args:
        model: plain.
        hidden_RD: rows that predict.
        target_R: int64, what they should predict.
        mask_id: never predicted; None: autoregressive.
    """
    # the output table is applied in chunks: logits of all rows would be the largest tensor by far
    size = max(1, LOGIT_BYTES // (4 * model.model.shape.vocab_size))
    nll, best = [hidden_RD.new_zeros(0)], [torch.zeros(0, dtype=torch.bool, device=hidden_RD.device)]
    for hidden, target in zip(hidden_RD.split(size), target_R.split(size), strict=True):
        if not len(target):
            continue
        logits = model.lm_head(hidden)
        one = next_token_nll(logits, target) if mask_id is None else masked_token_nll(logits, target, mask_id=mask_id)
        if mask_id is not None:
            # SUBS: the mask is never what greedy decoding writes.
            logits = logits.index_fill(1, torch.tensor([mask_id], device=logits.device), -torch.inf)
        nll.append(one)
        best.append(logits.argmax(dim=1) == target)
    return torch.cat(nll[1:] or nll), torch.cat(best)


def _backend_for(model: PlainBD3, rows: Visibility) -> Attend:
    """The attention backend of the rows: structured where it serves, else what is fastest of the others."""
    weight = model.lm_head.weight
    has_documents = rows.document_id_BL is not None
    return _backend(_RowKind.of(model.model.shape, rows), weight.device.type, weight.dtype, has_documents)


@dataclass(frozen=True)
class _RowKind:
    """What a backend's answer depends on, comparable: a Visibility is not."""

    block_size: int
    length: int
    halves: tuple[bool, bool]
    heads: tuple[int, int, int]

    @staticmethod
    def of(shape: ModelShape, rows: Visibility) -> _RowKind:
        """The kind of these rows."""
        heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim)
        return _RowKind(rows.block_size, rows.length, (bool(rows.noisy_rows), bool(rows.clean_key_rows)), heads)

    def rows(self) -> Visibility:
        """Rows of this kind, without documents."""
        here = ((0, self.length),)
        noisy, clean = (here if present else () for present in self.halves)
        return Visibility(self.block_size, self.length, noisy, clean, clean)


@lru_cache(maxsize=256)
def _backend(kind: _RowKind, device_type: str, dtype: torch.dtype, has_documents: bool) -> Attend:
    heads, groups, width = kind.heads
    request = AttentionRequest(
        device_type=device_type,
        dtype=dtype,
        batch=PROBE_BATCH,
        rows=kind.rows(),
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=width,
        documents=has_documents,
        needs_grad=False,
    )
    # Stock kernels need no compiler, so they come before the others; on a GPU `choose` holds each against the dense
    # reference first.
    return choose("structured" if structured.refuse(request) is None else "auto", request).attend
