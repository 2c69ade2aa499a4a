"""The plan is arithmetic: budgets, phases and batch sizes follow from the step, and are the same wherever a run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.config.load import load_config
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.diffusion.curriculum import LrSegment, Phase
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.errors import ConfigError, GridError
from bd3_megatron.train.plan import RunPlan
from tests.unit.cost.cases import case

LENGTH = 32
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def config_of(train: dict[str, Any], **sections: dict[str, Any]) -> Config:
    return case(train={"global_batch_size": 16, "steps": None, **train}, **sections)


WARMING = {"warmup_batch_size": 4, "batch_warmup_steps": 6}


def test_tokens_are_the_least_steps_that_see_them() -> None:
    for tokens in (1, 16 * LENGTH, 16 * LENGTH + 1, 10_000):
        steps = RunPlan(config_of({"tokens": tokens})).total_steps
        assert (steps - 1) * 16 * LENGTH < tokens <= steps * 16 * LENGTH


@pytest.mark.parametrize("tokens", [1, 128, 129, 1000, 5000])
def test_tokens_are_counted_through_the_batch_warmup(tokens: int) -> None:
    plan = RunPlan(config_of({"tokens": tokens, **WARMING}))
    steps = plan.total_steps
    assert plan.samples_before(steps) * LENGTH >= tokens > plan.samples_before(steps - 1) * LENGTH


def test_the_batch_grows_linearly_in_multiples_of_its_first_size() -> None:
    plan = RunPlan(config_of({"steps": 20, **WARMING}))
    sizes = [plan.batch_size(step) for step in range(20)]
    assert sizes[:8] == [4, 4, 8, 8, 12, 12, 16, 16] and set(sizes[6:]) == {16}
    assert sizes == sorted(sizes)
    for step, size in enumerate(sizes[:6]):
        assert size <= 4 + 12 * step / 6 < size + 4


def test_the_batch_does_not_depend_on_the_grid() -> None:
    grids: list[dict[str, Any]] = [{"dp": 4}, {"dp": 2, "tp": 2}, {"pp": 2, "vpp": 2}]
    plans = [RunPlan(config_of({"steps": 20, **WARMING}, parallel=grid)) for grid in grids]
    sizes = [[plan.batch_size(step) for step in range(20)] for plan in plans]
    assert sizes[0] == sizes[1] == sizes[2]


@pytest.mark.parametrize(
    ("train", "parallel", "sentence"),
    [
        (
            {"warmup_batch_size": 6},
            {"dp": 4},
            r"^warmup_batch_size=6 is not a multiple of dp x micro_batch_size=4; use 4",
        ),
        (
            {"warmup_batch_size": 2, "micro_batch_size": 1},
            {"pp": 4, "vpp": 2},
            r"^warmup_batch_size=2 is not a multiple of dp x micro_batch_size x pp \(interleaved schedule\)=4; use 4\.$",
        ),
        (
            {"warmup_batch_size": 32},
            {},
            r"^warmup_batch_size=32 is outside \[1, 16\], the global batch size; use one inside",
        ),
    ],
)
def test_a_first_batch_that_the_grid_cannot_cut_is_refused(
    train: dict[str, Any], parallel: dict[str, Any], sentence: str
) -> None:
    model = {"num_layers": 8, "num_heads": 4, "num_kv_heads": 4}
    config = config_of({"steps": 20, "batch_warmup_steps": 6, **train}, parallel=parallel, model=model)
    with pytest.raises((ConfigError, GridError), match=sentence):
        validate(config)


@pytest.mark.parametrize("train", [{"steps": 40}, {"steps": 40, **WARMING}, {"tokens": 9000, **WARMING}], ids=str)
def test_a_resumed_plan_is_the_same_plan(train: dict[str, Any]) -> None:
    phases = [{"block_size": 1, "tokens": 700}, {"block_size": 4, "steps": 3}, {"block_size": 32}]
    config = config_of(train, diffusion={"phases": phases})
    whole = RunPlan(config)
    for origin in (0, 1, 3, 5, 6, 9):
        resumed = RunPlan(config, origin, whole.samples_before(origin))
        assert resumed.total_steps == whole.total_steps
        for step in range(origin, whole.total_steps):
            assert resumed.samples_before(step) == whole.samples_before(step) == sum(map(whole.batch_size, range(step)))
            assert (resumed.phase_at(step), resumed.lr(step)) == (whole.phase_at(step), whole.lr(step))


def test_a_changed_batch_size_neither_repeats_nor_skips_a_sample() -> None:
    plan = RunPlan(config_of({"steps": 40, "global_batch_size": 24}), 10, 160)
    assert [plan.samples_before(step) for step in (10, 11, 12)] == [160, 184, 208]
    by_tokens = RunPlan(config_of({"tokens": 400 * LENGTH, "global_batch_size": 24}), 10, 160)
    assert by_tokens.total_steps == 20 and by_tokens.samples_before(20) == 400
    assert RunPlan(config_of({"tokens": 100 * LENGTH}), 10, 160).total_steps == 10


def test_phases_in_tokens_are_counted_with_the_batch_that_runs() -> None:
    phases = [{"block_size": 8, "tokens": 24 * LENGTH}, {"block_size": 4, "tokens": 16 * LENGTH}, {"block_size": 32}]
    plan = RunPlan(config_of({"steps": 20, **WARMING}, diffusion={"phases": phases}))
    # batches of 4, 4, 8, 8: the first phase is four steps; then 12 + 12
    assert [plan.phase_at(step).phase.block_size for step in range(8)] == [8, 8, 8, 8, 4, 4, 32, 32]


def test_without_phases_the_run_is_one_phase() -> None:
    plain = RunPlan(config_of({"steps": 5}, diffusion={"block_size": 8})).phase_at(3).phase
    assert (plain.block_size, plain.interval) == (8, Interval())
    full = RunPlan(config_of({"steps": 5}, diffusion={"block_size": 1})).phase_at(0).phase
    assert full.interval == Interval(1.0, 1.0)
    clipped = RunPlan(config_of({"steps": 5}, diffusion={"block_size": 4, "interval": [0.45, 0.95]})).phase_at(0).phase
    assert clipped.interval == Interval(0.45, 0.95)
    assert RunPlan(config_of({"steps": 5}, diffusion={"objective": "ar"})).phase_at(0).phase.block_size == 1


def test_a_search_chooses_only_where_the_phase_names_no_interval() -> None:
    phases = [
        {"block_size": 32, "steps": 2, "interval": [1e-3, 1.0]},
        {"block_size": 8, "steps": 2},
        {"block_size": 32},
    ]
    plan = RunPlan(config_of({"steps": 6}, diffusion={"phases": phases, "interval": [0.45, 0.95]}))
    assert [plan.is_searched(step) for step in (0, 2, 4)] == [False, True, True]
    assert [plan.interval(step, {}) for step in (0, 2)] == [Interval(), Interval(0.45, 0.95)]
    found = {32: (0.1, 0.9), 8: (0.3, 0.8)}
    assert [plan.interval(step, found) for step in (0, 2, 4)] == [Interval(), Interval(0.3, 0.8), Interval(0.1, 0.9)]
    alone = RunPlan(config_of({"steps": 6}, diffusion={"block_size": 8, "interval": [0.45, 0.95]}))
    assert alone.is_searched(0) and alone.interval(0, found) == Interval(0.3, 0.8)


def test_the_rate_is_the_runs_times_the_phases() -> None:
    phases = [{"block_size": 8, "steps": 4, "lr_start": 0.5, "lr_end": 0.5}, {"block_size": 4, "lr_warmup_steps": 2}]
    optim = {"lr": 1.0, "warmup_steps": 2}
    plan = RunPlan(config_of({"steps": 8}, diffusion={"phases": phases}, optim=optim))
    assert [plan.lr(step) for step in range(8)] == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0])


def test_a_curriculum_that_ends_before_the_run_is_refused() -> None:
    plan = RunPlan(config_of({"steps": 9}, diffusion={"phases": [{"block_size": 4, "steps": 8}]}))
    with pytest.raises(ConfigError, match=r"^The phases end at step 8 but the run has 9 steps; shorten the run or"):
        plan.phase_at(0)


def test_the_shipped_curricula_are_the_recipes() -> None:
    # the paper: masked diffusion over the whole length, then blocks under a clipped interval, each with its own warm-up
    paper = RunPlan(load_config(CONFIGS / "curriculum_paper_two_phase.yaml"))
    warm = LrSegment(warmup_steps=50)
    assert [(p.block_size, p.interval, p.lr) for p in paper.curriculum.phases] == [
        (128, Interval(), warm),
        (4, Interval(0.45, 0.95), warm),
    ]
    assert paper.curriculum.seams() == (0, 1700) and paper.phase_at(1999).num_steps == 300
    # LLaDA 2.0: blocks grow to the whole length, stay, and end at the size that generation uses, at a rate of 0
    wsd = RunPlan(load_config(CONFIGS / "curriculum_llada2_wsd.yaml"))
    assert wsd.curriculum.phases == (
        Phase(block_size=1, steps=200, interval=Interval(1.0, 1.0)),
        Phase(block_size=4, steps=200),
        Phase(block_size=32, steps=200),
        Phase(block_size=128, steps=1000),
        Phase(block_size=32, steps=400, lr=LrSegment(end=0.0)),
    )
    assert [wsd.is_searched(seam) for seam in wsd.curriculum.seams()] == [False, True, True, False, True]


def test_the_papers_own_phases_are_not_searched_away() -> None:
    for name in ("owt_110m_b8", "lm1b_110m_b8"):
        plan = RunPlan(load_config(CONFIGS / f"{name}.yaml"))
        assert (plan.is_searched(0), plan.is_searched(850_000)) == (False, True)
        assert plan.interval(850_000, {}) == Interval(0.45, 0.95)
