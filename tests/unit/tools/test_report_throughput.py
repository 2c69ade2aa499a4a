"""The report's table, notes and plots over runs with restarts, torn lines, no steps and unknown devices."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.unit.report.written_runs import start_record, steady_run, step_record, write_run
from tools.report_throughput import main


def _three_runs(folder: Path) -> list[str]:
    """One device; two at the same batch; four at four times the batch with two restarts."""
    one = steady_run(folder / "one", 1)
    two = steady_run(folder / "two", 2, seconds=8 * 32 / 232)
    records = [start_record(0.0, 4, tp=2, pp=1, vpp=1, cp=1, dp=2)]
    for attempt in range(3):
        begin = 50.0 * attempt
        records.append(step_record(10 * attempt + 10, begin + 48.0, 2.56, tokens_per_second=400.0))
        records.append(start_record(begin + 50.0, 4, tp=2, pp=1, vpp=1, cp=1, dp=2))
    # goodput: 30 steps of 2.56 s by the last record, at 148 s; wall 150 s gives its share with a last record at 150
    records[-2]["time"] = 150.0
    four = write_run(
        folder / "four", records[:-1], train={"steps": 40, "global_batch_size": 32}, parallel={"tp": 2, "dp": 2}
    )
    return [str(one), str(two), str(four)]


def test_three_runs_with_restarts_give_the_golden_table(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_three_runs(tmp_path), "--format", "markdown"]) == 0
    golden = (root / "tests" / "golden" / "report_throughput.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == golden.strip()


def test_text_and_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = _three_runs(tmp_path)
    main(runs)
    text = capsys.readouterr().out
    main([*runs, "--format", "json"])
    tree = json.loads(capsys.readouterr().out)
    assert "strong 91%" in text and "weak 78%" in text
    assert [row["run"] for row in tree["runs"]] == ["one", "two", "four"]
    assert tree["runs"][2]["efficiency"] == pytest.approx(100 / 128)
    assert tree["notes"] == []


def test_a_torn_last_line_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [start_record(0.0, 1), step_record(10, 5.0, 0.5, tokens_per_second=512.0)]
    assert main([str(write_run(tmp_path / "live", records, tail='{"step": 20'))]) == 0
    assert "live: the last line of metrics.jsonl is incomplete (the job is writing it" in capsys.readouterr().out


def test_a_run_without_steps_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path / "young", [start_record(0.0, 1)]))]) == 0
    assert "young: no step is recorded yet, so its row is empty" in capsys.readouterr().out


def test_an_empty_metrics_file_is_a_run_without_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path / "empty", []))]) == 0
    assert "empty: no step is recorded yet" in capsys.readouterr().out


def test_runs_of_different_models_are_said_and_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = steady_run(tmp_path / "small", 1)
    large = steady_run(tmp_path / "large", 2, model={"num_layers": 6})
    main([str(small), str(large), "--format", "json"])
    tree = json.loads(capsys.readouterr().out)
    assert [row["efficiency"] for row in tree["runs"]] == [None, None]
    assert tree["notes"] == [
        "the runs are of 2 different models (or lengths, or objectives); "
        "scaling efficiency compares runs of one model only."
    ]


def test_an_unknown_device_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = {"throughput/mfu": None, "throughput/mfu_min": None, "throughput/hfu": None}
    why = {"throughput/mfu_reason": "the peak of device 'X' is not known, so no MFU is given"}
    records = [start_record(0.0, 1), step_record(10, 5.0, 0.5, tokens_per_second=512.0) | none | why]
    main([str(write_run(tmp_path / "odd", records))])
    assert "odd: the peak of device 'X' is not known" in capsys.readouterr().out


def test_a_run_without_a_start_has_no_goodput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write_run(tmp_path / "old", [step_record(10, 5.0, 0.5, tokens_per_second=512.0)]))])
    assert "old: no start event with a time is recorded, so goodput is not known." in capsys.readouterr().out


def test_a_missing_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nowhere' holds no config.yaml" in captured.err


def test_plots_are_well_formed_and_hold_every_run(tmp_path: Path) -> None:
    runs = _three_runs(tmp_path)
    main([*runs, "--plots", str(tmp_path / "plots")])
    for name in ("throughput.svg", "time_split.svg", "scaling.svg"):
        ElementTree.parse(tmp_path / "plots" / name)
    text = (tmp_path / "plots" / "throughput.svg").read_text()
    assert all(f">{run}</text>" in text for run in ("one", "two", "four"))
    assert text.count("<polyline") == 3


def test_plots_of_a_run_without_steps_are_well_formed(tmp_path: Path) -> None:
    main([str(write_run(tmp_path / "young", [start_record(0.0, 1)])), "--plots", str(tmp_path / "plots")])
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["throughput.svg"]
    ElementTree.parse(tmp_path / "plots" / "throughput.svg")


def test_help_needs_no_torch(root: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(root / "tools" / "report_throughput.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout
    assert not any(line.rsplit("|", 1)[-1].strip() == "torch" for line in done.stderr.splitlines())
