"""Our ModelConfig as megatron's TransformerConfig and module specs: one table, both layer styles.

Decides: biases only where the style has them (megatron's add_bias_linear would also bias attention), our norms, our
core attention; fused kernels off on CPU, where they compile C++. `perform_initialization` is off: init_weights draws
every parameter by its global name, independent of the grid.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.model.activation import COMPILED, elementwise_kernel
from bd3_megatron.model.attention_context import AttentionContext
from bd3_megatron.model.core_attention import CoreAttention, PairAttention
from bd3_megatron.model.experts import ExpertLayer
from bd3_megatron.model.last_layer import LastLayer, QkvLinear
from bd3_megatron.model.linear import ColumnLinear, RowLinear
from bd3_megatron.model.norms import LayerNorm, RMSNorm
from bd3_megatron.model.recompute import Recompute, ThriftyMLP
from bd3_megatron.parallel.topology import Topology

_gelu_tanh = partial(F.gelu, approximate="tanh")


class _RowWithoutBias(RowLinear):
    """Attention output projection, bias-free although the MLP of the same config may be biased."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)


def transformer_config(
    model: ModelConfig, topology: Topology, *, dtype: torch.dtype, recompute: Recompute | None = None
) -> TransformerConfig:
    """megatron's view of the model on this grid.

    Args:
        model: shapes and style.
        topology: axes.
        dtype: of parameters and activations.
        recompute: what is computed again; None: nothing.
    """
    on_gpu = topology.device.type == "cuda"
    gated = model.style == "modern"
    interleaved = topology.vpp > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn_width,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else _gelu_tanh,
        # megatron would bias attention as well; the projections there are classes of ours without one.
        add_bias_linear=not gated,
        normalization="RMSNorm" if gated else "LayerNorm",
        layernorm_epsilon=model.layer_norm_eps,
        hidden_dropout=model.dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vpp if interleaved else None,
        context_parallel_size=topology.cp,
        sequence_parallel=topology.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        # init_weights draws every parameter by its global name, independent of the grid.
        perform_initialization=False,
        # megatron's MLP is not asked: model/activation chooses the kernel
        bias_activation_fusion=False,
        bias_dropout_fusion=elementwise_kernel(topology.device) == COMPILED,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        # Apex's fused kernel would add gradients to main_grad, which only megatron's DDP wrapper has.
        gradient_accumulation_fusion=False,
        enable_autocast=False,
        # The loss is a sum: megatron must not divide it by the number of micro-batches.
        calculate_per_token_loss=True,
        # with overlapped p2p a stage would free an output that gloo is still sending: seen as wrong losses, not an error
        deallocate_pipeline_outputs=not interleaved,
        # interleaved stages with pp=2 send both ways to one peer; batched p2p pairs those up wrongly (Megatron-LM #750)
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # a device synchronisation after every exchange, for a fault of old torch versions (model_parallel_config.py)
        batch_p2p_sync=False,
        **(recompute or Recompute()).block_settings(model.num_layers),
    )


def _mlp_class(tp_group: dist.ProcessGroup) -> type[ThriftyMLP]:
    """A class, because a ModuleSpec is handed its group only if it names megatron's own MLP (transformer_layer.py:354)."""

    class Mlp(ThriftyMLP):
        def __init__(self, config: TransformerConfig) -> None:
            parts = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
            super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)

    return Mlp


def _expert_class(
    experts: ExpertsConfig, topology: Topology, context: AttentionContext, *, is_last: bool
) -> type[ExpertLayer]:
    class Experts(ExpertLayer):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config, experts, topology, context, is_last=is_last)

    return Experts


def block_submodules(
    config: TransformerConfig,
    model: ModelConfig,
    topology: Topology,
    *,
    context: AttentionContext,
    layers: range,
    trims_last: bool,
) -> TransformerBlockSubmodules:
    """The module specs of a chunk's layers and of the final norm.

    Args:
        config: megatron's.
        model: ours.
        topology: for the groups of MLPs and experts.
        context: shared by the core attentions.
        layers: of the chunk, counted over the whole model.
        trims_last: the chunk's last layer is the model's last, and computes only rows that carry loss.
    """
    norm = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    attention = ModuleSpec(
        module=PairAttention,
        submodules=SelfAttentionSubmodules(
            linear_qkv=QkvLinear,
            core_attention=partial(CoreAttention, context=context),
            linear_proj=_RowWithoutBias,
            q_layernorm=RMSNorm if model.qk_norm else None,
            k_layernorm=RMSNorm if model.qk_norm else None,
        ),
    )
    parts = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=_mlp_class(topology.groups.tp),
        mlp_bda=get_bias_dropout_add,
    )
    specs = []
    for layer in layers:
        held = parts
        if model.experts is not None and model.has_experts(layer):
            is_last = layer == model.num_layers - 1
            held = replace(parts, mlp=_expert_class(model.experts, topology, context, is_last=is_last))
        is_trimmed = trims_last and layer == layers[-1]
        specs.append(ModuleSpec(module=LastLayer if is_trimmed else TransformerLayer, submodules=held))
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)
