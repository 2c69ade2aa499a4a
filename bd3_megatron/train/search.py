"""The interval search on the training grid: held-out rows, averaged weights, one set of forward passes for all candidates.

Decides: which rows (the first search_batches x global_batch_size held-out ones, or all where there are fewer), which noise
(keyed by the step, so a search can be repeated), and how moments meet: block losses are summed over cp on the last stage,
scored there, gathered over dp and merged, and the choice is sent to all ranks.
Costs: a forward pass of those rows a search (twice at block size 1, for full masking): 100 batches every 5,000 steps are
below 1 % of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.config.schema import Config
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.corrupt import NoisyBatch, corrupt
from bd3_megatron.diffusion.interval_search import Moments, candidates, least_varying, passes, score, score_resampled
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import noise_schedule
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.evaluate.perplexity import HeldOut
from bd3_megatron.model.pair_batch import pair_batch
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.rng import Purpose, generator_seed

ROUNDS_PER_CALL = 16
"""Micro-batches of each stage that are in the pipeline at once."""


@dataclass(frozen=True)
class FoundInterval:
    """What a search found."""

    interval: Interval
    variance: float
    """Of one block's loss under the chosen interval, nats squared."""
    variance_before: float
    """Under the full interval [1e-3, 1]."""
    num_candidates: int

    def metrics(self) -> dict[str, float]:
        """The record's entries."""
        return {
            "search/interval_beta": self.interval.beta,
            "search/interval_omega": self.interval.omega,
            "search/variance_nats2": self.variance,
            "search/variance_full_interval_nats2": self.variance_before,
            "search/num_candidates": self.num_candidates,
        }


def search_interval(
    engine: ZeroEngine, topology: Topology, held_out: HeldOut, config: Config, *, block_size: int, step: int
) -> FoundInterval:
    """The interval of least variance at a block size. Collective over all ranks.

    Args:
        engine: its averaged weights are used.
        topology: the grid.
        held_out: rows, the same on every rank.
        config: the run.
        block_size: S of the next update; the engine's rows must already be of it.
        step: keys the noise.
    """
    intervals = candidates(block_size, config.diffusion.search_widths)
    moments = Moments.none(len(intervals))
    num_rows = min(config.diffusion.search_batches * config.train.global_batch_size, held_out.num_rows)
    # Rounded up, so that the pipeline is full; rows that only fill up a round are run and not counted.
    num_rounds = -(-num_rows // (topology.pp * topology.dp * config.train.micro_batch_size))
    # The weights that are evaluated and exported are those whose variance counts.
    with engine.averaged_weights():
        for drawn_from in passes(intervals):
            for first in range(0, num_rounds, ROUNDS_PER_CALL):
                rounds = range(first, min(first + ROUNDS_PER_CALL, num_rounds))
                batches = _micro_batches(engine, held_out, config, drawn_from, step=step, rounds=rounds)
                moments = moments.merge(_score(engine, config, batches, intervals, drawn_from, num_rows=num_rows))
    moments = _merged_over_ranks(moments, topology)
    best = least_varying(intervals, moments)
    variance = moments.variance()
    return FoundInterval(intervals[best], float(variance[best]), float(variance[0]), len(intervals))


def _micro_batches(
    engine: ZeroEngine, held_out: HeldOut, config: Config, drawn_from: Interval, *, step: int, rounds: range
) -> list[tuple[CleanBatch, NoisyBatch]]:
    """This rank's micro-batches of some rounds; a round is one a stage, which interleaved schedules ask for."""
    topology, size = engine.model.topology, config.train.micro_batch_size
    made = []
    for number in range(rounds.start * topology.pp, rounds.stop * topology.pp):
        # Row numbers do not depend on the grid, only who computes them does.
        start = (number * topology.dp + topology.dp_rank) * size
        clean = held_out.batch_for(torch.arange(start, start + size))
        made.append((clean, _corrupt(clean, config, engine, drawn_from, step=step)))
    return made


def _score(
    engine: ZeroEngine,
    config: Config,
    batches: list[tuple[CleanBatch, NoisyBatch]],
    intervals: tuple[Interval, ...],
    drawn_from: Interval,
    *,
    num_rows: int,
) -> Moments:
    """Moments of the rows below `num_rows`: on last stages this data-parallel rank's own, elsewhere none."""
    topology, layout = engine.model.topology, engine.model.layout
    moments = Moments.none(len(intervals))
    logs = engine.evaluate([pair_batch(clean, [noisy], layout).to(topology.device) for clean, noisy in batches])
    # stages before the last have no logs
    for log, (clean, noisy) in zip(logs, batches, strict=False):
        loss_BK = log.weighted_nll_BK / layout.block_size
        # Each context-parallel rank has the loss of its own rows of every block.
        dist.all_reduce(loss_BK, group=topology.groups.cp)
        is_asked_B1 = (clean.index_B < num_rows)[:, None]
        moments = moments.merge(_moments(loss_BK.cpu(), noisy, is_asked_B1, config, intervals, drawn_from))
    return moments


def _corrupt(clean: CleanBatch, config: Config, engine: ZeroEngine, drawn_from: Interval, *, step: int) -> NoisyBatch:
    # Not the training noise: an interval chosen on the noise of a step would fit that noise.
    seed = generator_seed(config.run.seed, Purpose.SEARCH, f"step {step}")
    t_BK = noise_levels(
        seed,
        clean.index_B,
        num_blocks=config.data.seq_len // engine.model.layout.block_size,
        interval=drawn_from,
        group_size=config.train.global_batch_size,
    )
    mask_id = engine.model.vocabulary.mask_id
    return corrupt(
        clean.tokens_BL,
        t_BK,
        index_B=clean.index_B,
        seed=seed,
        mask_id=0 if mask_id is None else mask_id,
        schedule=noise_schedule(config.diffusion.noise_schedule),
        never_mask_first=config.diffusion.never_mask_first,
        is_padding_BL=clean.is_padding_BL,
        is_supervised_BL=clean.is_supervised_BL,
    )


def _moments(
    loss_BK: Tensor,
    batch: NoisyBatch,
    is_asked_B1: Tensor,
    config: Config,
    intervals: tuple[Interval, ...],
    drawn_from: Interval,
) -> Moments:
    counted_BK = batch.countable_BL.unflatten(1, (-1, batch.block_size)).any(dim=2) & is_asked_B1
    if not config.diffusion.resample:
        return score(loss_BK, batch.t_BK, intervals=intervals, drawn_from=drawn_from, is_counted_BK=counted_BK)
    return score_resampled(
        loss_BK,
        batch.t_BK,
        batch.drawn_BK,
        intervals=intervals,
        drawn_from=drawn_from,
        block_size=batch.block_size,
        schedule=noise_schedule(config.diffusion.noise_schedule),
        is_counted_BK=counted_BK,
    )


def _merged_over_ranks(moments: Moments, topology: Topology) -> Moments:
    """Entry: each data-parallel rank's own, on last stages. Exit: of all, the same on every rank."""
    packed = moments.pack().to(topology.device)
    if topology.is_last_stage:
        parts = [torch.empty_like(packed) for _ in range(topology.dp)]
        dist.all_gather(parts, packed, group=topology.groups.dp)
        whole = Moments.none(packed.shape[1], topology.device)
        # In rank order on every rank: merging moments rounds, and all must come to one choice.
        for part in parts:
            whole = whole.merge(Moments.unpack(part))
        packed = whole.pack()
    if topology.pp > 1:
        dist.broadcast(packed, topology.last_stage_rank(), group=topology.groups.pp)
    return Moments.unpack(packed.cpu())
