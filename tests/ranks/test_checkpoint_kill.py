"""A run that is killed at any moment, in the middle of a save too, ends with the record of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.kill_runs import kill_and_compare


@pytest.mark.timeout(300)
def test_a_killed_run_records_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    overrides = ["checkpoint.asynchronous=true", "parallel.dp=1"]
    tally = kill_and_compare(tmp_path, kills=2, num_steps=8, seed=3, overrides=overrides)
    assert tally.kills >= 1


@pytest.mark.matrix
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_hundred_kills(asynchronous: str, tmp_path: Path) -> None:
    overrides = [f"checkpoint.asynchronous={asynchronous}"]
    tally = kill_and_compare(tmp_path, kills=100, num_steps=600, seed=1, overrides=overrides)
    assert tally.kills == 100 and tally.in_a_save >= 10 and tally.of_one_rank >= 10
    print(tally)
