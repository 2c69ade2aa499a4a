"""The pair attention inside megatron's SelfAttention: rows in, rows out, sight from one shared place.

megatron hands over q, k, v of all rows of this rank, [P, B, heads / tp, H], rotary already applied. They are cut into
the noisy and the clean stream as views and given to an attention backend. Under context parallelism only the clean
keys and values travel: gathered over cp before, their gradients reduce-scattered after; noisy ones never leave.
Documents reach this place as megatron's `attention_mask` argument (a tensor [B, L], so that recomputation may save it);
no mask over rows x rows is ever made here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bd3_megatron.attention.streams import Stream
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.model.sight import Sight
from bd3_megatron.parallel.context import gather_clean


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
        sight: Sight,
    ) -> None:
        super().__init__()
        self.sight = sight
        self.cp_group = pg_collection.cp
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [P, B, N / tp, H]; key, value: [P, B, G / tp, H].
            attention_mask: document ids int [B, L], or None.

        Returns:
            [P, B, N / tp * H].
        """
        layout = self.sight.layout
        outs = self._attend(query, key, value, layout.visibility(attention_mask))
        out_BPNH = torch.cat([out for out in outs if out is not None], dim=1)
        return out_BPNH.transpose(0, 1).flatten(2)

    def loss_stream(self, query: Tensor, key: Tensor, value: Tensor, document_id_BL: Tensor | None) -> Tensor:
        """Attend for the stream that carries loss only; the other gives keys and values.

        Args:
            query: [rows of that stream, B, N / tp, H]; key, value: [P, B, G / tp, H] of all rows.
            document_id_BL: int [B, L], or None.

        Returns:
            [rows, B, N / tp * H].
        """
        visibility = self.sight.layout.visibility(document_id_BL)
        if self.sight.layout.num_noisy:
            visibility = replace(visibility, clean_rows=())
        present = [out for out in self._attend(query, key, value, visibility) if out is not None]
        return present[0].transpose(0, 1).flatten(2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both streams through the backend; query rows are noisy, then clean, as the visibility has them."""
        q, k, v = (t.transpose(0, 1) for t in (query, key, value))
        split, views = self.sight.layout.num_noisy, self.sight.layout.views
        clean = None
        if self.sight.layout.num_clean:
            k_clean, v_clean = gather_clean(k[:, split:], v[:, split:], self.cp_group)
            clean = Stream(q[:, split:], k_clean, v_clean)
        if not split:
            return self.sight.attend(None, clean, visibility, scale=self.scale)
        parts = [t[:, :split].chunk(views, dim=1) for t in (q, k, v)]
        noisy = [Stream(*view) for view in zip(*parts, strict=True)]
        out, out_clean = self.sight.attend(noisy[0], clean, visibility, scale=self.scale)
        if views == 1 or clean is None:
            return out, out_clean
        # further views have no clean queries of their own: they bring their noisy rows to the same clean keys
        keys_only = Stream(clean.q_BLNH[:, :0], clean.k_BLGH, clean.v_BLGH)
        sight = replace(visibility, clean_rows=())
        outs = [out, *(self.sight.attend(view, keys_only, sight, scale=self.scale)[0] for view in noisy[1:])]
        return torch.cat([one for one in outs if one is not None], dim=1), out_clean
