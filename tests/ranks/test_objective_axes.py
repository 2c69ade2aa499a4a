"""Every axis of the objective, and combinations of them, train on a grid as the plain model does: loss and every gradient,
through the trainer's own step. Two of each grid's combinations by default; `tests/run.sh --matrix` walks forty drawn ones.
"""

from __future__ import annotations

import dataclasses
import random
import typing
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.config.axes import AxesConfig
from bd3_megatron.config.load import load_config
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import BD3Error
from bd3_megatron.parallel.topology import Topology
from tests import tolerances
from tests.ranks.harness import run_ranks
from tests.ranks.parity import Outcome, job_config, join_ranks, plain_job, rank_job

CONFIGS = Path(__file__).parents[2] / "configs" / "recipes"
GRIDS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp": {"dp": 2},
    "tp sp": {"tp": 2, "sequence_parallel": True},
    "pp": {"pp": 2},
    "cp": {"cp": 2},
}
Case = tuple[dict[str, Any], dict[str, Any], bool]
"""(axes, other keys of the diffusion section, packed documents)."""
COVERING: dict[str, list[Case]] = {
    "one": [
        ({"level_per": "group", "group_blocks": 3, "row_weight": "cart"}, {}, True),
        ({"denominator": "all"}, {"never_mask_first": True, "interval": [0.3, 0.8]}, False),
    ],
    "dp": [
        ({"denominator": "loss_rows", "row_weight": "flat"}, {}, False),
        ({"denominator": "answer_length", "level_per": "sample"}, {"never_mask_first": True}, True),
    ],
    "tp sp": [({"positions": "exact", "least_masked": 1, "position_half_life": 0.25, "confidence": 20.0}, {}, True)],
    "pp": [
        (
            {"pairing": "complementary", "positions": "exact", "denominator": "loss_rows", "confidence": 20.0},
            {"views": 2},
            False,
        )
    ],
    "cp": [({"pairing": "complementary", "row_weight": "cart"}, {"views": 2, "noise_schedule": "cosine"}, True)],
}


def config_of(axes: dict[str, Any], diffusion: dict[str, Any], grid: str) -> Config:
    return job_config(tied=True, layers=2, parallel=GRIDS[grid], diffusion={"block_size": 4, **diffusion, "axes": axes})


def check(grid: str, cases: list[Case]) -> None:
    """One fork of a grid's ranks trains a step of every case."""
    configs = [config_of(axes, diffusion, grid) for axes, diffusion, _ in cases]

    def all_cases(topology: Topology) -> list[Any]:
        return [
            rank_job(config, documents=documents, steps=1)(topology)
            for config, (_, _, documents) in zip(configs, cases, strict=True)
        ]

    by_rank = run_ranks(all_cases, configs[0].parallel, timeout=800)
    for number, (config, (_, _, documents)) in enumerate(zip(configs, cases, strict=True)):
        found = join_ranks(config, [results[number] for results in by_rank])
        compare_first_step(found, plain_job(config, documents=documents, steps=1), str(cases[number]))


def compare_first_step(found: Outcome, expected: Outcome, case: str) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerances.GRID_LOSS), case
    assert found.confidences == pytest.approx(expected.confidences, rel=tolerances.GRID_LOSS), case
    assert found.norms == pytest.approx(expected.norms, rel=tolerances.GRID_NORM), case
    assert found.first_grads
    for name, grad in found.first_grads.items():
        bound = tolerances.GRID_GRADIENT * expected.first_grads[name].abs().max()
        assert (grad - expected.first_grads[name]).abs().max() <= bound, f"{case}: {name}"


@pytest.mark.parametrize("grid", GRIDS)
def test_every_axis_trains_as_the_plain_model_does(grid: str) -> None:
    check(grid, COVERING[grid])


def values(name: str) -> tuple[Any, ...]:
    """Every value of an axis that is a choice, two of one that is a number."""
    hint = typing.get_type_hints(AxesConfig)[name]
    numbers: dict[str, tuple[Any, ...]] = {
        "group_blocks": (None, 3), "least_masked": (0, 1), "position_half_life": (None, 0.25), "confidence": (0.0, 20.0),
    }  # fmt: skip
    return numbers.get(name) or typing.get_args(hint)


def test_the_covering_cases_hold_every_value_of_every_axis() -> None:
    for field in dataclasses.fields(AxesConfig):
        seen = {axes.get(field.name, field.default) for cases in COVERING.values() for axes, _, _ in cases}
        assert seen == set(values(field.name)), field.name


def forty() -> list[tuple[str, Case]]:
    """Combinations that the configuration does not refuse, drawn with a fixed seed."""
    chosen, found = random.Random(20), []
    names = [field.name for field in dataclasses.fields(AxesConfig)]
    while len(found) < 40:
        grid = chosen.choice(list(GRIDS))
        axes = {name: chosen.choice(values(name)) for name in names}
        diffusion = {
            "block_size": chosen.choice([1, 4, 8, 16]),
            "views": chosen.choice([1, 2, 4]),
            "noise_schedule": chosen.choice(["loglinear", "cosine", "log"]),
            "interval": chosen.choice([None, [0.3, 0.8], [1.0, 1.0]]),
            "never_mask_first": chosen.random() < 0.3,
            "resample": chosen.random() < 0.2,
        }
        try:
            validate(config_of(axes, diffusion, grid))
        except BD3Error:
            continue
        found.append((grid, (axes, diffusion, chosen.random() < 0.5)))
    return found


@pytest.mark.parametrize("name", ["sdar_cpt", "efficient_dlm", "dfactory_flat", "llada2_cap", "sdar_sft"])
def test_a_shipped_recipe_trains_as_the_plain_model_does(name: str) -> None:
    """Its objective, at blocks of 4, on a small model; three steps."""
    recipe = load_config(CONFIGS / f"{name}.yaml")
    config = job_config(tied=True, layers=1, parallel={"dp": 2})
    config = dataclasses.replace(config, diffusion=dataclasses.replace(recipe.diffusion, block_size=4, phases=()))
    found = join_ranks(config, run_ranks(rank_job(config, documents=True, steps=3), config.parallel))
    expected = plain_job(config, documents=True, steps=3)
    compare_first_step(
        dataclasses.replace(found, losses=found.losses[:1], norms=found.norms[:1], confidences=[]),
        dataclasses.replace(expected, losses=expected.losses[:1], norms=expected.norms[:1], confidences=[]),
        name,
    )
    assert len(found.losses) == 3
    assert found.losses == pytest.approx(expected.losses, rel=tolerances.GRID_LOSSES_LATER)


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("grid", GRIDS)
def test_forty_drawn_combinations_train_as_the_plain_model_does(grid: str) -> None:
    check(grid, [case for drawn_grid, case in forty() if drawn_grid == grid])
