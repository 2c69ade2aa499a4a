"""Mixtures of experts on every grid equal the plain model: loss, every gradient, norms, parameters and averages after clipped
AdamW steps, through the trainer's own step. A covering subset here; `tests/run.sh --matrix` walks the rest."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from bd3_megatron.config.schema import Config
from tests import tolerances
from tests.ranks.harness import run_ranks
from tests.ranks.parity import Outcome, job_config, join_ranks, plain_job, rank_job
from tests.ranks.test_parity import compare

SP = {"tp": 2, "sequence_parallel": True}
SOFTMAX = {"number": 4, "top_k": 2, "width": 24, "shared_width": 16, "leading_dense_layers": 1}
SIGMOID = {
    **SOFTMAX,
    "number": 8,
    "score": "sigmoid",
    "bias": True,
    "bias_rate": 0.01,
    "scaling_factor": 2.5,
    "groups": 4,
    "group_top_k": 2,
}
KINDS: dict[str, dict[str, Any]] = {"softmax": SOFTMAX, "sigmoid": SIGMOID}

COVERING: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {}),
    ("sigmoid", {"ep": 2, "dp": 2}),
    ("softmax", {"ep": 2, "dp": 4}),
    ("sigmoid", {"ep": 4, **SP, "dp": 2}),
    ("softmax", {"ep": 1, **SP}),
    ("softmax", {"ep": 2, **SP, "cp": 2, "pp": 2}),
]


SEEDS = {"softmax": 1, "sigmoid": 2}
"""Initial weights with which no row's choice is as close to a tie as rounding: `tolerances.SMALLEST_CHOICE_GAP`."""


def experts_config(kind: str, parallel: dict[str, Any], **sections: Any) -> Config:
    sections["run"] = {"seed": SEEDS[kind]}
    model = {"experts": KINDS[kind], "rotary_fraction": 0.5, **sections.pop("model", {})}
    # untied and shallow: q and k norms turn the rounding of a router's gradient into steps of Adam
    return job_config("modern", layers=3, parallel=parallel, model=model, **sections)


@functools.cache
def plain(kind: str) -> Outcome:
    return plain_job(experts_config(kind, {}))


def check(config: Config, expected: Outcome, *, documents: bool = False) -> None:
    """Everything that dense models are compared by; counts equal, and so biases."""
    found = join_ranks(config, run_ranks(rank_job(config, documents=documents), config.parallel))
    print(f"smallest gap between chosen and left-out experts: {expected.smallest_gap:.1e}")
    # at a tie two grids may choose otherwise and both be right
    assert expected.smallest_gap >= tolerances.SMALLEST_CHOICE_GAP
    compare(found, expected)
    assert found.loads == expected.loads
    assert set(found.biases) == set(expected.biases)
    assert all(torch.equal(found.biases[name], bias) for name, bias in expected.biases.items())


@pytest.mark.parametrize(("kind", "parallel"), COVERING, ids=str)
def test_experts_on_every_grid_equal_the_plain_model(kind: str, parallel: dict[str, Any]) -> None:
    config = experts_config(kind, parallel)
    check(config, plain(kind))


SWITCHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"ep": 4, **SP, "dp": 2}, {"train": {"recompute": "full"}}),
    ({"ep": 2, "dp": 2}, {"train": {"recompute": "selective", "micro_batch_size": 2}}),
    ({"ep": 2, **SP}, {"train": {"skip_dead_rows": False}}),
    ({"ep": 2, "dp": 2, "pp": 2}, {"train": {"skip_dead_rows": False, "recompute": "full"}}),
    ({"ep": 2, "cp": 2}, {"train": {"recompute": "full", "recompute_layers": 1}}),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("parallel", "sections"), SWITCHED, ids=str)
def test_recomputation_and_skipping_change_neither_weights_nor_counts(
    parallel: dict[str, Any], sections: dict[str, Any]
) -> None:
    check(experts_config("sigmoid", parallel, **sections), plain("sigmoid"))


@pytest.mark.matrix
def test_documents_with_experts_equal_the_plain_model() -> None:
    config = experts_config("softmax", {"ep": 4, **SP, "cp": 2})
    expected = plain_job(experts_config("softmax", {}), documents=True)
    check(config, expected, documents=True)
