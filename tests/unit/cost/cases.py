"""Configurations that the cost tests share: small, every style and kind of run."""

from __future__ import annotations

from typing import Any

from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.schema import Config

STYLES: dict[str, dict[str, Any]] = {
    "paper": {"style": "paper"},
    "modern": {"style": "modern", "num_kv_heads": 2},
    "modern_tied_qk": {"style": "modern", "num_kv_heads": 4, "qk_norm": True, "tie_embeddings": True},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "experts": {"num_kv_heads": 2, "experts": {"number": 6, "top_k": 2, "width": 16, "leading_dense_layers": 1}},
    "shared": {"num_kv_heads": 4, "experts": {"number": 4, "top_k": 1, "width": 24, "shared_width": 8}},
}
"""Styles with experts."""
KINDS: dict[str, dict[str, Any]] = {
    "s1": {"block_size": 1, "interval": [1.0, 1.0]},
    "s4": {"block_size": 4},
    "s16": {"block_size": 16},
    "mdlm": {"block_size": 32},
    "ar": {"objective": "ar"},
}


def case(*, style: str = "modern", kind: str = "s4", **sections: dict[str, Any]) -> Config:
    """A small configuration: 3 layers, D 32, 4 heads of 8, F 48, V 60 (padded to 64), L 32, global batch 8."""
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {
            "num_layers": 3,
            "hidden_size": 32,
            "num_heads": 4,
            "ffn_hidden_size": 48,
            "vocab_size": 60,
            "vocab_multiple": 64,
            **(STYLES | MIXTURES)[style],
        },
        "data": {"seq_len": 32},
        "diffusion": dict(KINDS[kind]),
        "train": {"steps": 10, "global_batch_size": 8},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return config_from_tree(tree)


def gpt2_small(kind: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    """The paper's 110 M shape at L 1024 (170 M numbers with both tables)."""
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"style": "paper", "num_layers": 12, "hidden_size": 768, "num_heads": 12, "vocab_size": 50258},
        "data": {"seq_len": 1024},
        "diffusion": kind or {"block_size": 16},
        "train": {"steps": 10, "global_batch_size": 512},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return config_from_tree(tree)
