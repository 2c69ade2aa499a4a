"""Small models and runs for tests of conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bd3_megatron.checkpoint.describe import software_versions
from bd3_megatron.checkpoint.layout import Manifest
from bd3_megatron.checkpoint.whole import write_whole
from bd3_megatron.config.load import config_from_tree, to_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.model.partition import padded_vocab

VOCAB = 61
MASK = 60


def run_config(run_dir: Path, *, model: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A run of a two-layer model with grouped heads."""
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
        "qk_norm": True,
        "vocab_multiple": 8,
        **(model or {}),
    }
    tree = {
        "run": {"dir": str(run_dir)},
        "model": shape,
        "data": {"seq_len": 32},
        "diffusion": {"block_size": 4},
        "train": {"steps": 10, "global_batch_size": 4},
    }
    return config_from_tree(tree | sections)


def whole_checkpoint(
    path: Path,
    config: Config,
    *,
    step: int = 3,
    vocab_size: int = VOCAB,
    seed: int = 1,
    common: float = 0.0,
    train_state: dict[str, Any] | None = None,
    mask_id: int = MASK,
    evaluation: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of random weights, made without any rank.

    Args:
        path: the checkpoint's folder.
        config: the run.
        step, vocab_size, seed: of the checkpoint.
        train_state, mask_id, evaluation: as the trainer would have left them.
        common: added to every embedding, so that final states have a direction in common, as those of trained models do.
    """
    table, generator = NameTable(config.model, vocab_size), torch.Generator().manual_seed(seed)
    rows = padded_vocab(vocab_size, config.model.vocab_multiple)
    shapes = {name: parallel_shape(name, config, rows) for name in table.parallel_names()}

    def produce(name: str) -> torch.Tensor:
        drawn = 0.3 * torch.randn(shapes[name], generator=generator)
        if name == "embedding.word_embeddings.weight":
            return drawn + common
        return 1.0 + drawn if "norm" in name and name.endswith("weight") else drawn

    manifest = Manifest(
        step=step,
        samples_consumed=12,
        grid={"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
        zero_stage=1,
        world_size=1,
        config=to_tree(config),
        git_commit=None,
        seeds={"run": 1},
        vocab_size=vocab_size,
        mask_id=mask_id if config.diffusion.objective == "block" else None,
        train_state=train_state or {},
        evaluation=evaluation or {},
        software=software_versions(),
    )
    write_whole(path, manifest, shapes, produce)
    return path


def parallel_shape(name: str, config: Config, rows: int) -> tuple[int, ...]:
    """Shape of a whole parallel parameter, written out by hand."""
    m = config.model
    d, ffn, gated = m.hidden_size, m.ffn_width, m.style == "modern"
    last = name.split(".", 3)[-1]
    known: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (rows, d),
        "output_layer.weight": (rows, d),
        "output_layer.bias": (rows,),
        "self_attention.linear_qkv.weight": ((m.num_heads + 2 * m.kv_heads) * m.head_width, d),
        "self_attention.linear_proj.weight": (d, m.num_heads * m.head_width),
        "self_attention.q_layernorm.weight": (m.head_width,),
        "self_attention.k_layernorm.weight": (m.head_width,),
        "mlp.linear_fc1.weight": (2 * ffn if gated else ffn, d),
        "mlp.linear_fc1.bias": (ffn,),
        "mlp.linear_fc2.weight": (d, ffn),
    }
    if m.experts is not None:
        e, width, shared = m.experts.number, m.experts.width, m.experts.shared_width or 0
        known |= {
            "mlp.router.weight": (e, d),
            "mlp.router.expert_bias": (e,),
            "mlp.experts.linear_fc1.weight": (e, 2 * width, d),
            "mlp.experts.linear_fc2.weight": (e, d, width),
            "mlp.shared_experts.linear_fc1.weight": (2 * shared, d),
            "mlp.shared_experts.linear_fc2.weight": (d, shared),
        }
    return known.get(name) or known.get(last) or (d,)
