"""The planner's door: prints plans, reasons and assumptions; refuses in one sentence; needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_megatron.config.load import dump_config
from tests.unit.cost.cases import case
from tests.unit.report.written_runs import start_record, steady_run, write_run
from tools.plan import main


@pytest.fixture
def config(tmp_path: Path) -> str:
    dump_config(case(train={"steps": 1, "global_batch_size": 8}), tmp_path / "config.yaml")
    return str(tmp_path / "config.yaml")


def test_a_plan_names_the_best_the_others_and_the_assumptions(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--gpus", "4", "--gpu", "a100-80g", "--tokens", "1e9"]) == 0
    out = capsys.readouterr().out
    for part in ("plans fit", "Parts of the first:", "Why the other grids lose", "Assumptions:", "312 TFLOP/s", "days"):
        assert part in out


def test_json_holds_memory_and_time_by_part(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--gpus", "2", "--gpu", "h200", "--format", "json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    best = tree["plans"][0]
    assert best["time_seconds"]["total"] == pytest.approx(
        sum(v for k, v in best["time_seconds"].items() if k != "total")
    )
    assert best["memory_bytes"]["peak"] > best["memory_bytes"]["parameters"] > 0
    assert best["against_the_best"] == "best"


def test_overrides_and_a_cluster_file_are_taken(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("gpus_per_node: 2\ninter_node_gb_per_second: 1\n")
    arguments = [config, "train.global_batch_size=16", "--gpus", "4", "--gpu", "a100-80g", "--cluster", str(cluster)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "batch 16" in out and "2 devices a node" in out


def test_calibration_moves_the_prediction_to_the_measured_runs(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(steady_run(tmp_path / "a", 1, seconds=2.0)), str(steady_run(tmp_path / "b", 2, seconds=1.2))]
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("peak_tflops: 0.05\ncores: 8\n")
    common = [config, "--gpus", "1", "--gpu", "cpu", "--cluster", str(cluster), "--format", "json", "--top", "99"]
    assert main([*common, "--calibrate", *runs]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    same = next(p for p in plans if p["plan"] == "dp1, mb 1, none, zero 1")
    assert same["time_seconds"]["total"] == pytest.approx(2.0, rel=0.15)


def test_a_run_without_steps_cannot_calibrate(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young = write_run(tmp_path / "young", [start_record(0.0, 1)])
    assert main([config, "--gpus", "1", "--gpu", "a100-80g", "--calibrate", str(young)]) == 2
    assert "has no step recorded to calibrate on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "a plan needs a CONFIG and --gpus N"),
        (["CONFIG", "--gpus", "0"], "--gpus 0 is below 1"),
        (["CONFIG", "--gpus", "2", "--gpu", "tpu"], "gpu 'tpu' is not known"),
        (["CONFIG", "--gpus", "2", "--gpu", "cpu"], "gpu 'cpu' has no known peak"),
        (["CONFIG", "model.vocab_size=null", "--gpus", "2"], "model.vocab_size is not set"),
        (["nowhere.yaml", "--gpus", "2"], "config file 'nowhere.yaml' does not exist"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], sentence: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config if a == "CONFIG" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err and captured.err.count("\n") == 1


def test_a_vocabulary_can_be_given(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [config, "model.vocab_size=null", "--gpus", "2", "--gpu", "h200", "--vocab-size", "60"]
    assert main(arguments) == 0
    assert "plans fit" in capsys.readouterr().out


def test_help_needs_no_torch(root: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(root / "tools" / "plan.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout
    assert not any(line.rsplit("|", 1)[-1].strip() == "torch" for line in done.stderr.splitlines())


def test_the_shipped_curve_holds_every_size_up_to_1024_devices(root: Path) -> None:
    text = (root / "tools" / "bench" / "results" / "weak_scaling_simulated_h100-sxm.md").read_text(encoding="utf-8")
    assert "**not measured**" in text
    for name in ("1.3B", "7B", "30B"):
        assert any(line.startswith(f"| {name} ") and "| 1024 |" in line for line in text.splitlines())
    assert (root / "tools" / "bench" / "results" / "weak_scaling_simulated_h100-sxm.svg").is_file()
