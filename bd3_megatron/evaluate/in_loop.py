"""Perplexity on the training grid: the averaged weights, the same rows and noise as from an exported folder.

A collective: all ranks call it between two steps, and every rank returns the same estimate.
Costs rows / (dp x micro-batch) forward passes; no gradient memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from bd3_megatron.config.schema import Config
from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.diffusion.axes import BD3_LM
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.evaluate.noise_plan import NoisePlan
from bd3_megatron.evaluate.perplexity import (
    Estimate,
    HeldOut,
    ScoreSettings,
    ScoreSums,
    Share,
    chunked,
    deal,
    estimate,
    read_share,
    score_table,
)
from bd3_megatron.model.build import ParallelModel
from bd3_megatron.model.pair_batch import pair_batch
from bd3_megatron.parallel.topology import Topology

BATCHES_PER_CALL = 64
"""Micro-batches in memory at once (rounded to the pipeline's needs)."""


def settings_of(config: Config, convention: EvaluationConvention) -> ScoreSettings:
    """What a run's configuration asks for, under the run's convention."""
    asked = config.evaluate
    return ScoreSettings(
        convention=convention,
        num_sequences=asked.num_sequences,
        draws=1 if asked.official else asked.draws,
        by_level=asked.official,
    )


def evaluate_on_grid(
    engine: ZeroEngine,
    topology: Topology,
    dataset: HeldOut,
    config: Config,
    convention: EvaluationConvention,
    *,
    block_size: int,
) -> Estimate:
    """Held-out perplexity under the averaged weights; collective over all ranks.

    Args:
        engine: the model and its averaged weights.
        topology: the grid.
        dataset: held-out rows of data.seq_len, cut by the convention, the same on every rank, not shuffled.
        config: evaluate and diffusion sections, and the micro-batch size.
        convention: of the run.
        block_size: S that the weights were trained with.

    Returns:
        The same estimate on every rank.

    Raises:
        RangeError: nothing to score.
    """
    settings = settings_of(config, convention)
    plan = settings.plan(
        objective=config.diffusion.objective, block_size=block_size, mask_id=engine.model.vocabulary.mask_id
    )
    table = score_table(plan, num_rows=dataset.num_rows, num_sequences=settings.num_sequences)
    sums = ScoreSums(table, topology.device)
    # Interleaved schedules take micro-batches by multiples of the stages.
    group = topology.pp if topology.vpp > 1 else 1
    shares = deal(
        table,
        batch_size=config.train.micro_batch_size,
        rank=topology.dp_rank,
        ranks=topology.dp,
        multiple=group,
    )
    # A micro-batch has the size that training uses: pipelines and ZeRO-3 need equal shapes and counts everywhere.
    with _rows_of(engine.model, block_size), engine.averaged_weights():
        # In parts: batches of a whole split need not be in memory at once.
        for part in chunked(shares, BATCHES_PER_CALL // group * group or group):
            _score(engine, dataset, plan, sums, part)
    _share_sums(sums, topology)
    return estimate(plan, sums)


def _score(engine: ZeroEngine, dataset: HeldOut, plan: NoisePlan, sums: ScoreSums, shares: Sequence[Share]) -> None:
    """Run some micro-batches and put down what this rank learns of them."""
    topology, layout = engine.model.topology, engine.model.layout
    batches = []
    for share in shares:
        clean, draw_B = read_share(dataset, sums.table, share)
        noisy = plan.noisy(clean, draw_B)
        batches.append(pair_batch(clean, [] if noisy is None else [noisy], layout).to(topology.device))
        # counts are whole on every rank, sums are partial over context-parallel ranks: only one may put counts
        if topology.is_last_stage and topology.cp_rank == 0:
            sums.put_counts(share, plan.counted(clean))
    logs = engine.evaluate(batches)
    if topology.is_last_stage:
        for share, log in zip(shares, logs, strict=True):
            sums.put_sums(share, log.weighted_nll_B)


def _share_sums(sums: ScoreSums, topology: Topology) -> None:
    """Entry: each last-stage rank has its rows, partial over cp. Exit: every rank has all rows, whole."""
    if topology.is_last_stage:
        # Over dp and cp: rows of other replicas are zero here, and rows of one are partial over cp.
        dist.all_reduce(sums.both_2R, group=topology.shard_group)
    if topology.pp > 1:
        dist.broadcast(sums.both_2R, topology.last_stage_rank(), group=topology.groups.pp)


@contextmanager
def _rows_of(model: ParallelModel, block_size: int) -> Iterator[None]:
    """Inside, the model has the rows of this block size."""
    before = model.layout
    # One noisy copy and the axes of the bound: the others are a means of training.
    model.enter_phase(block_size, views=1, axes=BD3_LM)
    try:
        yield
    finally:
        # Also after an error: training must not go on with evaluation's rows.
        model.context.layout = before
