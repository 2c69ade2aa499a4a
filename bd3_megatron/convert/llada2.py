"""The plain model's tensors under LLaDA2's names, and the config.json that its engines read.

Contract: the inverse of what `expert_stacks.py` reads; nothing is computed but q, k and v stacked in one. Refused: what LLaDA2's
modelling file does not compute.
Source: config.json and modeling_llada2_moe.py of inclusionAI/LLaDA2.0-mini.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.convert.expert_stacks import FUSED_QKV, LLADA2_NAMES, SplitExperts
from bd3_megatron.convert.plain_source import FolderSource, PlainSource
from bd3_megatron.convert.qwen3_layout import LayoutRequest, qwen3_config
from bd3_megatron.convert.sdar import ServedLayout, Shapes, served_entries, write_served
from bd3_megatron.errors import ConversionError
from bd3_megatron.hf.configuration_bd3 import BD3Config

LLADA2_MASK_ID = 156895
"""SGLang takes it from its own source, whatever the folder says."""
# Rows of the published LLaDA2 models.
LLADA2_VOCAB_SIZE = 157184
_QKV = tuple(f".self_attn.{letter}_proj.weight" for letter in "qkv")


def write_llada2(request: LayoutRequest) -> list[str]:
    """Write the folder; returns what the user must know.

    Raises:
        ConversionError: the layout cannot express the model, or no row keeps unused ids silent.
    """
    _check_expressible(request.config)
    layout = ServedLayout(
        mask_id=LLADA2_MASK_ID,
        vocab_size=LLADA2_VOCAB_SIZE,
        describe=_llada2_config,
        spelling=Llada2Names(request.config),
    )
    return write_served(request, layout)


@dataclass(frozen=True)
class Llada2Names:
    """LLaDA2's names, with q, k and v in one."""

    config: BD3Config

    def shapes(self, plain: Shapes) -> Shapes:
        """As Spelling."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in plain.items():
            stored = _stored(name)
            # q, k and v meet under one name; everything else is alone under its own
            rows = shapes[stored][0] if stored in shapes else 0
            shapes[stored] = (rows + shape[0], *shape[1:])
        return shapes

    def tensors(self, plain: Shapes, tensor: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """As Spelling."""
        parts: dict[str, list[str]] = {}
        # the model's order has q before k before v, as their file stacks them
        for name in plain:
            parts.setdefault(_stored(name), []).append(name)

        def produce(stored: str) -> Tensor:
            held = [tensor(name) for name in parts[stored]]
            return held[0] if len(held) == 1 else torch.cat(held)

        return produce

    def opened(self, folder: Path) -> PlainSource:
        """As Spelling."""
        keys = self.config.num_key_value_heads * self.config.head_dim
        return SplitExperts(
            FolderSource(folder), qkv_rows=(self.config.num_attention_heads * self.config.head_dim, keys, keys)
        )


def _stored(name: str) -> str:
    for ending in _QKV:
        if name.endswith(ending):
            return name.removesuffix(ending) + FUSED_QKV
    for theirs, ours in LLADA2_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _check_expressible(config: BD3Config) -> None:
    # Their file computes these whatever its configuration says.
    plain = {"score_function": "sigmoid", "router_bias": True, "norm_topk_prob": True}
    if not config.num_experts:
        raise ConversionError(
            "a dense model cannot be written as llada2, whose layers have experts; use --layout sdar."
        )
    for field, wanted in plain.items():
        if getattr(config, field) != wanted:
            raise ConversionError(
                f"{field}={getattr(config, field)} cannot be written as llada2, whose experts have {wanted}; use the exported "
                "folder itself."
            )
    # several shared experts are one MLP of their widths together, so a width between them has no name there
    if config.shared_expert_intermediate_size % config.moe_intermediate_size:
        raise ConversionError(
            f"a shared expert of width {config.shared_expert_intermediate_size} cannot be written as llada2, which counts shared "
            f"experts of moe_intermediate_size={config.moe_intermediate_size}; use the exported folder itself."
        )


def _llada2_config(config: BD3Config, dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json."""
    theirs = {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "num_shared_experts": config.shared_expert_intermediate_size // config.moe_intermediate_size,
        "first_k_dense_replace": config.first_k_dense_replace,
        "score_function": "sigmoid",
        "norm_topk_prob": True,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "routed_scaling_factor": config.routed_scaling_factor,
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "use_cache": False,
        "partial_rotary_factor": config.partial_rotary_factor,
        # some readers take the number, others the factor
        "rotary_dim": config.rotary_dim,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
    }
    return (
        qwen3_config(config, dtype=dtype) | theirs | served_entries(config, "configuration_llada2_moe.LLaDA2MoeConfig")
    )
