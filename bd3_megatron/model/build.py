"""A rank's share of the model, from configuration and grid.

Decides: which chunks this rank holds (how many layers each has is the answer of `cost/shape`, so that the planner and the model
agree). The only caller of ModelChunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from bd3_megatron.attention.select import Backend
from bd3_megatron.config.load import replace_field
from bd3_megatron.config.objective import block_sizes, objective_of
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.shape import layers_per_chunk
from bd3_megatron.diffusion.axes import ObjectiveAxes
from bd3_megatron.model.attention_context import AttentionContext, LayoutOf, layout_function
from bd3_megatron.model.bd3_model import ModelChunk, Root, Vocabulary
from bd3_megatron.model.dropout import seed_dropout
from bd3_megatron.model.init_weights import init_weights
from bd3_megatron.model.recompute import Recompute
from bd3_megatron.model.spec import transformer_config
from bd3_megatron.parallel.pair_split import PairLayout
from bd3_megatron.parallel.topology import Topology


class ParallelModel:
    """The chunks of a rank with what they share.

    Attributes:
        root: one module over all chunks, speaking global names.
        config: megatron's configuration; the pipeline schedule reads it.
        context: rows and backend of the current phase.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        topology: Topology,
        *,
        backends: Mapping[int, Backend],
        dtype: torch.dtype,
    ) -> None:
        """Build this rank's chunks.

        Args:
            config: the run.
            vocabulary: ids.
            topology: the grid.
            backends: of attention, one for every block size of the run.
            dtype: of parameters and activations.
        """
        self.vocabulary = vocabulary
        self.topology = topology
        self._layout_of: LayoutOf = layout_function(
            objective_of(config),
            length=config.data.seq_len,
            parallel=config.parallel,
            cp_rank=topology.cp_rank,
            skip_dead_rows=config.train.skip_dead_rows,
        )
        self._views = config.diffusion.views
        self.context = AttentionContext(self._layout_of(block_sizes(config)[0], self._views, None), backends)
        recompute = Recompute.of_setting(config.train.recompute, config.train.recompute_layers)
        self.config: TransformerConfig = transformer_config(config.model, topology, dtype=dtype, recompute=recompute)
        layers = layers_per_chunk(replace_field(config, "model.vocab_size", vocabulary.size))
        # megatron deals equal shares by itself, and takes uneven ones only as a layout.
        if topology.pp > 1 and len(set(layers)) > 1:
            self.config.pipeline_model_parallel_layout = _megatron_layout(layers, topology.pp)
        chunks = [
            ModelChunk(
                self.config,
                config.model,
                vocabulary,
                topology,
                context=self.context,
                chunk=chunk,
                layers=_layers_of(layers, chunk * topology.pp + topology.pp_rank),
                recompute=recompute,
                skip_dead_rows=config.train.skip_dead_rows,
            )
            for chunk in range(topology.vpp)
        ]
        self.root = Root(chunks)
        # Drawn on the CPU whatever the device, for CPU and GPU generators give different numbers.
        init_weights(self.root, config.model, topology, seed=config.run.seed)
        self.root.to(topology.device)
        # megatron's tracker must hold a state before the first forward, dropout or not.
        seed_dropout(config.run.seed, 0, topology)

    @property
    def layout(self) -> PairLayout:
        """Rows of the current phase."""
        return self.context.layout

    @property
    def chunks(self) -> list[ModelChunk]:
        return self.root.local_chunks()

    def enter_phase(self, block_size: int, *, views: int | None = None, axes: ObjectiveAxes | None = None) -> None:
        """Change the rows for all layers; only between steps.

        Args:
            block_size: S from now on.
            views: noisy copies; None: as many as training has.
            axes: of the objective; None: those of the run's first phase.
        """
        self.context.layout = self.layout_at(block_size, views=views, axes=axes)

    def layout_at(self, block_size: int, *, views: int | None = None, axes: ObjectiveAxes | None = None) -> PairLayout:
        """The rows of a phase; arguments as in `enter_phase`."""
        return self._layout_of(block_size, self._views if views is None else views, axes)


def _layers_of(per_chunk: tuple[int, ...], chunk: int) -> range:
    """The layers of a chunk, counted over the whole model."""
    first = sum(per_chunk[:chunk])
    return range(first, first + per_chunk[chunk])


def _megatron_layout(layers: tuple[int, ...], pp: int) -> PipelineParallelLayerLayout:
    stages = [[LayerType.decoder] * n for n in layers]
    stages[0] = [LayerType.embedding, *stages[0]]
    stages[-1] = [*stages[-1], LayerType.loss]
    return PipelineParallelLayerLayout(stages, pp)


def vocabulary_of(config: Config, *, size: int, mask_id: int | None) -> Vocabulary:
    """The model's ids: those of the data, or more when model.vocab_size asks for a larger table."""
    given = config.model.vocab_size
    # Without noise no id is the mask, and every id may be predicted.
    known = Vocabulary(size, mask_id if objective_of(config).has_noise else None)
    return known if given is None else replace(known, size=given)
