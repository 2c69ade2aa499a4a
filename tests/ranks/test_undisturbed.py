"""Evaluating between steps leaves no trace in training: the averaged weights come and go, also where ranks hold parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.train_runs import losses, train, train_config, write_data


@pytest.mark.parametrize("parallel", [{"dp": 2, "zero_stage": 3}, {}], ids=str)
def test_a_run_that_is_evaluated_learns_the_same(parallel: dict[str, Any], tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    for name, every in (("without", 0), ("with", 1)):
        config = train_config(
            tmp_path / "data",
            tmp_path / name,
            evaluate={"every_steps": every, "num_sequences": 8},
            # a large step and a fast average: the two sets of weights are far apart
            optim={"lr": 1e-2, "ema_decay": 0.9},
            train={"steps": 3},
            parallel=parallel,
        )
        train(config)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
