"""The vocabulary-parallel head equals plain cross entropy over the whole table, also where a rank has only padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bd3_megatron.config.schema import ParallelConfig
from bd3_megatron.model.head import VocabShard, weighted_nll
from bd3_megatron.parallel.topology import Topology
from tests import tolerances
from tests.ranks.harness import run_ranks
from tests.unit.model.heads import head_problem


@pytest.mark.parametrize(("tp", "vocab_size", "confidence"), [(2, 21, 0.0), (4, 17, 2.0)])
def test_shards_of_the_table_give_one_loss(tp: int, vocab_size: int, confidence: float) -> None:
    # with 17 ids of 24 rows the last of four ranks holds nothing but padding
    problem = head_problem(vocab_size=vocab_size, never=vocab_size - 1)
    problem.target_R.remainder_(vocab_size - 1)
    # some rows are right, or the term would have nothing to take
    logits = problem.hidden_RD @ problem.weight_VD.t() + problem.bias_V
    problem.target_R[:6] = logits[:6, : vocab_size - 1].argmax(1)

    def on_rank(topology: Topology) -> Any:
        size = 24 // tp
        rows = slice(topology.tp_rank * size, (topology.tp_rank + 1) * size)
        inputs = [problem.hidden_RD, problem.weight_VD[rows], problem.bias_V[rows]]
        inputs = [t.detach().requires_grad_() for t in inputs]
        shard = VocabShard(rows.start, vocab_size, vocab_size - 1, topology.groups.tp)
        total, nll_R, entropy_R = weighted_nll(
            *inputs, problem.target_R, problem.row_weight_R, shard=shard, confidence=confidence
        )
        total.backward()
        return nll_R, entropy_R, [t.grad for t in inputs]

    nll_R, sharp_R, grads = problem.sharpened(confidence)
    found = run_ranks(on_rank, ParallelConfig(tp=tp))
    for rank_nll_R, entropy_R, _ in found:
        assert torch.allclose(rank_nll_R, nll_R, rtol=0, atol=tolerances.EXACT_FP64)
        assert (entropy_R is None) == (confidence == 0.0)
        assert entropy_R is None or torch.allclose(entropy_R, sharp_R, rtol=0, atol=tolerances.EXACT_FP64)
    # the hidden states' gradient is partial over ranks, the table's is cut
    together = [
        sum(g[0] for _, _, g in found),
        torch.cat([g[1] for _, _, g in found]),
        torch.cat([g[2] for _, _, g in found]),
    ]
    for part, expected in zip(together, grads, strict=True):
        assert torch.allclose(part, expected, rtol=0, atol=tolerances.EXACT_FP64 * 10)
