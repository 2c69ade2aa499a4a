"""The pair attention inside megatron's SelfAttention: rows in, rows out, one visibility for all layers.

q, k, v of all rows of this rank, [P, B, heads / tp, H], positions turned in, are cut into
the noisy and the clean stream as views and given to an attention backend. Under context parallelism only the clean
keys and values travel: gathered over cp before, their gradients reduce-scattered after; noisy ones never leave.
Who sees whom comes as the ticket of a visibility in megatron's argument `attention_mask`; no mask over rows x rows is made.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from bd3_megatron.attention.streams import Stream, joined_rows, parted
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.model.attention_context import AttentionContext
from bd3_megatron.model.rotary import turned
from bd3_megatron.parallel.context import gather_clean


class PairAttention(SelfAttention):
    """megatron's self-attention with a forward of its own: training's path alone, and cheaper rotary positions."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: [P, B, D].
            attention_mask: ticket of the visibility.
            rotary_pos_emb: of `rotary_turn`.
            args, kwargs: what megatron hands over for inference; unused.

        Returns:
            (output [P, B, D], no bias).
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if rotary_pos_emb is not None:
            query, key = turned(query, rotary_pos_emb), turned(key, rotary_pos_emb)
        # Selective recomputation: the backward attends again instead of keeping what attention made.
        if self.checkpoint_core_attention and self.training:
            mixed = checkpoint(self.core_attention, False, query, key, value, attention_mask)
        else:
            mixed = self.core_attention(query, key, value, attention_mask)
        return self.linear_proj(mixed)


class CoreAttention(nn.Module):
    """Attention over the pair; takes and gives megatron's layouts."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        *,
        context: AttentionContext,
    ) -> None:
        super().__init__()
        self.context = context
        self.cp_group = pg_collection.cp
        # Scores are scaled by the head's width, as in the plain model.
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [P, B, N / tp, H]; key, value: [P, B, G / tp, H].
            attention_mask: ticket of the visibility.

        Returns:
            [P, B, N / tp * H].
        """
        outs = self._attend(query, key, value, self.context.enter(attention_mask))
        # joined in megatron's layout: the projection behind would copy another one, and its backward once more
        return joined_rows([out.transpose(0, 1) for out in outs], dim=0).flatten(2)

    def loss_stream(self, query: Tensor, key: Tensor, value: Tensor, ticket: Tensor) -> Tensor:
        """Attend for the stream that carries loss only; the other gives keys and values.

        Args:
            query: [rows of that stream, B, N / tp, H]; key, value: [P, B, G / tp, H] of all rows.
            ticket: of the visibility.

        Returns:
            [rows, B, N / tp * H].
        """
        visibility = self.context.enter(ticket)
        if self.context.layout.num_noisy:
            visibility = visibility.without_clean_queries
        return self._attend(query, key, value, visibility)[0].transpose(0, 1).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility) -> list[Tensor]:
        """Outputs [B, rows, N / tp, H] of the query rows, which are noisy, then clean, as the visibility has them."""
        backend, views = self.context.backend, self.context.layout.views
        # Nothing to gather and one view: rows lie as the backend wants them, and cutting and joining would cost 8 nodes.
        is_alone = self.cp_group is None or self.cp_group.size() == 1
        if backend.attend_rows is not None and views == 1 and is_alone:
            q, k, v = (rows.transpose(0, 1) for rows in (query, key, value))
            return [backend.attend_rows(q, k, v, visibility, scale=self.scale)]
        return [out for out in self._attend_streams(query, key, value, visibility) if out is not None]

    def _attend_streams(
        self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility
    ) -> tuple[Tensor | None, Tensor | None]:
        split, views = self.context.layout.num_noisy, self.context.layout.views
        attend = self.context.backend.attend
        q, k, v = (_cut(rows, split, views) for rows in (query, key, value))
        clean = None
        if self.context.layout.num_clean:
            # Noisy keys never leave their rank: a noisy row sees only its own block of them.
            k_clean, v_clean = gather_clean(k[-1], v[-1], self.cp_group)
            clean = Stream(q[-1], k_clean, v_clean)
        if not split:
            return attend(None, clean, visibility, scale=self.scale)
        noisy = [Stream(*view) for view in zip(q[:-1], k[:-1], v[:-1], strict=True)]
        out, out_clean = attend(noisy[0], clean, visibility, scale=self.scale)
        if views == 1 or clean is None:
            return out, out_clean
        # further views have no clean queries of their own: they bring their noisy rows to the same clean keys
        keys_only = Stream(clean.q_BLNH[:, :0], clean.k_BLGH, clean.v_BLGH)
        alone = visibility.without_clean_queries
        outs = [out, *(attend(view, keys_only, alone, scale=self.scale)[0] for view in noisy[1:])]
        return torch.cat([one for one in outs if one is not None], dim=1), out_clean


def _cut(rows_PBNH: Tensor, num_noisy: int, views: int) -> list[Tensor]:
    """[rows, B, heads, H] -> [B, rows, heads, H] of each noisy view, and last of the clean rows (there may be none)."""
    noisy = [num_noisy // views] * views if num_noisy else []
    # cut at once: gradients of slices would each be padded with zeros and then added up
    return list(parted(rows_PBNH.transpose(0, 1), [*noisy, rows_PBNH.shape[0] - num_noisy], dim=1))
