"""An update whose gradients are not finite changes nothing: neither weights, nor their averages, nor the counters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from bd3_megatron.attention.select import named
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.model.loss_sums import LossSums
from bd3_megatron.parallel.topology import Topology
from tests.ranks.harness import run_ranks
from tests.ranks.parity import MASK_ID, VOCAB, clean_batch, job_config, make_batch


@pytest.mark.parametrize("parallel", [{}, {"dp": 4}, {"dp": 2, "zero_stage": 3}], ids=str)
def test_an_update_that_is_not_finite_changes_nothing(parallel: dict[str, Any]) -> None:
    config = job_config(parallel=parallel, train={"micro_batch_size": 8 // parallel.get("dp", 1)})

    def on_rank(topology: Topology) -> tuple[list[bool], bool, int, int]:
        vocabulary = vocabulary_of(config, size=VOCAB, mask_id=MASK_ID)
        backends = dict.fromkeys(block_sizes(config), named("dense"))
        model = ParallelModel(config, vocabulary, topology, backends=backends, dtype=torch.float32)
        engine = ZeroEngine(model, config, num_micro_batches=1, dtype=torch.float32)
        size = config.train.micro_batch_size
        clean = clean_batch(torch.arange(size) + size * topology.dp_rank, documents=False)
        batch = make_batch(config, clean, model.layout)
        applied = [engine.train_step([batch], loss_scale=1e-3, lr=1e-3).applied]
        assert engine.ema is not None
        before = [t.clone() for t in (*engine.owned(), *engine.ema.shards)]
        applied.append(engine.train_step([batch], loss_scale=float("inf"), lr=1e-3).applied)
        after = [*engine.owned(), *engine.ema.shards]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        # of the padding too nothing is left that the next update could take in
        applied.append(engine.train_step([batch], loss_scale=1e-3, lr=1e-3).applied)
        is_finite = all(bool(owned.isfinite().all()) for owned in engine.owned())
        return applied, same and is_finite, engine.ema.num_updates, engine.skipped_steps

    for result in run_ranks(on_rank, config.parallel):
        assert result == ([True, False, True], True, 2, 1)


def _answer(veto: bool, logs: list[LossSums]) -> bool:
    return veto


@pytest.mark.parametrize(
    ("dtype", "parallel"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"offload_optimizer": True})],
    ids=str,
)
def test_a_vetoed_batch_leaves_no_gradient_behind(dtype: torch.dtype, parallel: dict[str, Any]) -> None:
    config = job_config(parallel=parallel, train={"micro_batch_size": 8})

    def weights(topology: Topology, vetoed: list[bool]) -> tuple[list[bool], list[torch.Tensor]]:
        vocabulary = vocabulary_of(config, size=VOCAB, mask_id=MASK_ID)
        backends = dict.fromkeys(block_sizes(config), named("dense"))
        model = ParallelModel(config, vocabulary, topology, backends=backends, dtype=dtype)
        engine = ZeroEngine(model, config, num_micro_batches=1, dtype=dtype)
        applied = []
        for number, veto in enumerate(vetoed, start=2 - len(vetoed)):
            batch = make_batch(config, clean_batch(8 * number + torch.arange(8), documents=False), model.layout)
            asked = functools.partial(_answer, veto)
            applied.append(engine.train_step([batch], loss_scale=1 / 256, lr=1e-3, veto=asked).applied)
        return applied, [t.clone() for t in engine.owned()]

    def both(topology: Topology) -> Any:
        return weights(topology, [True, False]), weights(topology, [False])

    (skipping, alone) = run_ranks(both, config.parallel)[0]
    assert (skipping[0], alone[0]) == ([False, True], [True])
    assert all(torch.equal(a, b) for a, b in zip(skipping[1], alone[1], strict=True))
