"""A growing batch counts each sample once, whatever owns the gradients: ZeRO's stages see the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tolerances
from tests.ranks.train_runs import losses, record, train, train_config, write_data


def test_a_growing_batch_is_the_same_under_every_zero_stage(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    for stage in (1, 2, 3):
        config = train_config(
            tmp_path / "data",
            tmp_path / f"zero{stage}",
            train={"steps": 3, "micro_batch_size": 1, "warmup_batch_size": 2, "batch_warmup_steps": 3},
            parallel={"dp": 2, "zero_stage": stage},
        )
        train(config)
    assert [line["tokens"] for line in record(tmp_path / "zero1")] == [64, 192, 384]
    norms = [[line["optim/grad_norm"] for line in record(tmp_path / f"zero{stage}")] for stage in (1, 2, 3)]
    for stage, found in zip((2, 3), norms[1:], strict=True):
        assert losses(tmp_path / f"zero{stage}") == pytest.approx(
            losses(tmp_path / "zero1"), rel=tolerances.GRID_LOSSES_LATER
        )
        assert found == pytest.approx(norms[0], rel=tolerances.GRID_LOSSES_LATER)
