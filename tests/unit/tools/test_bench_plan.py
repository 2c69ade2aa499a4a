"""The planner's benchmark: its cases are legal and fit two cores, memory is counted exactly, errors are its own sums."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from bd3_megatron.errors import RangeError
from bd3_megatron.report.run_record import read_run
from tests.unit.report.written_runs import steady_run
from tools.bench import plan
from tools.bench.harness import MIB
from tools.plan import observation


@pytest.mark.parametrize("name", plan.CASES)
def test_every_case_is_legal_and_fits_two_cores(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert plan.planner_case_config(plan.CASES[name], tmp_path, tmp_path, steps=2).parallel.world_size() <= 2


def test_more_ranks_than_cores_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    with pytest.raises(RangeError, match="a case of 2 ranks needs as many cores and this machine has 1"):
        plan.planner_case_config(plan.CASES["tp2"], tmp_path, tmp_path, steps=2)


def test_two_cases_calibrate_and_enough_are_unseen() -> None:
    calibrating = [case for case in plan.CASES.values() if case.calibrates]
    assert len(calibrating) == 2
    assert len(plan.CASES) - len(calibrating) >= 6


def test_the_peak_is_what_was_alive_at_once_since_the_moment() -> None:
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        kept = torch.empty(MIB, dtype=torch.uint8)
        before = torch.empty(8 * MIB, dtype=torch.uint8)
        del before
        since_ns = time.time_ns()
        for _ in range(3):
            passing = torch.empty(2 * MIB, dtype=torch.uint8)
            del passing
    assert kept.numel() == MIB
    assert plan.peak_tensor_bytes(profile, since_ns) == 3 * MIB
    assert plan.peak_tensor_bytes(profile, 0) == 9 * MIB


def test_a_case_takes_what_a_tenth_of_its_steps_do_not_reach(tmp_path: Path) -> None:
    runs = [read_run(steady_run(tmp_path / str(s), 1, seconds=float(s))) for s in range(1, 12)]
    # eleven runs of equal length: the second fastest is the first decile, the sixth the median
    assert plan._quantiles(runs, "time/step_seconds") == pytest.approx((2.0, 6.0))


def test_the_table_holds_every_case_with_its_errors(tmp_path: Path) -> None:
    measured = {}
    for number, name in enumerate(("base", "dp2", "wide")):
        run = read_run(steady_run(tmp_path / str(number), 1, seconds=1.0))
        measured[name] = plan.CaseMeasurement(observation(run), 0.25, 0.05, 64 * MIB)
    note = plan.compare_predictions(measured)
    assert note.count("(calibrates)") == 2
    assert "| wide | " in note and "| +25% | " in note and "| 64.0 | " in note
    assert "of 1 unseen cases 1 are within 15% in step time (outside: none), 0 within 10% in peak memory" in note
    assert "(outside: wide)" in note
    assert "fitted: compute_factor" in note
