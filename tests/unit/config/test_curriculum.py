"""One owner of the phase at a step: plan, evaluation, export and validation agree on every curriculum and batch warm-up."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from bd3_megatron.checkpoint.layout import read_manifest
from bd3_megatron.config.curriculum import curriculum_of
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.convert.from_checkpoint import trained_block_size
from bd3_megatron.train.plan import RunPlan
from tests.unit.convert.models import run_config, whole_checkpoint
from tests.unit.cost.cases import case

LENGTH = 32
SIZES = (1, 2, 4, 8, 16, 32)


def drawn(draw: random.Random) -> Config:
    """A run with phases in steps, in tokens or in both, and mostly with a batch warm-up."""
    whole = draw.choice((4, 8, 16))
    train: dict[str, Any] = {
        "global_batch_size": whole,
        "steps": None,
        "tokens": draw.randint(60, 200) * LENGTH * whole,
    }
    if draw.random() < 0.8:
        first = draw.choice([size for size in (1, 2, 4) if size < whole])
        train |= {"warmup_batch_size": first, "batch_warmup_steps": draw.randint(1, 40)}
    phases: list[dict[str, Any]] = []
    for _ in range(draw.randint(1, 3)):
        length = (
            {"tokens": draw.randint(1, 10 * LENGTH * whole)} if draw.random() < 0.7 else {"steps": draw.randint(1, 9)}
        )
        phases.append({"block_size": draw.choice(SIZES), **length})
    return case(train=train, diffusion={"phases": [*phases, {"block_size": draw.choice(SIZES)}]})


def simulated(config: Config, plan: RunPlan) -> list[int]:
    """Block size of every update, by going through the run batch by batch and filling each phase in turn."""
    phases, sizes = list(config.diffusion.phases), []
    steps = tokens = 0
    for step in range(plan.total_steps):
        sizes.append(phases[0].block_size)
        steps, tokens = steps + 1, tokens + plan.batch_size(step) * LENGTH
        phase = phases[0]
        if steps == phase.steps or (phase.tokens is not None and tokens >= phase.tokens):
            phases, steps, tokens = phases[1:], 0, 0
    return sizes


def test_plan_evaluation_and_export_agree_on_every_curriculum(tmp_path: Path) -> None:
    draw = random.Random(5)
    manifest = read_manifest(whole_checkpoint(tmp_path / "one", run_config(tmp_path)))
    warmed = 0
    for _ in range(60):
        config = drawn(draw)
        validate(config)
        plan = RunPlan(config)
        sizes = simulated(config, plan)
        assert [plan.phase_at(step).phase.block_size for step in range(plan.total_steps)] == sizes
        # a checkpoint that does not state its block size: of an older version, or of state 0
        exported = [trained_block_size(config, replace(manifest, step=n)) for n in range(plan.total_steps + 1)]
        assert exported == [sizes[0], *sizes]
        for origin in (1, plan.total_steps // 2):
            resumed = RunPlan(config, origin, plan.samples_before(origin))
            assert [resumed.phase_at(step).phase.block_size for step in range(origin, plan.total_steps)] == sizes[
                origin:
            ]
        # the mistake that was: tokens divided by the whole batch, whatever a warming step takes
        whole = LENGTH * config.train.global_batch_size
        unwarmed = sum(p.steps or -(-(p.tokens or 0) // whole) for p in config.diffusion.phases[:-1])
        warmed += curriculum_of(config).seams()[-1] != unwarmed
    assert warmed > 20, "the draw holds too few runs in which the batch warm-up moves a seam"


def test_the_smallest_curriculum_whose_seam_the_batch_warmup_moves(tmp_path: Path) -> None:
    phases = [{"block_size": 8, "tokens": 24 * LENGTH}, {"block_size": 4, "tokens": 16 * LENGTH}, {"block_size": 32}]
    warming = {"global_batch_size": 16, "warmup_batch_size": 4, "batch_warmup_steps": 6}
    config = case(train=warming, diffusion={"phases": phases})
    manifest = read_manifest(whole_checkpoint(tmp_path / "one", run_config(tmp_path)))
    exported = [trained_block_size(config, replace(manifest, step=step)) for step in range(1, 9)]
    # batches of 4, 4, 8, 8, 12, 12: 24 samples are four updates, not ceil(24 / 16) = 2
    assert exported == [8, 8, 8, 8, 4, 4, 32, 32]
