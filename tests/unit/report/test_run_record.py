"""Reading runs back: torn lines, attempts, settled speed, goodput over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.errors import DataError
from bd3_megatron.report.run_record import goodput, read_records, read_run
from tests.unit.report.written_runs import start_record, steady_run, step_record, write_run


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    whole = read_run(steady_run(tmp_path / "whole", 2))
    records = [start_record(0.0, 1), step_record(10, 5.0, 0.5, tokens_per_second=512.0)]
    torn = read_run(write_run(tmp_path / "torn", records, tail='{"step": 20, "time/step_sec'))
    cut = read_run(write_run(tmp_path / "cut", records, tail='{"step": 20, "time/step_sec\n'))
    assert (whole.torn, torn.torn, cut.torn) == (False, True, True)
    assert len(torn.steps) == len(cut.steps) == 1


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[1, 2]\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2 of '.*metrics.jsonl' is no JSON object \('\[1, 2\]'\); remove it"):
        read_records(path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no config.yaml; give the run.dir of a run that has started"):
        read_run(tmp_path)


def test_speed_is_the_median_after_the_first_record(tmp_path: Path) -> None:
    run = read_run(steady_run(tmp_path / "run", 2))
    assert run.typical("time/step_seconds") == 2.0
    assert run.typical("throughput/data_tokens_per_second") == 128.0
    assert run.typical("no/such_key") is None


def test_speed_is_that_of_the_last_attempt_that_stepped(tmp_path: Path) -> None:
    records = [
        start_record(0.0, 4, dp=4),
        step_record(10, 20.0, 1.0, tokens_per_second=256.0),
        step_record(20, 30.0, 1.0, tokens_per_second=256.0),
        start_record(40.0, 2, dp=2),
        step_record(30, 70.0, 2.0, tokens_per_second=128.0),
        start_record(90.0, 2, dp=2),
    ]
    run = read_run(write_run(tmp_path / "run", records))
    assert run.typical("time/step_seconds") == 2.0
    assert (run.devices, run.restarts, len(run.attempts)) == (2, 2, 3)


def test_the_time_split_adds_up_to_the_step(tmp_path: Path) -> None:
    run = read_run(steady_run(tmp_path / "run", 1))
    assert sum(run.time_split().values()) == pytest.approx(2.0)
    assert run.time_split()["backward"] == pytest.approx(1.0)


def test_goodput_is_useful_step_time_over_wall_time(tmp_path: Path) -> None:
    run = read_run(steady_run(tmp_path / "run", 1))
    got = goodput(run)
    assert got is not None
    # 10 steps of 3 s and 30 of 2 s within 100 s
    assert (got.useful_seconds, got.wall_seconds, got.share) == (90.0, 100.0, 0.9)


def test_work_done_again_after_a_restart_is_not_useful(tmp_path: Path) -> None:
    """Steps 11-20 of the first attempt were lost: their records are cut at resume, their time is not."""
    records = [
        start_record(0.0, 1),
        step_record(10, 20.0, 1.0, tokens_per_second=256.0),
        start_record(60.0, 1),
        step_record(20, 80.0, 1.0, tokens_per_second=256.0),
    ]
    got = goodput(read_run(write_run(tmp_path / "run", records)))
    assert got is not None
    assert (got.useful_seconds, got.wall_seconds) == (20.0, 80.0)


def test_a_step_that_stands_twice_counts_once(tmp_path: Path) -> None:
    records = [
        start_record(0.0, 1),
        step_record(10, 20.0, 1.0, tokens_per_second=256.0),
        step_record(10, 40.0, 1.0, tokens_per_second=256.0),
    ]
    got = goodput(read_run(write_run(tmp_path / "run", records)))
    assert got is not None and got.useful_seconds == 10.0


def test_without_a_start_there_is_no_goodput(tmp_path: Path) -> None:
    records = [step_record(10, 20.0, 1.0, tokens_per_second=256.0)]
    run = read_run(write_run(tmp_path / "run", records))
    assert goodput(run) is None
    assert run.restarts == 0
    assert run.devices == 1


def test_evaluation_records_are_no_steps(tmp_path: Path) -> None:
    records = [start_record(0.0, 1), {"step": 10, "eval/perplexity": 30.0}]
    assert read_run(write_run(tmp_path / "run", records)).steps == []
