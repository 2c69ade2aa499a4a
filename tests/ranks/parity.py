"""One training job on any grid, and the same job on the plain model: what the parity tests compare.

The grid side makes its updates with the trainer's own `TrainingStep` and `StepBatches`. The plain side knows no megatron
and no DeepSpeed: the exported model's file, torch's AdamW and global-norm clipping, whole batches in fp64, and its own
learning rate, batch size, block size and token count of every step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor

from bd3_megatron.attention.select import named
from bd3_megatron.checkpoint.pieces import owned_pieces
from bd3_megatron.config.axes import AxesConfig
from bd3_megatron.config.load import config_from_tree, replace_field
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.plain_config import plain_config
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.token_nll import masked_token_nll, next_token_nll
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.model.init_weights import initial_expert, initial_value
from bd3_megatron.model.pair_batch import PairBatch
from bd3_megatron.model.partition import is_expert, partition_of
from bd3_megatron.parallel.pair_split import PairLayout
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.batches import Noise, StepBatches, make_micro_batch
from bd3_megatron.train.plan import RunPlan
from bd3_megatron.train.state import TrainState
from bd3_megatron.train.step import StepOutcome, TrainingStep
from bd3_megatron.train.timeline import Timeline
from tests.ranks.choice_watch import ChoiceWatch
from tests.unit.model.joined import unshard
from tests.unit.train.samples import SourceRows

VOCAB, MASK_ID, LENGTH, BATCH = 61, 60, 32, 8


def job_config(
    style: str = "modern", *, tied: bool = False, layers: int = 4, kv_heads: int = 2, **sections: Any
) -> Config:
    """A small run; `sections` holds overrides by section, e.g. parallel={...}."""
    modern = style == "modern"
    num_replicas = sections.get("parallel", {}).get("dp", 1)
    tree: dict[str, Any] = {
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
        # two micro-batches a rank: one would accumulate nothing, more prove no more
        "train": {"steps": 5, "global_batch_size": BATCH, "micro_batch_size": max(1, BATCH // (2 * num_replicas))},
        "optim": {"lr": 1e-3, "clip_grad_norm": 0.5, "ema_decay": 0.9, "weight_decay": 0.1},
        "attention": {"backend": "dense"},
    }
    # every step another rate, so that a wrong one shows
    tree["optim"] |= {"schedule": "cosine", "warmup_steps": 1, "min_lr_ratio": 0.5}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return config_from_tree(tree)


class Rows(Protocol):
    """Clean rows as a function of their index."""

    def batch_for(self, index_B: Tensor) -> CleanBatch: ...


@dataclass(frozen=True)
class RandomRows:
    """Random tokens; with documents, two or three a sample, cut at odd positions; padded, up to a third of a sample."""

    documents: bool = False
    padded: bool = False

    def batch_for(self, index_B: Tensor) -> CleanBatch:
        clean = clean_batch(index_B, documents=self.documents)
        if not self.padded:
            return clean
        is_padding_BL = torch.arange(LENGTH) >= LENGTH - (5 * index_B[:, None]) % 11
        return replace(clean, is_padding_BL=is_padding_BL, tokens_BL=clean.tokens_BL.masked_fill(is_padding_BL, 0))


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


def noise_of(config: Config, *, block_size: int | None = None, mask_id: int = MASK_ID) -> Noise:
    """The noise of a phase, as the trainer draws it."""
    size = config.diffusion.block_size if block_size is None else block_size
    interval = Interval(*config.diffusion.interval_at(size))
    group = config.train.global_batch_size
    axes = config.diffusion.axes.axes()
    return Noise(seed=config.run.seed, mask_id=mask_id, group_size=group, block_size=size, interval=interval, axes=axes)


def make_batch(config: Config, clean: CleanBatch, layout: PairLayout) -> PairBatch:
    """One micro-batch of the configuration's first phase."""
    return make_micro_batch(clean, noise_of(config), config.diffusion, layout).pair


@dataclass
class Outcome:
    """What a job showed; tensors carry plain names."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    first_grads: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    """Exponential moving averages of the parameters."""
    loads: list[dict[int, list[int]]] = field(default_factory=list)
    """Of every step: layer -> rows that chose each expert."""
    masked_loads: list[dict[int, list[list[int]]]] = field(default_factory=list)
    """The same of rows that carry loss, for each tenth of noise levels."""
    terms: list[dict[int, list[float]]] = field(default_factory=list)
    """Of every step: layer -> balance and z terms of its router."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Of experts after the last step, by plain names."""
    smallest_gap: float = math.inf
    """Of a plain job with experts: the least distance between the last chosen and the first left-out expert of any row."""
    confidences: list[float] = field(default_factory=list)
    """Confidence terms without their factor, nats per token."""


def rank_job(
    config: Config,
    *,
    documents: bool = False,
    steps: int = 5,
    rows: Rows | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The job of one rank, on `rows` or on random ones; its result is joined by `join_ranks`."""
    trained = RandomRows(documents) if rows is None else rows
    if documents:
        config = replace_field(config, "data.packing", "isolated")

    def run(topology: Topology) -> dict[str, Any]:
        vocabulary = vocabulary_of(config, size=VOCAB, mask_id=MASK_ID)
        backends = dict.fromkeys(block_sizes(config), named(config.attention.backend))
        model = ParallelModel(config, vocabulary, topology, backends=backends, dtype=dtype)
        micro = BATCH // (topology.dp * config.train.micro_batch_size)
        engine = ZeroEngine(model, config, num_micro_batches=micro, dtype=dtype)
        out: dict[str, Any] = {"place": (topology.tp_rank, topology.cp_rank, topology.dp_rank, topology.pp_rank)}
        out["ep_rank"] = topology.ep_rank
        out |= {"losses": [], "norms": [], "rates": [], "confidences": [], "grads": {}}
        out |= {"loads": [], "masked_loads": [], "terms": []}

        def keep_gradients(loss: float) -> bool:
            out["grads"] = _whole_over_shards(engine, topology)
            return False

        for outcome in updates(config, topology, engine, trained, steps, keep_gradients):
            sums = outcome.sums()
            out["losses"].append(sums.loss)
            out["confidences"].append(sums.weighted_entropy_nats / sums.token_count)
            out["norms"].append(outcome.result.grad_norm)
            out["rates"].append(engine.optimizer.param_groups[0]["lr"])
            loads = outcome.result.loads
            out["loads"].append({layer: load.load_E.tolist() for layer, load in loads.items()})
            out["masked_loads"].append({layer: load.masked_TE.tolist() for layer, load in loads.items()})
            out["terms"].append({layer: load.terms.tolist() for layer, load in loads.items()})
        out["biases"] = {n: bias.clone() for n, bias in model.root.named_biases()}
        with deepspeed.zero.GatheredParameters(list(model.root.parameters()), enabled=engine.stage == 3):
            out["parameters"] = {n: p.detach().clone() for n, p in model.root.named_parameters()}
        with (
            engine.averaged_weights(),
            deepspeed.zero.GatheredParameters(list(model.root.parameters()), enabled=engine.stage == 3),
        ):
            out["averages"] = {n: p.detach().clone() for n, p in model.root.named_parameters()}
        return out

    return run


def updates(
    config: Config, topology: Topology, engine: ZeroEngine, rows: Rows, steps: int, first_veto: Any = None
) -> Any:
    """The trainer's own updates of an engine, one outcome a step.

    Args:
        config: the run.
        topology, engine: of this rank.
        rows: what is trained on.
        steps: how many updates.
        first_veto: asked between backward and update of the first step (ZeRO 1), where gradients can be looked at.
    """
    plan, state = RunPlan(config), TrainState()
    training_step = TrainingStep(config=config, topology=topology, engine=engine, timeline=Timeline())
    batches = StepBatches(SourceRows(rows), plan, topology, first_step=0, mask_id=MASK_ID, num_workers=0)
    for step in range(steps):
        veto = first_veto if step == 0 and engine.stage == 1 else None
        outcome: StepOutcome = training_step.run(plan, state, batches, veto=veto)
        state.step += 1
        state.samples_consumed += outcome.num_samples
        yield outcome


def _whole_over_shards(engine: ZeroEngine, topology: Topology) -> dict[str, Tensor]:
    """The mean gradients before clipping; each rank holds those of the elements that it updates."""
    assert engine.gradients is not None
    grads = {name: torch.zeros_like(p).flatten() for name, p in engine.model.root.named_parameters()}
    for piece in owned_pieces(engine):
        held = engine.gradients.owned[piece.index][piece.start : piece.start + piece.numel]
        grads[piece.name][piece.offset : piece.offset + piece.numel] = held
    for name, grad in grads.items():
        held_by = topology.expert_data_group if is_expert(name) else topology.shard_group
        torch.distributed.all_reduce(grad, group=held_by)
    return {name: grads[name].view_as(p) for name, p in engine.model.root.named_parameters()}


def join_ranks(config: Config, results: list[dict[str, Any]], *, vocab: int = VOCAB) -> Outcome:
    """Whole tensors under plain names from what the ranks returned."""
    first = results[0]
    outcome = Outcome(first["losses"], first["norms"], first["rates"], confidences=first["confidences"])
    by_step: dict[str, list[Any]] = {
        "loads": outcome.loads,
        "masked_loads": outcome.masked_loads,
        "terms": outcome.terms,
    }
    for kind, steps in by_step.items():
        for by_rank in zip(*(result[kind] for result in results), strict=True):
            steps.append({layer: value for one in by_rank for layer, value in one.items()})
    table = NameTable(config.model, vocab)
    outcome.biases = {k: v for r in results for n, b in r["biases"].items() for k, v in table.to_plain(n, b).items()}
    kinds = {"grads": outcome.first_grads, "parameters": outcome.parameters, "averages": outcome.averages}
    for kind, into in kinds.items():
        pieces: dict[str, dict[int, Tensor]] = {}
        for result in results:
            tp_rank, cp_rank, dp_rank, _ = result["place"]
            for name, tensor in result[kind].items():
                if is_expert(name):
                    pieces.setdefault(name, {})[result["ep_rank"]] = tensor
                elif cp_rank == 0 and dp_rank == 0:
                    pieces.setdefault(name, {})[tp_rank] = tensor
        into.update(plain_names(config, pieces, vocab=vocab))
    return outcome


def plain_names(config: Config, pieces: Mapping[str, Mapping[int, Tensor]], *, vocab: int = VOCAB) -> dict[str, Tensor]:
    """Whole tensors under plain names from global name -> tensor-parallel rank -> piece."""
    table, found = NameTable(config.model, vocab), {}
    for name, by_rank in pieces.items():
        parts = [by_rank[rank] for rank in sorted(by_rank)]
        partition = partition_of(name, gated=config.model.style == "modern")
        found.update(table.to_plain(name, unshard(parts, partition)))
    return found


def plain_job(
    config: Config,
    *,
    documents: bool = False,
    steps: int = 5,
    rows: Rows | None = None,
    vocab: int = VOCAB,
    mask_id: int = MASK_ID,
) -> Outcome:
    """The same job without a grid: on `rows`, or on random ones."""
    rows = RandomRows(documents) if rows is None else rows
    # In fp64: its own rounding, which Adam magnifies, would count against the grid (on one grid of the matrix it was larger
    # than the grid's, and of the other sign).
    model = plain_model(config, vocab=vocab, mask_id=mask_id).double()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optim = config.optim
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.adam_eps,
    )
    outcome, consumed = Outcome(), 0
    watch = ChoiceWatch(model)
    averages = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(steps):
        samples = plain_batch_size(config, step)
        clean = rows.batch_for(torch.arange(consumed, consumed + samples))
        consumed += samples
        size, factor = plain_phase(config, step)
        model.model.shape = copy.copy(model.model.shape)
        model.model.shape.block_size = size
        phase = replace_field(config, "diffusion.axes", plain_axes(config, step))
        if config.model.experts is not None:
            watch.begin(noise_of(phase, block_size=size), phase.diffusion, clean)
        loss, confidence = plain_loss(model, phase, clean, block_size=size, mask_id=mask_id)
        rate = plain_rate(config, step) * factor
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        (loss + phase.diffusion.axes.confidence * confidence + watch.loss(config.model.experts)).backward()
        if step == 0:
            outcome.first_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        outcome.losses.append(loss.item())
        outcome.confidences.append(confidence.item() if phase.diffusion.axes.confidence else 0.0)
        outcome.rates.append(rate)
        outcome.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad_norm).item())
        adam.step()
        if config.model.experts is not None:
            watch.finish(config.model.experts.bias_rate)
            outcome.loads.append(watch.loads)
            outcome.masked_loads.append(watch.masked_loads)
            if config.model.experts.balance_loss or config.model.experts.z_loss:
                terms = watch.terms().items()
                outcome.terms.append({layer: [term.item() for term in both] for layer, both in terms})
        keep = min(optim.ema_decay, (2 + step) / (11 + step))
        averages = {n: keep * averages[n] + (1 - keep) * p.detach() for n, p in model.named_parameters()}
    outcome.parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    outcome.averages = averages
    outcome.biases = {n: b.clone() for n, b in model.named_buffers()}
    outcome.smallest_gap = watch.smallest_gap
    return outcome


def plain_rate(config: Config, step: int) -> float:
    """Linear warm-up, then constant or cosine to min_lr_ratio at the run's last step."""
    optim, total = config.optim, config.train.steps
    assert total is not None
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    assert optim.schedule == "cosine"
    share = (step - optim.warmup_steps) / (total - optim.warmup_steps)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * (1 + math.cos(math.pi * share)) / 2)


def plain_batch_size(config: Config, step: int) -> int:
    """Samples of a step, growing linearly in multiples of the first size."""
    train = config.train
    if train.warmup_batch_size is None or step >= train.batch_warmup_steps:
        return train.global_batch_size
    grown = (
        train.warmup_batch_size + (train.global_batch_size - train.warmup_batch_size) * step / train.batch_warmup_steps
    )
    return int(grown / train.warmup_batch_size) * train.warmup_batch_size


def plain_phase(config: Config, step: int) -> tuple[int, float]:
    """(block size, factor on the learning rate) of a step; phases are given in steps."""
    first = 0
    for phase in config.diffusion.phases:
        if phase.steps is None or step < first + phase.steps:
            length = phase.steps or (config.train.steps or 0) - first
            share = (step - first) / length
            return phase.block_size, phase.lr_start + (phase.lr_end - phase.lr_start) * share
        first += phase.steps
    return (1 if config.diffusion.objective == "ar" else config.diffusion.block_size), 1.0


def plain_axes(config: Config, step: int) -> AxesConfig:
    """Axes of a step: its phase's own, or the run's; phases are given in steps."""
    first = 0
    for phase in config.diffusion.phases:
        if phase.steps is None or step < first + phase.steps:
            return config.diffusion.axes if phase.axes is None else phase.axes
        first += phase.steps
    return config.diffusion.axes


def plain_loss(
    model: PlainBD3, config: Config, clean: CleanBatch, *, block_size: int | None = None, mask_id: int = MASK_ID
) -> tuple[Tensor, Tensor]:
    """Nats per token of the plain model on some samples, and its confidence term without its factor."""
    tokens_BL, documents_BL = clean.tokens_BL, clean.document_id_BL
    padding_BL, supervised_BL = clean.is_padding_BL, clean.is_supervised_BL
    if config.diffusion.objective == "ar":
        nll_BL = next_token_nll(model(tokens_BL, None, documents_BL)[:, :-1], tokens_BL[:, 1:])
        counts_BL = torch.ones_like(nll_BL, dtype=torch.bool)
        if documents_BL is not None:
            counts_BL = documents_BL[:, 1:] == documents_BL[:, :-1]
        if padding_BL is not None:
            counts_BL = counts_BL & ~padding_BL[:, 1:]
        if supervised_BL is not None:
            counts_BL = counts_BL & supervised_BL[:, 1:]
        loss = nll_BL[counts_BL].sum() / counts_BL.sum()
        return loss, torch.zeros_like(loss)
    total, confidence, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    denominator = config.diffusion.axes.denominator
    noise = noise_of(config, block_size=block_size, mask_id=mask_id)
    for view in range(config.diffusion.views):
        noisy = noise.of_view(view).corrupt(clean, config.diffusion)
        logits_BLV = model(noisy.noisy_BL, tokens_BL, documents_BL)
        nll_BL = masked_token_nll(logits_BLV, tokens_BL, mask_id=mask_id)
        allowed_BLV = torch.cat([logits_BLV[..., :mask_id], logits_BLV[..., mask_id + 1 :]], dim=-1)
        law_BL = torch.distributions.Categorical(logits=allowed_BLV)
        sharp_BL = law_BL.entropy() * (nll_BL.detach() <= -law_BL.logits.max(-1).values.detach() + 1e-6)
        for row, masked_L in enumerate(noisy.is_masked_BL):
            text_L = torch.ones_like(masked_L) if padding_BL is None else ~padding_BL[row]
            if supervised_BL is not None:
                text_L, masked_L = text_L & supervised_BL[row], masked_L & supervised_BL[row]
            maskable_L = noisy.countable_BL[row] & text_L
            for part_L, maskable in answers_of(masked_L, maskable_L, documents_BL, row, denominator):
                share = 1 / max(maskable, 1) if denominator == "answer_length" else 1
                total = total + (nll_BL[row] * noisy.weight_BL[row])[part_L].double().sum() * share
                confidence = confidence + (sharp_BL[row] * noisy.weight_BL[row])[part_L].double().sum() * share
                counts = {"maskable": maskable, "all": text_L.sum(), "loss_rows": part_L.sum()}
                count += int(counts.get(denominator, maskable > 0))
    return total / count, confidence / count


def answers_of(
    masked_L: Tensor, countable_L: Tensor, documents_BL: Tensor | None, row: int, denominator: str
) -> list[tuple[Tensor, int]]:
    """(masked tokens, tokens that may be masked) of a row, or of each of its documents where answers are counted."""
    if documents_BL is None or denominator != "answer_length":
        return [(masked_L, int(countable_L.sum()))]
    parts = [documents_BL[row] == number for number in documents_BL[row].unique()]
    return [(masked_L & part_L, int((countable_L & part_L).sum())) for part_L in parts]


def plain_model(config: Config, *, vocab: int = VOCAB, mask_id: int = MASK_ID) -> PlainBD3:
    """The plain model with the weights that every grid starts from."""
    shape = config.model
    plain = PlainBD3(
        plain_config(
            shape,
            vocab_size=vocab,
            seq_len=config.data.seq_len,
            block_size=plain_phase(config, 0)[0],
            mask_id=mask_id,
            objective=config.diffusion.objective,
        )
    )
    table = NameTable(shape, vocab)
    state: dict[str, Tensor] = {}
    for name in table.parallel_names():
        shapes = _parallel_shape(name, table, plain)
        state.update(table.to_plain(name, _initial(name, shapes, config)))
    if shape.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    plain.load_state_dict(state)
    return plain


def _initial(name: str, shape: tuple[int, ...], config: Config) -> Tensor:
    seed = config.run.seed
    if is_expert(name):
        return torch.stack([initial_expert(name, e, shape[1:], config.model, seed=seed) for e in range(shape[0])])
    return initial_value(name, shape, config.model, seed=seed)


def _parallel_shape(name: str, table: NameTable, plain: PlainBD3) -> tuple[int, ...]:
    held = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    return tuple(table.to_parallel(name, held).shape)
