"""The interval search gives one answer on every grid: that of the plain model on the same rows, one sample after another."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bd3_megatron.attention.select import named
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.diffusion.corrupt import corrupt
from bd3_megatron.diffusion.interval_search import FULL, candidates, passes
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import noise_schedule
from bd3_megatron.diffusion.token_nll import block_losses, masked_token_nll
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.model.pair_batch import PairBatch
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.rng import Purpose, generator_seed
from bd3_megatron.train.search import FoundInterval, search_interval
from tests import tolerances
from tests.ranks.harness import run_ranks
from tests.ranks.parity import BATCH, MASK_ID, VOCAB, job_config, plain_model
from tests.unit.train.samples import LENGTH, Samples

NUM_ROWS, STEP = 45, 40
GRIDS: list[tuple[dict[str, Any], int]] = [
    ({"tp": 2, "sequence_parallel": True}, 2),
    ({"pp": 2, "vpp": 2}, 1),
    ({"pp": 2, "cp": 2}, 2),
    ({"dp": 2, "zero_stage": 3}, 4),
]


def search_config(parallel: dict[str, Any], micro: int, **diffusion: Any) -> Config:
    # 8 batches of 8 are more than the 45 rows held out: the last micro-batches are filled up and must not count
    diffusion = {"block_size": 4, "search_batches": 8, "search_widths": [0.5, 0.8], **diffusion}
    return job_config(parallel=parallel, train={"micro_batch_size": micro}, diffusion=diffusion)


def on_grid(config: Config) -> list[tuple[FoundInterval, int]]:
    """What every rank found, and how many rows it ran."""

    def on_rank(topology: Topology) -> tuple[FoundInterval, int]:
        vocabulary = vocabulary_of(config, size=VOCAB, mask_id=MASK_ID)
        model = ParallelModel(
            config,
            vocabulary,
            topology,
            backends=dict.fromkeys(block_sizes(config), named("dense")),
            dtype=torch.float32,
        )
        engine = ZeroEngine(model, config, num_micro_batches=1, dtype=torch.float32)
        rows, evaluate = [], engine.evaluate

        def counted(batches: Sequence[PairBatch]) -> Any:
            rows.extend(batch.batch_size for batch in batches)
            return evaluate(batches)

        engine.evaluate = counted  # type: ignore[method-assign]
        size = config.diffusion.block_size
        choice = search_interval(engine, topology, Samples(NUM_ROWS), config, block_size=size, step=STEP)
        return choice, sum(rows)

    return run_ranks(on_rank, config.parallel)


@functools.cache
def variances(block_size: int) -> dict[Interval, float]:
    """Of every candidate, over all rows at once, by torch's own variance."""
    config = search_config({}, 1, block_size=block_size)
    model, clean = plain_model(config), Samples().batch_for(torch.arange(NUM_ROWS))
    seed = generator_seed(config.run.seed, Purpose.SEARCH, f"step {STEP}")
    intervals = candidates(block_size, config.diffusion.search_widths)
    found: dict[Interval, float] = {}
    for drawn_from in passes(intervals):
        t_BK = noise_levels(seed, clean.index_B, num_blocks=LENGTH // block_size, interval=drawn_from, group_size=BATCH)
        noisy = corrupt(
            clean.tokens_BL,
            t_BK,
            index_B=clean.index_B,
            seed=seed,
            mask_id=MASK_ID,
            schedule=noise_schedule("loglinear"),
        )
        with torch.no_grad():
            logits_BLV = model(noisy.noisy_BL, clean.tokens_BL, None)
        loss_BK = block_losses(masked_token_nll(logits_BLV, clean.tokens_BL, mask_id=MASK_ID), noisy).double()
        points = [i for i in intervals if (i == drawn_from if 0.0 in (i.width, drawn_from.width) else True)]
        found |= {i: float(loss_BK[i.holds(t_BK)].var()) for i in points}
    return found


@pytest.mark.parametrize(("parallel", "micro"), GRIDS, ids=str)
def test_the_search_is_the_same_on_every_grid(parallel: dict[str, Any], micro: int) -> None:
    expected = variances(4)
    found = on_grid(search_config(parallel, micro))
    choice, rows = found[0]
    assert set(found) == {(choice, rows)}, "every rank must go on with the same interval"
    # each row once, whatever the number of candidates; what fills up the last round is less than a round
    dp, pp = parallel.get("dp", 1), parallel.get("pp", 1)
    assert NUM_ROWS <= rows * dp < NUM_ROWS + dp * pp * micro
    assert choice.interval == min(expected, key=lambda i: expected[i]) != FULL
    assert choice.num_candidates == len(expected) == 17
    assert choice.variance == pytest.approx(expected[choice.interval], rel=tolerances.SEARCH_VARIANCE)
    assert choice.variance_before == pytest.approx(expected[FULL], rel=tolerances.SEARCH_VARIANCE)


def test_at_block_size_one_full_masking_is_a_pass_of_its_own() -> None:
    expected = variances(1)
    choice, rows = on_grid(search_config({"pp": 2}, 1, block_size=1))[0]
    assert rows == 2 * (NUM_ROWS + 1)
    assert choice.num_candidates == 2
    assert choice.interval == Interval(1.0, 1.0)
    assert choice.variance == pytest.approx(expected[Interval(1.0, 1.0)], rel=tolerances.SEARCH_VARIANCE)
    assert choice.variance_before == pytest.approx(expected[FULL], rel=tolerances.SEARCH_VARIANCE)


def test_with_resampling_the_search_is_the_same_on_every_grid() -> None:
    grids = [search_config({}, 1, resample=True), search_config({"dp": 2}, 2, resample=True)]
    one, other = (on_grid(config)[0][0] for config in grids)
    assert one.interval == other.interval
    assert one.variance == pytest.approx(other.variance, rel=tolerances.SEARCH_VARIANCE)
    # conditioned masks are another estimator than free ones
    assert one.variance != pytest.approx(variances(4)[one.interval], rel=1e-3)
