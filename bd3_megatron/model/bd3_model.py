"""The parallel model: own embedding and head around megatron's TransformerBlock, one object per model chunk.

Decides: composition instead of subclassing GPTModel (whose private pre- and post-processing would have to be
overridden); every stage builds its own rotary angles; the head sees loss rows only.
Knows nothing about optimizers, schedules or where batches come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.model.attention_context import AttentionContext
from bd3_megatron.model.experts import ExpertLayer
from bd3_megatron.model.head import VocabShard, weighted_nll
from bd3_megatron.model.last_layer import LastLayer, set_recompute
from bd3_megatron.model.pair_batch import PairBatch
from bd3_megatron.model.partition import EMBEDDING, padded_vocab
from bd3_megatron.model.recompute import Recompute
from bd3_megatron.model.rotary import rotary_angles, rotary_turn
from bd3_megatron.model.spec import block_submodules
from bd3_megatron.parallel.topology import Topology


@dataclass(frozen=True)
class Vocabulary:
    """What the model must know of the ids."""

    size: int
    """V, mask id included."""
    mask_id: int | None
    """Never predicted (SUBS); None for a model without a mask token (AR baseline)."""


LossOutput = tuple[Tensor, Tensor, Tensor | None]
"""Of one micro-batch, this context-parallel rank's rows: the scalar loss sum in nats, with gradient, and of each loss row the
NLL and, where there is a confidence term, its entropy, [R], without. A plain tuple, because ZeRO-3 looks for tensors in
nothing else."""


class _Embedding(nn.Module):
    """Holds the table under megatron's name for it."""

    def __init__(self, table: VocabParallelEmbedding) -> None:
        super().__init__()
        self.word_embeddings = table


class Head(nn.Module):
    """Hidden states at the loss rows to their loss: local rows of the output table and, in the paper's style, a bias.

    A tied table belongs to the embedding; it is then handed in with each call.
    """

    def __init__(self, rows: int, hidden_size: int, dtype: torch.dtype, *, own_weight: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=dtype)) if own_weight else None
        self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype)) if bias else None

    def forward(
        self, rows_RD: Tensor, batch: PairBatch, shard: VocabShard, tied_weight_VD: Tensor | None
    ) -> LossOutput:
        """Loss of the rows of one micro-batch; rows_RD [R, D] replicated over tp."""
        weight_VD = self.weight if self.weight is not None else tied_weight_VD
        if weight_VD is None:
            raise RuntimeError("a head without a table of its own needs the embedding's")
        return weighted_nll(
            rows_RD, weight_VD, self.bias, batch.target_R, batch.weight_R, shard=shard, confidence=batch.confidence
        )


class ModelChunk(MegatronModule):
    """One chunk of the model: some layers, plus the embedding if first and the head if last.

    Args:
        config: megatron's configuration.
        model: ours.
        vocabulary: ids.
        topology: the grid.
        context: rows and attention backend, shared by all layers and chunks of this rank.
        chunk: virtual stage of this rank (0 without interleaving).
        layers: of this chunk, counted over the whole model.
        recompute: what this chunk's first layers compute again in the backward.
        skip_dead_rows: the last layer computes only rows that carry loss.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        vocabulary: Vocabulary,
        topology: Topology,
        *,
        context: AttentionContext,
        chunk: int,
        layers: range,
        recompute: Recompute,
        skip_dead_rows: bool,
    ) -> None:
        super().__init__(config=config)
        # Read by megatron's pipeline schedules.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = topology.holds(chunk)
        # megatron numbers virtual stages only where there are several.
        self.vp_stage = chunk if topology.vpp > 1 else None
        self.context = context
        self.shape = model
        self.tp_group = topology.groups.tp
        rows = padded_vocab(vocabulary.size, model.vocab_multiple)
        local_rows = rows // topology.tp
        group = topology.groups.tp if topology.tp > 1 else None
        self.vocab_shard = VocabShard(topology.tp_rank * local_rows, vocabulary.size, vocabulary.mask_id, group)
        # On a last stage that is not the first a tied table is a copy: equal at start by its name, kept equal by
        # summing both gradients (engine/grads).
        tied_copy = self.post_process and model.tie_embeddings and not self.pre_process
        self.embedding: _Embedding | None = None
        self.output_layer: Head | None = None
        if self.pre_process:
            self.embedding = _Embedding(self._table(rows))
        if self.post_process:
            own = tied_copy or not model.tie_embeddings
            self.output_layer = Head(
                local_rows, model.hidden_size, config.params_dtype, own_weight=own, bias=model.style == "paper"
            )
        if tied_copy and self.output_layer is not None and self.output_layer.weight is not None:
            # DeepSpeed's mark for such a copy, which its gradient norm then counts once.
            self.output_layer.weight.ds_pipe_replicated = True  # type: ignore[attr-defined]
        self.tied_copy = tied_copy
        self.decoder = TransformerBlock(
            config=config,
            spec=block_submodules(
                config,
                model,
                topology,
                context=context,
                layers=layers,
                trims_last=self.post_process and skip_dead_rows,
            ),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=topology.groups,
            vp_stage=self.vp_stage,
        )
        for index, layer in enumerate(self.decoder.layers):
            set_recompute(layer, of_parts=recompute.of_parts(index), of_all=recompute.of_all(index))
        self.last_layer: LastLayer | None = None
        self.last_norm: nn.Module | None = None
        if self.post_process and skip_dead_rows:
            self._take_last_layer()

    def _take_last_layer(self) -> None:
        """Run the last layer and the final norm here instead of in the block, for the rows that carry loss only."""
        self.last_layer, self.last_norm = self.decoder.layers[-1], self.decoder.final_layernorm
        # megatron's block would run it for all rows, and the final norm behind it.
        del self.decoder.layers[-1]
        self.decoder.num_layers_per_pipeline_rank -= 1
        self.decoder.final_layernorm = None
        # it norms the same rows on every tensor-parallel rank: its gradients are whole
        for parameter in self.last_norm.parameters():
            parameter.sequence_parallel = False  # type: ignore[union-attr]
        if isinstance(self.last_layer.mlp, ExpertLayer):
            self.last_layer.mlp.counted.is_trimmed = True

    def _table(self, rows: int) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(
            rows,
            self.shape.hidden_size,
            # Overwritten by init_weights, which draws by global name.
            init_method=nn.init.zeros_,
            reduce_scatter_embeddings=self.config.sequence_parallel,
            config=self.config,
            tp_group=self.tp_group,
        )

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Called by megatron's schedule with what the previous stage sent."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: PairBatch) -> Tensor | LossOutput:
        """Run the chunk.

        Returns:
            Hidden states [P / tp under sequence parallelism, B, D] for the next stage, or on the last chunk the loss.
        """
        hidden = None if self.embedding is None else self._embed(self.embedding, batch.token_BP)
        # Positions in bf16 would be wrong from 256 on.
        wide = torch.promote_types(self.config.params_dtype, torch.float32)
        angles = rotary_angles(batch.position_PB, self.shape.rotary_width, self.shape.rope_base, dtype=wide)
        turn = rotary_turn(angles)
        # once a micro-batch, or never where whoever made the batch has done it already
        self.context.prepare(batch.visibility, batch.token_BP.device)
        ticket = self.context.ticket(batch.visibility, batch)
        hidden = self.decoder(hidden, attention_mask=ticket, rotary_pos_emb=turn)
        if self.output_layer is None:
            return hidden
        rows_RD = self._rows_at_loss(hidden, turn, ticket, batch)
        if self.last_layer is not None or not self.config.sequence_parallel:
            # Identity forwards; backwards it sums the ranks' partial gradients of the hidden states.
            rows_RD = copy_to_tensor_model_parallel_region(rows_RD, group=self.tp_group)
        return self.output_layer(rows_RD, batch, self.vocab_shard, self.tied_weight())

    def _rows_at_loss(self, hidden: Tensor, turn: Tensor, ticket: Tensor, batch: PairBatch) -> Tensor:
        """Final hidden states of the rows that carry loss, [R, D], on every tensor-parallel rank."""
        if self.last_layer is not None and self.last_norm is not None:
            rows_RD = self.last_layer(hidden, turn, ticket, loss_row_R=batch.loss_row_R)
            return self.last_norm(rows_RD)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        return hidden[: self.context.layout.num_loss_rows].flatten(0, 1).index_select(0, batch.loss_row_R)

    def _embed(self, embedding: _Embedding, token_BP: Tensor) -> Tensor:
        embedded = embedding.word_embeddings(token_BP)
        # under sequence parallelism the table has transposed and scattered already
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()

    def tied_weight(self) -> Tensor | None:
        """The embedding's table where this chunk's head uses it, else None."""
        if self.output_layer is None or self.output_layer.weight is not None or self.embedding is None:
            return None
        return self.embedding.word_embeddings.weight

    def global_name(self, local: str) -> str:
        """The name of a parameter in the whole model, from its name in this chunk."""
        if self.tied_copy and local == "output_layer.weight":
            return EMBEDDING
        if self.last_layer is not None and local.startswith("last_layer."):
            return local.replace("last_layer", f"decoder.layers.{self.last_layer.layer_number - 1}", 1)
        if local.startswith("last_norm."):
            return local.replace("last_norm", "decoder.final_layernorm", 1)
        parts = local.split(".")
        if parts[:2] == ["decoder", "layers"]:
            # layer_number counts from 1 over the whole model.
            parts[2] = str(self.decoder.layers[int(parts[2])].layer_number - 1)
        return ".".join(parts)


class Root(nn.Module):
    """All chunks of a rank as one module whose parameters and state speak global names.

    DeepSpeed is given this module; checkpoints then do not depend on how layers are dealt to stages.
    """

    def __init__(self, chunks: list[ModelChunk]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    def local_chunks(self) -> list[ModelChunk]:
        """The chunks in order of depth."""
        return [chunk for chunk in self.chunks if isinstance(chunk, ModelChunk)]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of every parameter held here."""
        for chunk in self.local_chunks():
            for name, parameter in chunk.named_parameters(recurse=recurse, remove_duplicate=remove_duplicate):
                yield prefix + chunk.global_name(name), parameter

    def expert_layers(self) -> Iterator[tuple[str, ExpertLayer]]:
        """(global name, mixture) of every layer with experts held here."""
        for chunk in self.local_chunks():
            for name, module in chunk.named_modules():
                if isinstance(module, ExpertLayer):
                    yield chunk.global_name(name), module

    def named_biases(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, expert bias) of every layer that has one: the only buffers that are state."""
        for name, layer in self.expert_layers():
            if layer.router.expert_bias is not None:
                yield f"{name}.router.expert_bias", layer.router.expert_bias

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """{global name: parameter}; expert biases are kept apart (`named_biases`)."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Copy parameters by global name; every name must be there."""
        # In place: DeepSpeed holds views of these parameters.
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])
