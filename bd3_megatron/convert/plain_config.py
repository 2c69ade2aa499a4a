"""The plain model's configuration of a run's model, and what the run recorded that its description needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from bd3_megatron.checkpoint.layout import Manifest
from bd3_megatron.config.schema import ModelConfig
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.model.router import routing_of

MIXTURE_FIELDS = {
    "num_experts": "number",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "width",
    "shared_expert_intermediate_size": "shared_width",
    "first_k_dense_replace": "leading_dense_layers",
    "score_function": "score",
    "norm_topk_prob": "normalize_top_k",
    "n_group": "groups",
    "topk_group": "group_top_k",
    "routed_scaling_factor": "scaling_factor",
    "router_bias": "bias",
}
"""BD3Config's fields on experts, and what the section model.experts calls them."""


def plain_config(
    model: ModelConfig,
    *,
    vocab_size: int,
    seq_len: int,
    block_size: int,
    mask_id: int | None,
    objective: str = "block",
    special_ids: Mapping[str, int | None] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    tokenizer_fingerprint: str | None = None,
) -> BD3Config:
    """BD3Config of a model.

    Args:
        model: shape, as the run's configuration has it.
        vocab_size: V, the mask included, without padding.
        seq_len: L, trained length.
        block_size: S.
        mask_id: None where the model is autoregressive.
        objective: "block" or "ar".
        special_ids: bos_token_id, eos_token_id, pad_token_id, where known.
        evaluation: how likelihood is measured, as the manifest has it; None: unknown.
        tokenizer_fingerprint: of the tokenizer that made the run's ids; None: unknown.
    """
    return BD3Config(
        # Without padding rows: they belong to the grid and not to the model.
        vocab_size=vocab_size,
        style=model.style,
        num_hidden_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_width,
        intermediate_size=model.ffn_width,
        qk_norm=model.qk_norm,
        tie_word_embeddings=model.tie_embeddings,
        layer_norm_eps=model.layer_norm_eps,
        rope_theta=model.rope_base,
        max_position_embeddings=seq_len,
        block_size=block_size,
        mask_token_id=mask_id,
        objective=objective,
        initializer_range=model.init_std,
        partial_rotary_factor=model.rotary_fraction,
        **mixture_fields(model),
        evaluation=None if evaluation is None else dict(evaluation),
        tokenizer_fingerprint=tokenizer_fingerprint,
        **cast(dict[str, Any], special_ids or {}),
    )


def run_tokenizer(manifest: Manifest) -> dict[str, Any]:
    """Fingerprint and special ids of the tokenizer a run was trained with; empty in checkpoints of older versions."""
    recorded = manifest.train_state.get("tokenizer")
    return recorded if isinstance(recorded, dict) else {}


def mixture_fields(model: ModelConfig) -> dict[str, Any]:
    """BD3Config's fields on experts, of a dense model too."""
    experts = model.experts
    if experts is None:
        absent = BD3Config()
        return {field: getattr(absent, field) for field in MIXTURE_FIELDS}
    return {
        "num_experts": experts.number,
        "moe_intermediate_size": experts.width,
        "shared_expert_intermediate_size": experts.shared_width or 0,
        "first_k_dense_replace": experts.leading_dense_layers,
        "router_bias": experts.bias,
        **vars(routing_of(experts)),
    }
