"""The same checkpoint has one perplexity: on any training grid, under its averaged weights, and in one process alone."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

from bd3_megatron.attention.select import named
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config, ParallelConfig
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.evaluate.in_loop import evaluate_on_grid, settings_of
from bd3_megatron.evaluate.offline import Work, evaluate_plain
from bd3_megatron.evaluate.perplexity import Estimate
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.dataset import evaluation_convention
from tests import tolerances
from tests.ranks.harness import run_ranks
from tests.ranks.parity import (
    BATCH,
    MASK_ID,
    VOCAB,
    RandomRows,
    clean_batch,
    job_config,
    plain_model,
    plain_names,
    updates,
)

HELD_OUT = 10_000


class Text:
    """Held-out rows that training never sees; some are padded when asked."""

    num_rows = 7

    def __init__(self, *, padded: bool = False) -> None:
        self.padded = padded

    def batch_for(self, index_B: Tensor) -> CleanBatch:
        clean = clean_batch(index_B + HELD_OUT, documents=self.padded)
        length = clean.tokens_BL.shape[1]
        padding_BL = torch.arange(length) >= length - 3 * (index_B[:, None] % 4) if self.padded else None
        return CleanBatch(
            tokens_BL=clean.tokens_BL,
            index_B=index_B,
            document_id_BL=clean.document_id_BL,
            is_padding_BL=padding_BL,
        )


def convention_of(config: Config) -> EvaluationConvention:
    """As a run of this configuration has it."""
    return evaluation_convention(config, {})


def job(config: Config, text: Text) -> Any:
    """Train a step, evaluate, and hand back the averaged parameters with their places."""

    def run(topology: Topology) -> dict[str, Any]:
        model = ParallelModel(
            config,
            vocabulary_of(config, size=VOCAB, mask_id=MASK_ID),
            topology,
            backends=dict.fromkeys(block_sizes(config), named("dense")),
            dtype=torch.float32,
        )
        micro = BATCH // (topology.dp * config.train.micro_batch_size)
        engine = ZeroEngine(model, config, num_micro_batches=micro, dtype=torch.float32)
        for _ in updates(config, topology, engine, RandomRows(), 1):
            pass
        result = evaluate_on_grid(
            engine, topology, text, config, convention_of(config), block_size=config.diffusion.block_size
        )
        gathered = deepspeed.zero.GatheredParameters(list(model.root.parameters()), enabled=engine.stage == 3)
        with engine.averaged_weights(), gathered:
            held = {name: p.detach().clone() for name, p in model.root.named_parameters()}
        return {"estimate": result, "held": held, "tp_rank": topology.tp_rank}

    return run


def whole_model(config: Config, results: list[dict[str, Any]]) -> PlainBD3:
    """The plain model with the averaged weights that the ranks hold."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for result in results:
        for name, tensor in result["held"].items():
            pieces.setdefault(name, {})[result["tp_rank"]] = tensor
    state = plain_names(config, pieces)
    if config.model.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    plain = plain_model(config)
    plain.load_state_dict(state)
    return plain.eval()


def both(config: Config, *, padded: bool = False) -> tuple[list[Estimate], Estimate]:
    """(every rank's estimate, the plain model's) of one checkpoint."""
    text = Text(padded=padded)
    results = run_ranks(job(config, text), config.parallel)
    plain = whole_model(config, results)
    offline = evaluate_plain(
        plain, text, settings_of(config, convention_of(config)), Work(batch_size=5), mask_id=MASK_ID
    )
    return [result["estimate"] for result in results], offline


def check(config: Config, *, padded: bool = False) -> Estimate:
    """Both ways agree, on every rank; returns the plain one."""
    on_grid, offline = both(config, padded=padded)
    assert all(one == on_grid[0] for one in on_grid)
    found = on_grid[0]
    assert found.num_tokens == offline.num_tokens
    assert found.nll_nats_per_token == pytest.approx(offline.nll_nats_per_token, abs=tolerances.EVALUATION)
    assert found.stderr_noise == pytest.approx(offline.stderr_noise, abs=tolerances.EVALUATION)
    assert found.stderr_text == pytest.approx(offline.stderr_text, abs=tolerances.EVALUATION)
    return offline


def test_a_checkpoint_has_one_perplexity_on_tp_x_pp_and_offline() -> None:
    config = job_config(tied=True, layers=2, parallel={"tp": 2, "pp": 2}, evaluate={"draws": 2, "num_sequences": 5})
    assert 3.0 < check(config).nll_nats_per_token < 6.0


def test_interleaved_stages_padding_and_documents_change_nothing() -> None:
    grid = {"pp": 2, "vpp": 2, "dp": 2}
    check(job_config(parallel=grid, evaluate={"draws": 3}), padded=True)


def test_context_parallel_ranks_and_the_official_convention_agree() -> None:
    grid = {"cp": 2, "tp": 2, "sequence_parallel": True}
    result = check(job_config("paper", layers=2, parallel=grid, evaluate={"official": True, "num_sequences": 7}))
    assert result.num_tokens == 7 * 31 and result.draws == 1 and result.stderr_noise > 0


def test_sharded_parameters_agree() -> None:
    check(job_config(layers=2, parallel={"dp": 2, "zero_stage": 3}, evaluate={"num_sequences": 3}))


@pytest.mark.parametrize(("objective", "grid"), [("ar", {"pp": 2}), ("block", {"tp": 2})])
def test_exact_objectives_agree(objective: str, grid: dict[str, int]) -> None:
    diffusion = {"objective": objective, "block_size": 1, "interval": [1.0, 1.0]}
    result = check(job_config(layers=2, parallel=grid, diffusion=diffusion))
    assert result.stderr_noise == 0.0 and result.is_exact


def test_processes_that_split_the_sequences_of_a_folder_agree_with_one() -> None:
    config = job_config(layers=2, evaluate={"draws": 2})
    plain, text = plain_model(config).eval(), Text(padded=True)

    def alone(topology: Topology) -> Estimate:
        work = Work(batch_size=2, rank=topology.rank, ranks=topology.world_size)
        return evaluate_plain(plain, text, settings_of(config, convention_of(config)), work, mask_id=MASK_ID)

    found = run_ranks(alone, ParallelConfig(dp=3))
    expected = evaluate_plain(plain, text, settings_of(config, convention_of(config)), Work(), mask_id=MASK_ID)
    assert found[0] == found[1] == found[2] and found[0].num_tokens == expected.num_tokens
    assert found[0].nll_nats_per_token == pytest.approx(expected.nll_nats_per_token, abs=tolerances.EVALUATION)
