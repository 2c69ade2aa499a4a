"""A tiny run on any grid, for tests of checkpoints: build, step, and describe the state without any of the code under test."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.attention.select import named
from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.corrupt import corrupt
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import noise_schedule
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.model.pair_batch import PairBatch, pair_batch
from bd3_megatron.parallel.topology import Topology

VOCAB = 61
LENGTH = 16
BATCH = 4
BLOCK = 4


def tiny(
    *,
    layers: int = 2,
    style: str = "modern",
    tie: bool = True,
    optim: dict[str, Any] | None = None,
    experts: dict[str, Any] | None = None,
    **parallel: Any,
) -> Config:
    """A model of at least `layers` layers: as many as the pipeline's stages ask for."""
    modern = style == "modern"
    model = {
        "style": style,
        "num_layers": max(layers, parallel.get("pp", 1) * (parallel.get("vpp") or 1)),
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2 if modern else 4,
        "ffn_hidden_size": 48,
        "qk_norm": modern,
        "tie_embeddings": tie and modern,
        "vocab_multiple": 8,
        "experts": experts,
    }
    return config_from_tree(
        {
            "run": {"dir": "unused"},
            "model": model,
            "data": {"seq_len": LENGTH},
            "diffusion": {"block_size": BLOCK},
            "parallel": parallel,
            "train": {"steps": 20, "global_batch_size": BATCH, "micro_batch_size": 1},
            "optim": {"lr": 1e-3, "ema_decay": 0.9, "weight_decay": 0.1, **(optim or {})},
        }
    )


def build(config: Config, topology: Topology, *, dtype: torch.dtype = torch.float32) -> ZeroEngine:
    """A fresh engine of the run."""
    vocabulary = vocabulary_of(config, size=VOCAB, mask_id=VOCAB - 1)
    model = ParallelModel(
        config, vocabulary, topology, backends=dict.fromkeys(block_sizes(config), named("dense")), dtype=dtype
    )
    return ZeroEngine(model, config, num_micro_batches=BATCH // topology.dp, dtype=dtype)


def _micro_batches(engine: ZeroEngine, step: int) -> list[PairBatch]:
    topology = engine.model.topology
    generator = torch.Generator().manual_seed(step)
    tokens_GL = torch.randint(0, VOCAB - 1, (BATCH, LENGTH), generator=generator)
    batches = []
    for number in range(BATCH // topology.dp):
        row = torch.tensor([number * topology.dp + topology.dp_rank])
        index = row + step * BATCH
        noise = noise_levels(1, index, num_blocks=LENGTH // BLOCK, interval=Interval(), group_size=BATCH)
        noisy = corrupt(
            tokens_GL[row], noise, index_B=index, seed=1, mask_id=VOCAB - 1, schedule=noise_schedule("loglinear")
        )
        clean = CleanBatch(tokens_BL=tokens_GL[row], index_B=index)
        batches.append(pair_batch(clean, [noisy], engine.model.layout))
    return batches


def steps(engine: ZeroEngine, first: int, last: int) -> list[tuple[float, float]]:
    """Steps `first` to `last` - 1; the global loss and gradient norm of each, on every rank."""
    topology, record = engine.model.topology, []
    for step in range(first, last):
        result = engine.train_step(
            _micro_batches(engine, step), loss_scale=topology.shard_size / (BATCH * LENGTH), lr=1e-3
        )
        total = torch.zeros((), dtype=torch.float64)
        if topology.is_last_stage and topology.tp_rank == 0:
            total = sum((log.weighted_nll_BK.sum() for log in result.logs), total)
        dist.all_reduce(total)
        record.append((total.item() / (BATCH * LENGTH), result.grad_norm))
    return record


def raw_state(engine: ZeroEngine) -> dict[str, Tensor]:
    """Copies of everything this rank owns, flat, by plain names."""
    state: dict[str, Tensor] = {}
    for index, owned in enumerate(engine.owned()):
        state[f"{index}.fp32"] = owned.detach().clone()
        for kind, value in engine.optimizer.state[owned].items():
            state[f"{index}.{kind}"] = torch.as_tensor(value).detach().clone()
        if engine.ema is not None:
            state[f"{index}.ema"] = engine.ema.shards[index].clone()
    if engine.stage < 3:
        state |= {f"model.{name}": p.detach().clone() for name, p in engine.model.root.named_parameters()}
    return state


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names that differ by a bit."""
    names = {*first, *second}
    return sorted(n for n in names if n not in first or n not in second or not torch.equal(first[n], second[n]))
