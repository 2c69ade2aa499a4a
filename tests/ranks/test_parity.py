"""If a result depends on the grid, it is a bug: loss, every gradient, and parameters after five steps equal the plain
model's on every grid. A covering subset here; `tests/run.sh --matrix` walks all legal grids up to eight ranks."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from bd3_megatron.config.schema import Config, DiffusionConfig
from tests import tolerances
from tests.ranks.harness import run_ranks
from tests.ranks.parity import Outcome, job_config, join_ranks, plain_job, rank_job

COVERING: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("modern", {"tied": True}, {}),
    ("paper", {}, {}),
    ("modern", {"tied": True}, {"dp": 2}),
    ("paper", {}, {"tp": 2}),
    ("modern", {"tied": True, "layers": 2}, {"tp": 2, "dp": 2}),
    ("modern", {"tied": True}, {"tp": 2, "sequence_parallel": True}),
    ("modern", {"tied": True}, {"pp": 2}),
    ("paper", {}, {"pp": 2, "dp": 2}),
    ("modern", {}, {"pp": 2, "vpp": 2}),
    ("modern", {"tied": True}, {"pp": 4}),
    ("modern", {"tied": True}, {"cp": 2}),
    ("paper", {"layers": 2}, {"cp": 4}),
    ("modern", {"tied": True}, {"tp": 2, "sequence_parallel": True, "pp": 2, "cp": 2}),
    ("paper", {}, {"tp": 2, "pp": 2, "vpp": 2, "sequence_parallel": True}),
    ("modern", {"tied": True}, {"dp": 2, "zero_stage": 2}),
    ("modern", {"tied": True, "layers": 2}, {"tp": 2, "dp": 2, "zero_stage": 3, "sequence_parallel": True}),
    ("paper", {"layers": 2}, {"cp": 2, "dp": 2, "zero_stage": 3}),
]


@functools.cache
def plain(style: str, tied: bool, documents: bool, layers: int, kv_heads: int, diffusion: DiffusionConfig) -> Outcome:
    config = job_config(style, tied=tied, layers=layers, kv_heads=kv_heads)
    return plain_job(replace(config, diffusion=diffusion), documents=documents)


def check(config: Config, *, documents: bool = False) -> None:
    """Run the grid and compare with the plain model."""
    model, diffusion = config.model, config.diffusion
    expected = plain(
        model.style,
        model.tie_embeddings,
        documents,
        model.num_layers,
        model.kv_heads,
        diffusion,
    )
    found = join_ranks(config, run_ranks(rank_job(config, documents=documents), config.parallel))
    compare(found, expected)


def compare(found: Outcome, expected: Outcome) -> None:
    """Every number of a job on a grid against the plain model's."""
    assert found.losses[0] == pytest.approx(expected.losses[0], rel=tolerances.GRID_LOSS)
    assert found.losses == pytest.approx(expected.losses, rel=tolerances.GRID_LOSSES_LATER)
    assert found.norms[0] == pytest.approx(expected.norms[0], rel=tolerances.GRID_NORM)
    assert found.norms == pytest.approx(expected.norms, rel=tolerances.GRID_NORMS_LATER)
    assert found.rates == pytest.approx(expected.rates, rel=tolerances.EXACT_FP64)
    for name, grad in found.first_grads.items():
        bound = tolerances.GRID_GRADIENT * expected.first_grads[name].abs().max()
        assert (grad - expected.first_grads[name]).abs().max() <= bound, name
    assert set(found.parameters) <= set(expected.parameters)
    assert set(expected.parameters) - set(found.parameters) <= {"lm_head.weight"}
    for name, parameter in found.parameters.items():
        worst = (parameter - expected.parameters[name]).abs().max()
        assert worst <= tolerances.GRID_PARAMETERS, f"{name}: {worst:.2e}"
        apart = (found.averages[name] - expected.averages[name]).abs().max()
        assert apart <= tolerances.GRID_PARAMETERS, f"average of {name}: {apart:.2e}"


@pytest.mark.parametrize(("style", "shape", "parallel"), COVERING, ids=str)
def test_every_grid_equals_the_plain_model(style: str, shape: dict[str, Any], parallel: dict[str, Any]) -> None:
    check(job_config(style, **shape, parallel=parallel))


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "sequence_parallel": True, "cp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_packed_documents_equal_the_plain_model(parallel: dict[str, Any]) -> None:
    check(job_config("modern", tied=True, parallel=parallel), documents=True)


@pytest.mark.parametrize("parallel", [{"tp": 2, "pp": 2}, {"cp": 2, "dp": 2}], ids=str)
def test_the_ar_baseline_equals_the_plain_model(parallel: dict[str, Any]) -> None:
    check(job_config("modern", tied=True, parallel=parallel, diffusion={"objective": "ar", "block_size": 1}))


@pytest.mark.parametrize(("block", "parallel"), [(32, {"tp": 2}), (1, {"pp": 2}), (8, {"cp": 2})], ids=str)
def test_the_ends_of_the_block_size_equal_the_plain_model(block: int, parallel: dict[str, Any]) -> None:
    check(job_config("paper", parallel=parallel, diffusion={"block_size": block}))


@pytest.mark.parametrize("parallel", [{"tp": 2, "pp": 2}, {"cp": 2}], ids=str)
def test_views_that_share_a_clean_pass_equal_separate_passes(parallel: dict[str, Any]) -> None:
    check(job_config("modern", tied=True, parallel=parallel, diffusion={"views": 3}), documents=True)


def test_the_structured_backend_changes_nothing() -> None:
    check(job_config("modern", tied=True, parallel={"tp": 2, "cp": 2}, attention={"backend": "structured"}))


RECOMPUTED: list[tuple[str, dict[str, Any], float, dict[str, Any]]] = [
    ("modern", {"tp": 2, "sequence_parallel": True}, 0.1, {"recompute": "selective"}),
    ("modern", {"tp": 2, "sequence_parallel": True}, 0.1, {"recompute": "full"}),
    ("modern", {"pp": 2}, 0.1, {"recompute": "full", "recompute_layers": 1}),
    ("paper", {"pp": 2, "vpp": 2}, 0.1, {"recompute": "selective", "recompute_layers": 1}),
    ("modern", {"dp": 2, "zero_stage": 3}, 0.1, {"recompute": "full", "recompute_layers": 2}),
]
ALSO_RECOMPUTED: list[tuple[str, dict[str, Any], float, dict[str, Any]]] = [
    ("paper", {}, 0.1, {"recompute": "selective", "recompute_layers": 3}),
    ("modern", {"pp": 2}, 0.0, {"recompute": "selective", "recompute_layers": 1}),
    ("modern", {"pp": 2, "vpp": 2}, 0.0, {"recompute": "full", "recompute_layers": 1}),
    ("paper", {"dp": 2, "zero_stage": 3}, 0.0, {"recompute": "selective", "recompute_layers": 2}),
]


@pytest.mark.parametrize(
    ("style", "parallel", "dropout", "recompute"),
    RECOMPUTED + [pytest.param(*case, marks=pytest.mark.matrix) for case in ALSO_RECOMPUTED],
    ids=str,
)
def test_recomputation_is_bit_equal(
    style: str, parallel: dict[str, Any], dropout: float, recompute: dict[str, Any]
) -> None:
    plainly = job_config(style, tied=style == "modern", parallel=parallel, model={"dropout": dropout})
    again = job_config(style, tied=style == "modern", parallel=parallel, model={"dropout": dropout}, train=recompute)
    first = join_ranks(plainly, run_ranks(rank_job(plainly, steps=2), plainly.parallel))
    second = join_ranks(again, run_ranks(rank_job(again, steps=2), again.parallel))
    assert first.losses == second.losses
    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


def test_micro_batch_splits_give_one_loss() -> None:
    one = job_config("modern", parallel={"dp": 2})
    four = job_config("modern", parallel={"dp": 2}, train={"micro_batch_size": 4})
    losses = [join_ranks(c, run_ranks(rank_job(c, steps=1), c.parallel)).losses[0] for c in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerances.SPLIT_LOSS)
