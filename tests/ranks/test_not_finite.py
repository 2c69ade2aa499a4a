"""A loss or gradient that is not finite, on whatever rank, leaves the update out on all of them; too many end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.engine import pipeline, zero_engine
from bd3_megatron.errors import NonFiniteError
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.batches import StepBatches
from bd3_megatron.train.build import build_trainer
from bd3_megatron.train.step import TrainingStep
from tests.ranks.harness import run_ranks
from tests.ranks.launches import launched
from tests.ranks.train_runs import train_config, write_data


@contextmanager
def planted(
    monkeypatch: pytest.MonkeyPatch, where: str, steps: Sequence[int], *, rank: int = 1, value: float = math.nan
) -> Iterator[None]:
    """Inside, the updates to these steps meet the value on one rank, in the loss alone or in one gradient alone."""
    run, scaled = TrainingStep.run, pipeline.scaled_loss
    now = {"is_planted": False}

    def planted_run(self: TrainingStep, plan: Any, state: Any, batches: Any, **more: Any) -> Any:
        now["is_planted"] = state.step + 1 in steps and self.topology.rank == rank
        hook = None
        if now["is_planted"] and where == "gradient":
            parameter = next(p for n, p in self.engine.model.root.named_parameters() if n.endswith("linear_fc2.weight"))
            hook = parameter.register_hook(lambda grad: grad * value)
        try:
            return run(self, plan, state, batches, **more)
        finally:
            if hook is not None:
                hook.remove()

    def planted_loss(weighted_sum: torch.Tensor, loss_scale: Any) -> torch.Tensor:
        # a constant has no gradient of its own
        return scaled(weighted_sum + value if now["is_planted"] and where == "loss" else weighted_sum, loss_scale)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "run", planted_run)
        patch.setattr(pipeline, "scaled_loss", planted_loss)
        patch.setattr(zero_engine, "scaled_loss", planted_loss)
        yield


def left_out(run_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line.get("event") == "not_finite"]


@pytest.mark.parametrize(
    ("where", "value", "parallel", "precision"),
    [
        ("loss", math.nan, {"tp": 2}, "fp32"),
        ("gradient", math.inf, {"tp": 2, "dp": 2}, "bf16"),
        ("loss", math.inf, {"dp": 2, "zero_stage": 2}, "fp32"),
        ("gradient", math.nan, {"dp": 2, "zero_stage": 3}, "fp32"),
    ],
    ids=str,
)
def test_once_on_one_rank_leaves_the_update_out_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, value: float, parallel: dict[str, int], precision: str
) -> None:
    steps = {"steps": 4, "precision": precision}
    config = train_config(write_data(tmp_path / "data"), tmp_path / "run", train=steps, parallel=parallel)

    def on_rank(topology: Topology) -> list[tuple[bool, bool, bool]]:
        """Of every update: whether it counts as made, whether the fp32 weights here moved, and the average did."""
        trainer = build_trainer(config, topology)
        step, seen = trainer._step, []

        def watched(batches: StepBatches) -> bool:
            kept = [[t.clone() for t in tensors] for tensors in (trainer.engine.owned(), trainer.engine.ema.shards)]
            vetoed = step(batches)
            # what the update did is known from here on
            trainer._read(late=0)
            now = (trainer.engine.owned(), trainer.engine.ema.shards)
            moved = [
                any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(kept, now, strict=True)
            ]
            assert all(torch.isfinite(t).all() for t in [*now[0], *now[1]])
            seen.append((trainer.state.finite_step == trainer.state.step - 1, *moved))
            return vetoed

        trainer._step = watched
        trainer.run()
        assert (trainer.state.skipped_steps, trainer.state.skipped_in_a_row) == (1, 0)
        return seen

    made, out = (True, True, True), (False, False, False)
    with planted(monkeypatch, where, [3], value=value):
        assert run_ranks(on_rank, config.parallel) == [[made, made, out, made]] * config.parallel.world_size()
    assert left_out(tmp_path / "run") == [3]


@pytest.mark.parametrize("where", ["loss", pytest.param("gradient", marks=pytest.mark.matrix)])
def test_too_many_in_a_row_end_the_run_and_the_good_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    keep = ("checkpoint.every_steps=1", "checkpoint.keep_last=1", "train.steps=40")
    steps = [2, *range(5, 40)]
    with (
        planted(monkeypatch, where, steps),
        launched(tmp_path, *keep, "parallel.dp=2", ranks=2) as run,
    ):
        assert run.end() == NonFiniteError.exit_code, run.said
        [error] = run.errors()
    assert error.startswith(
        "bd3: error: the last 10 updates, up to step 14, were left out, since loss or gradients were not"
    )
    assert "lower optim.lr or look at the data, and then: step_00000003 is the newest checkpoint known to give" in error
    assert "Traceback" not in run.said
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["status"], status["error"], status["exit_code"]) == ("failed", "NonFiniteError", 5)
    assert status["step"] == 14
    # the update to step 5 was the first to try the weights of step 4, and step 14 was not saved
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step_*"))
    assert kept == ["step_00000003", "step_00000013"]
    assert left_out(tmp_path / "run") == steps[:11]


def test_a_run_of_which_every_update_was_left_out_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = tmp_path / "stop"
    stop.touch()
    with planted(monkeypatch, "loss", range(1, 40), rank=0):
        with launched(tmp_path, "train.steps=3", f"train.stop_file={stop}") as run:
            assert run.end() == 0 and "stopped (file) after 1 of 3 steps" in run.said
        with launched(tmp_path, "train.steps=3") as run:
            assert run.end() == NonFiniteError.exit_code, run.said
    [error] = run.errors()
    assert "the last 3 updates, up to step 3," in error, "one of them before the stop"
    assert "no checkpoint is known to give a finite loss, so begin in a new run.dir" in error
