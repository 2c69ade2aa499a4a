"""The last layer, computing only what the loss can see.

Every row must give keys and values there, but only rows that carry loss go on: their queries, output projection, MLP and
final norm are computed, gathered as [R, D] before the first of them. Exact: the rows left out reach nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from bd3_megatron.model.linear import ColumnLinear
from bd3_megatron.model.recompute import ThriftyMLP, rebuilt
from bd3_megatron.model.rotary import turned


class QkvLinear(ColumnLinear):
    """q, k, v projection: bias-free although the MLP of the same config may be biased; queries for some rows on request.

    Its weight holds, group after group, the group's query heads, its key head and its value head.
    """

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)

    def forward(self, input_: Tensor, *args: Any, row_R: Tensor | None = None, **kwargs: Any) -> Any:
        """All of q, k, v as megatron wants them, or with `row_R` (queries [R, N, H], keys and values [P, B, G, H]).

        With `row_R`, `input_` holds all rows [P, B, D] on every rank.
        """
        if row_R is None:
            return super().forward(input_, *args, **kwargs)
        width, share = self.config.kv_channels, self.config.num_attention_heads // self.config.num_query_groups
        grouped = self.weight.unflatten(0, (-1, share + 2, width))
        q_weight, k_weight, v_weight = (part.flatten(0, 2) for part in grouped.split([share, 1, 1], dim=1))
        # What megatron's column-parallel forward does first: its backward sums over tp. Under sequence parallelism the rows
        # come gathered, and the gather's backward has that sum.
        u_PBD = input_ if self.sequence_parallel else copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        query_R = F.linear(u_PBD.flatten(0, 1).index_select(0, row_R), q_weight).unflatten(-1, (-1, width))
        key, value = F.linear(u_PBD, torch.cat([k_weight, v_weight])).unflatten(-1, (2, -1, width)).unbind(2)
        return query_R, key, value


class LastLayer(TransformerLayer):
    """A TransformerLayer that is asked for some rows only.

    Under sequence parallelism its input and its first norm are cut over tensor-parallel ranks as in every layer; the rows that
    carry loss lie anywhere in the sequence, and are whole on every rank from where they are chosen.
    """

    rebuild_whole: bool = False
    """Keep its inputs only, and compute it again in the backward."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        whole = copy(config)
        whole.sequence_parallel = False
        super().__init__(whole, *args, **kwargs)
        self.input_is_cut = config.sequence_parallel
        self.self_attention.linear_qkv.sequence_parallel = config.sequence_parallel
        for parameter in self.input_layernorm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(  # type: ignore[override]
        self, hidden_PBD: Tensor, turn: Tensor, ticket: Tensor, *, loss_row_R: Tensor
    ) -> Tensor:
        """The hidden states of the rows that carry loss.

        Args:
            hidden_PBD: all rows; under sequence parallelism this rank's [P / tp, B, D].
            turn: rotary turn [2, P, 1 or B, 1, H].
            ticket: of the visibility.
            loss_row_R: int64 [R], row x B + sample in the stream that carries loss.

        Returns:
            [R, D], on every tensor-parallel rank.
        """
        if self.rebuild_whole and self.training:
            return checkpoint(self._loss_rows, False, hidden_PBD, turn, ticket, loss_row_R)
        return self._loss_rows(hidden_PBD, turn, ticket, loss_row_R)

    def _loss_rows(self, hidden_PBD: Tensor, turn: Tensor, ticket: Tensor, row_R: Tensor) -> Tensor:
        attention, fused = self.self_attention, self.config.bias_dropout_fusion
        normed, release = self._normed(self._first_norm, hidden_PBD, again=self.recompute_input_layernorm)
        query_R, key, value = attention.linear_qkv(normed, row_R=row_R)
        query_R, key = self._rotated(query_R, key, turn, row_R)
        mixed_RD = self._attend(attention.core_attention, query_R, key, value, ticket, row_R)
        hidden = self._chosen(hidden_PBD, row_R)[:, None]
        output = attention.linear_proj(mixed_RD[:, None])
        release(output[0])
        with self.bias_dropout_add_exec_handler():
            hidden = self.self_attn_bda(self.training, fused)(output, hidden, self.hidden_dropout)
        normed, release = self._normed(self.pre_mlp_layernorm, hidden, again=self.recompute_pre_mlp_layernorm)
        output = self.mlp(normed)
        release(output[0])
        with self.bias_dropout_add_exec_handler():
            hidden = self.mlp_bda(self.training, fused)(output, hidden, self.hidden_dropout)
        return hidden[:, 0]

    def _first_norm(self, hidden_PBD: Tensor) -> Tensor:
        """Normed rows, all of them on every rank, since each rank's heads want the keys and values of all."""
        normed = self.input_layernorm(hidden_PBD)
        if not self.input_is_cut:
            return normed
        return gather_from_sequence_parallel_region(normed, tensor_parallel_output_grad=True, group=self.tp_group)

    def _chosen(self, hidden_PBD: Tensor, row_R: Tensor) -> Tensor:
        """Hidden states of the rows that carry loss, [R, D]."""
        # the stream that carries loss is the first of the pair, or the only one: its rows count from 0
        rows = hidden_PBD.flatten(0, 1)
        if not self.input_is_cut:
            return rows.index_select(0, row_R)
        # each rank brings the rows that it holds and zeros for the others: exact, and less to send than all rows
        own_R = row_R - self.tp_group.rank() * rows.shape[0]
        is_here_R = (own_R >= 0) & (own_R < rows.shape[0])
        brought = rows.index_select(0, own_R.where(is_here_R, 0)) * is_here_R[:, None]
        return reduce_from_tensor_model_parallel_region(brought, group=self.tp_group)

    def _normed(
        self, norm: Callable[[Tensor], Tensor], rows: Tensor, *, again: bool
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """Normed rows, and what to call with a tensor made from them once they are used."""
        return rebuilt(norm, rows) if again else (norm(rows), _keep)

    def _rotated(self, query_R: Tensor, key: Tensor, turn: Tensor, row_R: Tensor) -> tuple[Tensor, Tensor]:
        """Normed (where the model does) and rotated queries [R, N, H] and keys [P, B, G, H]."""
        attention = self.self_attention
        if attention.q_layernorm is not None:
            query_R, key = attention.q_layernorm(query_R), attention.k_layernorm(key)
        turn_R = turn.expand(-1, -1, key.shape[1], -1, -1).flatten(1, 2).index_select(1, row_R)[:, :, None]
        return turned(query_R[:, None], turn_R)[:, 0], turned(key, turn)

    def _attend(self, core: Any, query_R: Tensor, key: Tensor, value: Tensor, ticket: Tensor, row_R: Tensor) -> Tensor:
        """Attention of the loss rows: [R, N H]."""
        rows, batch = core.context.layout.num_loss_rows, key.shape[1]
        # Attention keeps the shape of the stream, zeros for the other queries, since backends know static rows; that is
        # one layer's share of pairs.
        query = query_R.new_zeros(rows * batch, *query_R.shape[1:]).index_copy(0, row_R, query_R)
        query = query.unflatten(0, (rows, batch))
        if self.self_attention.checkpoint_core_attention and self.training:
            mixed = checkpoint(core.loss_stream, False, query, key, value, ticket)
        else:
            mixed = core.loss_stream(query, key, value, ticket)
        return mixed.flatten(0, 1).index_select(0, row_R)


def set_recompute(layer: TransformerLayer, *, of_parts: bool, of_all: bool) -> None:
    """Let one layer keep less than it computes.

    Args:
        layer: of this package's specs.
        of_parts: its cheap parts are computed again.
        of_all: the whole layer is; in layers of a block that is the block's business.
    """
    layer.self_attention.checkpoint_core_attention = of_parts
    layer.recompute_input_layernorm = layer.recompute_pre_mlp_layernorm = of_parts
    if isinstance(layer.mlp, ThriftyMLP):
        layer.mlp.rebuild_activation = of_parts
    if isinstance(layer, LastLayer):
        layer.rebuild_whole = of_all


def _keep(later: Tensor) -> None:
    """Nothing to release."""
