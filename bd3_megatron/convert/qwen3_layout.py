"""An exported folder in Qwen3's layout, which serves autoregressive models and which SDAR's extends.

Weights pass through, since the plain model has Qwen3's names. Refused: the paper's style, no norms on queries and keys,
experts that Qwen3-MoE does not compute, block diffusion.
Source: transformers models/qwen3 and models/qwen3_moe, configuration and modelling files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bd3_megatron.convert.folder import copy_files, published
from bd3_megatron.convert.plain_source import FolderSource
from bd3_megatron.convert.stream import stream_weights
from bd3_megatron.convert.to_hf import DTYPE_NAMES, is_tokenizer_file
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import ConversionError
from bd3_megatron.files import write_json
from bd3_megatron.hf.configuration_bd3 import BD3Config

MaskPlace = Literal["moved", "kept"]
NO_TOKENIZER = "no tokenizer files were there; copy the tokenizer into the folder"


@dataclass(frozen=True, kw_only=True)
class LayoutRequest:
    """An opened folder of ours, and what to make of it."""

    folder: Path
    config: BD3Config
    source: FolderSource
    shapes: dict[str, tuple[int, ...]]
    out: Path
    mask: MaskPlace | None
    """Where the mask's row goes; read by layouts that have one."""
    dtype: torch.dtype
    """Of the stored weights."""


def write_qwen3(request: LayoutRequest) -> list[str]:
    """Write the folder; returns what the user must know.

    Raises:
        ConversionError: the layout cannot express the model.
    """
    config, dtype = request.config, request.dtype
    check_shape_of_qwen3(config, "qwen3")
    if objective_named(config.objective).has_noise:
        raise ConversionError(
            "objective=block cannot be written as qwen3: readers of Qwen3 take a position's logits for the next token's; "
            "use --layout sdar."
        )
    described = qwen3_config(config, dtype=dtype)
    with published(request.out, model_type=described["model_type"]) as staging:
        write_json(staging / "config.json", described)
        write_json(staging / "generation_config.json", special_ids(config))
        stream_weights(staging, request.shapes, request.source.tensor, dtype=dtype)
        copied = copy_files(request.folder, staging, is_tokenizer_file)
    return [] if copied else [NO_TOKENIZER]


def qwen3_config(config: BD3Config, *, dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json."""
    dense = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_theta,
        # Spelt out, for readers whose own default is another.
        "rope_scaling": None,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "use_cache": True,
        "torch_dtype": DTYPE_NAMES[dtype],
    }
    return dense | (_mixture_config(config) if config.num_experts else {})


def special_ids(config: BD3Config) -> dict[str, Any]:
    """The ids of generation_config.json."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def check_shape_of_qwen3(config: BD3Config, layout: str) -> None:
    """Refuse layers that are not Qwen3's.

    Raises:
        ConversionError: names the setting and the layout.
    """
    if config.style != "modern":
        raise ConversionError(f"style={config.style} cannot be written as {layout}; it needs RMSNorm and SwiGLU.")
    if config.partial_rotary_factor != 1.0:
        raise ConversionError(
            f"partial_rotary_factor={config.partial_rotary_factor} cannot be written as {layout}, which turns whole heads; use "
            "the exported folder itself."
        )
    if not config.qk_norm:
        raise ConversionError(f"qk_norm=false cannot be written as {layout}, whose queries and keys are normed.")
    if config.num_experts:
        _check_mixture(config, layout)


def _check_mixture(config: BD3Config, layout: str) -> None:
    """Refuse experts that Qwen3-MoE's modelling file does not compute."""
    plain = {"score_function": "softmax", "router_bias": False, "shared_expert_intermediate_size": 0, "n_group": 1}
    plain |= {"routed_scaling_factor": 1.0}
    for field, wanted in plain.items():
        if getattr(config, field) != wanted:
            raise ConversionError(
                f"{field}={getattr(config, field)} cannot be written as {layout}, whose experts have {wanted}; use the exported "
                "folder itself."
            )


def _mixture_config(config: BD3Config) -> dict[str, Any]:
    """The entries in which Qwen3-MoE's config.json differs from Qwen3's."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(config.first_k_dense_replace)),
        # the load is balanced in training here, by no loss of theirs
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }
