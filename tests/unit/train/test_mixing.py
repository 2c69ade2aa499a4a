"""Mixtures over a whole run: stages begin where the plan says, and what was consumed is counted as it was consumed."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from bd3_megatron.config.schema import Config
from bd3_megatron.data.mixture import Mixture, Stage
from bd3_megatron.errors import ConfigError
from bd3_megatron.train.mixing import mixture_stages, stages_state
from bd3_megatron.train.plan import RunPlan
from tests.json_mutations import num_refused
from tests.unit.cost.cases import case

WEB, BOOKS = {"web": 3.0, "books": 1.0}, {"books": 1.0, "code": 1.0}
IN_STEPS = [{"mixture": WEB, "steps": 4}, {"mixture": BOOKS, "steps": 3}, {"mixture": WEB}]


def run(batch: int = 8, **data: Any) -> Config:
    return case(data=data, train={"steps": 40, "global_batch_size": batch})


def begun(config: Config) -> list[Stage]:
    return mixture_stages(config.data, RunPlan(config))


def resumed(config: Config, step: int, consumed: int, before: list[Stage]) -> list[Stage]:
    saved = json.loads(json.dumps(stages_state(before)))
    return mixture_stages(config.data, RunPlan(config, step, consumed), saved)


def test_one_folder_is_a_mixture_of_one() -> None:
    assert begun(run(path="data")) == [Stage(start=0, weights=(1.0,))]
    assert begun(run(mixture={"a": 1.0, "b": 2.0})) == [Stage(start=0, weights=(1.0, 2.0))]


def test_stages_in_steps_begin_with_the_samples_of_that_step() -> None:
    assert begun(run(stages=IN_STEPS)) == [
        Stage(start=0, weights=(3.0, 1.0, 0.0)),
        Stage(start=32, weights=(0.0, 1.0, 1.0)),
        Stage(start=56, weights=(3.0, 1.0, 0.0)),
    ]


def test_stages_in_tokens_begin_with_the_first_whole_sample() -> None:
    config = run(stages=[{"mixture": WEB, "tokens": 1000}, {"mixture": BOOKS}])
    assert [s.start for s in begun(config)] == [0, -(-1000 // config.data.seq_len)]


def test_a_stage_that_changes_no_weight_begins_nothing() -> None:
    assert len(begun(run(stages=[{"mixture": WEB, "steps": 4}, {"mixture": WEB}]))) == 1


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7, 20])
@pytest.mark.parametrize("kind", ["steps", "tokens"])
def test_a_resumed_run_has_the_stages_of_the_uninterrupted_one(step: int, kind: str) -> None:
    stages = IN_STEPS if kind == "steps" else [{"mixture": WEB, "tokens": 1000}, {"mixture": BOOKS}]
    config = run(stages=stages)
    assert resumed(config, step, 8 * step, begun(config)) == begun(config)
    # a checkpoint made before stages were saved
    if step < 4:
        assert mixture_stages(config.data, RunPlan(config, step, 8 * step)) == begun(config)


def test_a_changed_batch_size_or_mixture_repeats_and_skips_no_row_of_any_source() -> None:
    """Runs with random changes at resume: each source's counts are 0, 1, 2, ... in the order of consumption."""
    chosen = random.Random(7)
    for _ in range(20):
        stages: list[Stage] | None = None
        seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
        step = consumed = 0
        for _ in range(4):
            first = {"web": chosen.choice([1.0, 2.5]), "books": chosen.choice([0.0, 1.0])}
            rest = [
                {"mixture": first, "steps": chosen.randint(1, 6)},
                {"mixture": BOOKS, "steps": chosen.randint(1, 6)},
            ]
            config = run(batch=chosen.choice([4, 8, 12]), stages=[*rest, {"mixture": WEB}])
            stages = begun(config) if stages is None else resumed(config, step, consumed, stages)
            plan, steps = RunPlan(config, step, consumed), chosen.randint(1, 6)
            after = plan.samples_before(step + steps)
            for source, count in zip(*Mixture(stages).locate(np.arange(consumed, after)), strict=True):
                seen[int(source)].append(int(count))
            step, consumed = step + steps, after
        for counts in seen.values():
            assert counts == list(range(len(counts)))


def test_a_mixture_named_at_resume_holds_from_there_on() -> None:
    before = begun(run(path="data"))
    after = resumed(run(mixture={"data": 1.0, "more": 1.0}), 5, 40, before)
    assert after == [Stage(start=0, weights=(1.0, 0.0)), Stage(start=40, weights=(1.0, 1.0))]


def test_a_source_taken_away_is_refused() -> None:
    before = begun(run(mixture={"a": 1.0, "b": 2.0}))
    sentence = (
        r"^the run has mixed 2 sources and the configuration names 1; name them all in their order, with weight 0"
    )
    with pytest.raises(ConfigError, match=sentence):
        resumed(run(mixture={"a": 1.0}), 5, 40, before)


def test_a_changed_history_is_read_or_refused_in_one_sentence() -> None:
    config = run(stages=IN_STEPS)
    saved = json.loads(json.dumps(stages_state(begun(config))))

    def read(tree: dict[str, Any]) -> None:
        mixture_stages(config.data, RunPlan(config, 10, 80), tree)

    assert 20 < num_refused(saved, "mixing", 100, read) < 100
