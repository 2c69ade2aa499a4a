"""One training job on any grid, and the same job on the plain model: what the parity tests compare.

The plain side knows no megatron and no DeepSpeed: the exported model's file, torch's AdamW and global-norm clipping, one
sample after another in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from torch import Tensor

from bd3_megatron.attention.select import BACKENDS
from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.plain_config import plain_config
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.objective import masked_token_nll, next_token_nll, next_token_targets
from bd3_megatron.engine.grads import local_grad
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.model.init_weights import initial_value
from bd3_megatron.model.partition import partition_of, unshard
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.batches import Noise, make_micro_batch
from bd3_megatron.train.metrics import describe, reduce_step

VOCAB, MASK_ID, LENGTH, BATCH = 61, 60, 32, 8


def job_config(
    style: str = "modern", *, tied: bool = False, layers: int = 4, kv_heads: int = 2, **sections: Any
) -> Config:
    """A small run; `sections` holds overrides by section, e.g. parallel={...}."""
    modern = style == "modern"
    tree = {
        "run": {"dir": "unused"},
        "model": {
            "style": style,
            "num_layers": layers,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": kv_heads if modern else 4,
            "ffn_hidden_size": 48,
            "qk_norm": modern and tied,
            "tie_embeddings": tied,
            "vocab_multiple": 8,
            # Adam turns the relative error of a gradient into an absolute one of lr, unless adam_eps drowns it: with
            # weights this small the elements that cancel down to fp32 rounding lie below adam_eps; at 8 layers and 0.01
            # the plain model itself is 8e-6 from its fp64 twin after 5 steps
            "init_std": 0.01 * min(1.0, 4 / layers),
        },
        "data": {"seq_len": LENGTH},
        "diffusion": {"block_size": 4},
        "train": {"steps": 5, "global_batch_size": BATCH, "micro_batch_size": 1},
        "optim": {"lr": 1e-3, "clip_grad_norm": 0.5, "ema_decay": 0.9, "weight_decay": 0.1},
        "attention": {"backend": "dense"},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return config_from_tree(tree)


def clean_batch(index_B: Tensor, *, documents: bool) -> CleanBatch:
    """Samples as a function of their index; with documents, two or three a sample, cut at odd places."""
    rows, cuts = [], []
    for index in index_B.tolist():
        generator = torch.Generator().manual_seed(1000 + index)
        rows.append(torch.randint(0, MASK_ID, (LENGTH,), generator=generator))
        edges = torch.randint(1, LENGTH, (2,), generator=generator)
        cuts.append((torch.arange(LENGTH)[:, None] >= edges[None, :]).sum(1))
    return CleanBatch(
        tokens_BL=torch.stack(rows), index_B=index_B, document_id_BL=torch.stack(cuts) if documents else None
    )


def noise_of(config: Config) -> Noise | None:
    if config.diffusion.objective == "ar":
        return None
    size = config.diffusion.block_size
    interval = Interval(*config.diffusion.interval_at(size))
    return Noise(seed=config.run.seed, mask_id=MASK_ID, group_size=BATCH, block_size=size, interval=interval)


@dataclass
class Outcome:
    """What a job showed; tensors carry plain names."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    first_grads: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def rank_job(config: Config, *, documents: bool = False, steps: int = 5) -> Any:
    """The job of one rank; its result is joined by `join_ranks`."""

    def run(topology: Topology) -> dict[str, Any]:
        vocabulary = vocabulary_of(config, size=VOCAB, mask_id=MASK_ID)
        attend = BACKENDS[config.attention.backend][0]
        model = ParallelModel(config, vocabulary, topology, attend=attend, dtype=torch.float32)
        micro = BATCH // (topology.dp * config.train.micro_batch_size)
        engine = ZeroEngine(model, config, num_micro_batches=micro, dtype=torch.float32, describe=describe)
        out: dict[str, Any] = {"place": (topology.tp_rank, topology.cp_rank, topology.dp_rank, topology.pp_rank)}
        out["losses"], out["norms"], out["grads"] = [], [], {}
        for step in range(steps):
            batches, tokens, masked = _micro_batches(config, topology, model, step, micro, documents)
            total = torch.tensor(tokens)
            torch.distributed.all_reduce(total, group=topology.groups.dp)
            scale = topology.shard_size / int(total)
            if step == 0 and engine.stage == 1:
                engine.pipeline.run(batches, loss_scale=scale)
                out["grads"] = _whole_over_shards(engine, topology)
                for parameter in model.root.parameters():
                    parameter.grad = None
            result = engine.train_step(batches, loss_scale=scale, lr=config.optim.lr)
            sums = reduce_step(result.logs, topology, num_samples=BATCH, token_count=tokens, masked_count=masked)
            out["losses"].append(sums.loss)
            out["norms"].append(result.grad_norm)
        with deepspeed.zero.GatheredParameters(list(model.root.parameters()), enabled=engine.stage == 3):
            out["parameters"] = {n: p.detach().clone() for n, p in model.root.named_parameters()}
        return out

    return run


def _micro_batches(
    config: Config, topology: Topology, model: ParallelModel, step: int, micro: int, documents: bool
) -> tuple[list[Any], int, int]:
    size = config.train.micro_batch_size
    made = []
    for number in range(micro):
        first = step * BATCH + (number * topology.dp + topology.dp_rank) * size
        clean = clean_batch(torch.arange(first, first + size), documents=documents)
        made.append(make_micro_batch(clean, noise_of(config), config.diffusion, model.layout))
    return [m[0] for m in made], sum(m[1] for m in made), sum(m[2] for m in made)


def _whole_over_shards(engine: ZeroEngine, topology: Topology) -> dict[str, Tensor]:
    grads = {}
    for name, parameter in engine.model.root.named_parameters():
        grad = local_grad(parameter)
        whole = torch.zeros_like(parameter) if grad is None else grad.clone()
        torch.distributed.all_reduce(whole, group=topology.shard_group)
        grads[name] = whole / topology.shard_size
    return grads


def join_ranks(config: Config, results: list[dict[str, Any]]) -> Outcome:
    """Whole tensors under plain names from what the ranks returned."""
    table = NameTable(config.model, VOCAB)
    outcome = Outcome(results[0]["losses"], results[0]["norms"])
    for kind, into in (("grads", outcome.first_grads), ("parameters", outcome.parameters)):
        pieces: dict[str, dict[int, Tensor]] = {}
        for result in results:
            tp_rank, cp_rank, dp_rank, _ = result["place"]
            if cp_rank == 0 and dp_rank == 0:
                for name, tensor in result[kind].items():
                    pieces.setdefault(name, {})[tp_rank] = tensor
        for name, by_rank in pieces.items():
            parts = [by_rank[rank] for rank in sorted(by_rank)]
            partition = partition_of(name, gated=config.model.style == "modern")
            into.update(table.to_plain(name, unshard(parts, partition)))
    return outcome


def plain_job(config: Config, *, documents: bool = False, steps: int = 5) -> Outcome:
    """The same job without a grid."""
    model = plain_model(config)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optim = config.optim
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.adam_eps,
    )
    outcome = Outcome()
    for step in range(steps):
        clean = clean_batch(torch.arange(step * BATCH, (step + 1) * BATCH), documents=documents)
        loss = plain_loss(model, config, clean)
        adam.zero_grad()
        loss.backward()
        if step == 0:
            outcome.first_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        outcome.losses.append(loss.item())
        outcome.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm).item())
        adam.step()
    outcome.parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    return outcome


def plain_loss(model: PlainBD3, config: Config, clean: CleanBatch) -> Tensor:
    """Nats per token of the plain model on some samples."""
    tokens_BL, documents_BL = clean.tokens_BL, clean.document_id_BL
    noise = noise_of(config)
    if noise is None:
        target_BL, has_loss_BL = next_token_targets(tokens_BL, documents_BL)
        nll_BL = next_token_nll(model(tokens_BL, None, documents_BL), target_BL)
        return nll_BL[has_loss_BL].sum() / has_loss_BL.sum()
    losses = []
    for view in range(config.diffusion.views):
        noisy = noise.of_view(view).corrupt(clean, config.diffusion)
        nll_BL = masked_token_nll(model(noisy.noisy_BL, tokens_BL, documents_BL), tokens_BL, mask_id=MASK_ID)
        losses.append((nll_BL * noisy.weight_BL)[noisy.is_masked_BL].sum() / noisy.countable_BL.sum())
    return torch.stack(losses).mean()


def plain_model(config: Config) -> PlainBD3:
    """The plain model with the weights that every grid starts from."""
    shape = config.model
    plain = PlainBD3(
        plain_config(
            shape,
            vocab_size=VOCAB,
            seq_len=LENGTH,
            block_size=config.diffusion.block_size,
            mask_id=MASK_ID,
            objective=config.diffusion.objective,
        )
    )
    table = NameTable(shape, VOCAB)
    state: dict[str, Tensor] = {}
    for name in table.parallel_names():
        shapes = _parallel_shape(name, table, plain)
        state.update(table.to_plain(name, initial_value(name, shapes, shape, seed=config.run.seed)))
    if shape.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    plain.load_state_dict(state)
    return plain


def _parallel_shape(name: str, table: NameTable, plain: PlainBD3) -> tuple[int, ...]:
    held = dict(plain.named_parameters())
    return tuple(table.to_parallel(name, held).shape)
