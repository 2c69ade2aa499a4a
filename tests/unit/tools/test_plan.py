"""The planner's command: prints plans, reasons and assumptions; refuses in one sentence; needs no torch."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_megatron.config.load import dump_config, load_config, with_later
from bd3_megatron.config.validate import validate
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.sources import text_source
from bd3_megatron.planner.machines import machine_of
from bd3_megatron.planner.plans import plan_of
from tests.unit.cost.cases import case
from tests.unit.report.written_runs import start_record, steady_run, write_run
from tools.plan import main


@pytest.fixture
def config(tmp_path: Path) -> str:
    dump_config(case(train={"steps": 1, "global_batch_size": 8}), tmp_path / "config.yaml")
    return str(tmp_path / "config.yaml")


def profile(folder: Path, text: str) -> str:
    (folder / "site.yaml").write_text("partition: main\nranks_per_node: 8\n" + text)
    return str(folder / "site.yaml")


def test_a_plan_names_the_best_the_others_and_the_assumptions(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--gpus", "4", "--gpu", "a100", "--tokens", "1e9"]) == 0
    out = capsys.readouterr().out
    for part in (
        "4 x a100-80g",
        "plans fit",
        "Parts of the best:",
        "hands to collectives in a step: ",
        "Why the other grids lose",
        "Assumptions:",
        "312 TFLOP/s",
        "days",
    ):
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


def test_overrides_stand_anywhere_and_a_profile_gives_device_and_links(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = profile(tmp_path, "planner_gpu: a100-80g\nplanner: {gpus_per_node: 2, inter_node_gb_per_second: 1}\n")
    run = str(steady_run(tmp_path / "a", 1))
    for arguments in (
        ["train.global_batch_size=16", "--gpus", "4", "--cluster", site, config],
        ["train.global_batch_size=16", config, "--gpus", "4", "--cluster", site],
        [config, "--gpus", "4", "train.global_batch_size=16", "--cluster", site],
        [config, "--gpus", "4", "--cluster", site, "--calibrate", run, "train.global_batch_size=16"],
    ):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "batch 16, 4 x a100-80g" in out and "2 devices a node; 300 GB/s" in out and "1 GB/s" in out
    assert "fitted: compute_factor" in out


def test_a_shipped_profile_is_known_by_its_name(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    for given, seen in (("h100", "4 x h100-sxm"), ("configs/cluster/a100_cloud.yaml", "4 x a100-40g")):
        assert main([config, "--gpus", "4", "--cluster", given]) == 0
        out = capsys.readouterr().out
        assert seen in out and "8 devices a node" in out


def test_the_configured_grid_stands_beside_the_best_and_the_override_makes_it(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["parallel.tp=2", "parallel.sequence_parallel=true", "train.recompute=full"]
    assert main([config, *own, "--gpus", "4", "--gpu", "h200"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^configured +tp2 dp2 sp, mb \d+, full, zero \d .* slower \(", out, re.MULTILINE)
    pasted = next(line for line in out.splitlines() if line.startswith("To run the best, add: "))
    override = shlex.split(pasted.removeprefix("To run the best, add: "))
    # a key stands once on a command line
    replaced = next(line for line in out.splitlines() if line.startswith("and leave out: "))
    assert shlex.split(replaced.removeprefix("and leave out: ")) == [
        o for o in own if o not in with_later(own, override)
    ]
    own = with_later(own, override)
    best = load_config(config, own)
    validate(best, world_size=4)
    label = next(line for line in out.splitlines() if line.startswith("best ")).split("  ")
    assert plan_of(best, machine_of("h200", peak_tflops=1.0)).label in [cell.strip() for cell in label]
    # with the override given, the configuration is the best
    assert main([config, *own, "--gpus", "4", "--gpu", "h200"]) == 0
    out = capsys.readouterr().out
    assert "The configuration is the best plan." in out and "\nconfigured best" in out


def test_a_configured_grid_that_is_not_legal_says_why(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "parallel.pp=3", "--gpus", "4", "--gpu", "h200"]) == 0
    assert "is not legal here: 4 devices are not a multiple of tp x pp x cp = 3." in capsys.readouterr().out


def test_days_are_of_the_configurations_own_tokens(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """1 step of 8 samples of 32 tokens; a warm-up of the batch counts its smaller steps."""
    asked = [config, "--gpus", "2", "--gpu", "h200", "--format", "json"]
    seen = []
    for own in ([], ["train.steps=10"], ["train.steps=null", "train.tokens=5000"], ["--tokens", "1e9"]):
        assert main([*asked, *own]) == 0
        tree = json.loads(capsys.readouterr().out)
        seen.append(tree["tokens"])
        best = tree["plans"][0]
        assert best["days"] == pytest.approx(tree["tokens"] / best["tokens_per_second"] / 86400)
    assert seen == [256, 2560, 5120, 1e9]


def test_nothing_fits_is_exit_code_1(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = profile(tmp_path, "planner_gpu: l40s\nplanner: {memory_gib: 0.0001, reserve_gib: 0}\n")
    assert main([config, "--gpus", "2", "--cluster", site]) == 1
    out = capsys.readouterr().out
    assert "nothing fits; the smallest plans are:" in out and "To run the best" not in out


def test_calibration_moves_the_prediction_to_the_measured_runs(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(steady_run(tmp_path / "a", 1, seconds=2.0)), str(steady_run(tmp_path / "b", 2, seconds=1.2))]
    site = profile(tmp_path, "planner_gpu: cpu\nplanner: {peak_tflops: 0.05, cores: 8}\n")
    common = [config, "--gpus", "1", "--cluster", site, "--format", "json", "--top", "99"]
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
        (["CONFIG", "--gpus", "0", "--gpu", "h100"], "--gpus 0 is not between 1 and 1,000,000"),
        (["CONFIG", "--gpus", "2"], "no device is named; give --gpu (a100, a100-40g"),
        (["CONFIG", "--gpus", "x"], "argument --gpus: invalid int value: 'x'; see plan --help"),
        (["CONFIG", "--gpus", "2", "--gpu", "h100", "--tokens", "nan"], "--tokens nan is no amount of training"),
        (["CONFIG", "--gpus", "2", "--gpu", "h100", "--top", "0"], "--top 0 is below 1"),
        (
            ["CONFIG", "--gpus", "2", "--gpu", "h100", "--cluster", "a100_dgx"],
            "--gpu h100 is not the planner_gpu=a100-80g",
        ),
        (["CONFIG", "--gpus", "2", "--cluster", "cpu"], "cluster profile 'cpu' names no planner_gpu; give --gpu"),
        (["CONFIG", "--gpus", "2", "--cluster", "nowhere"], "does not exist; give a copy of one of configs/cluster/"),
        (["CONFIG", "--gpus", "2", "--gpu", "h100", "no.such=1"], "unknown"),
        (["CONFIG", "--gpus", "2", "--gpu", "tpu"], "gpu 'tpu' is not known"),
        (["CONFIG", "--gpus", "2", "--gpu", "cpu"], "gpu 'cpu' has no known peak"),
        (
            ["CONFIG", "model.vocab_size=null", "data.path=x", "--gpus", "2", "--gpu", "h100"],
            "model.vocab_size is not set",
        ),
        (["nowhere.yaml", "--gpus", "2", "--gpu", "h100"], "config file 'nowhere.yaml' does not exist"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], sentence: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config if a == "CONFIG" else a for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err and captured.err.count("\n") == 1


def test_the_vocabulary_is_the_prepared_datas(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("".join(f"some words and {i} more words\n\n" for i in range(200)))
    source = {"train": text_source([str(tmp_path / "text.txt")])}
    prepare(PrepareRequest(out=tmp_path / "data", sources=source, tokenizer="bytes"), say=lambda _: None)
    for own in ([f"data.path={tmp_path}/data"], ["data.path=null", "data.text=[a.txt]", "data.tokenizer=bytes"]):
        asked = [config, *own, "--gpus", "2", "--gpu", "h200", "--format", "json"]
        assert main([*asked, "model.vocab_size=null"]) == 0
        smaller = json.loads(capsys.readouterr().out)["plans"][0]["memory_bytes"]["parameters"]
        assert main([*asked, "model.vocab_size=260"]) == 0
        assert json.loads(capsys.readouterr().out)["plans"][0]["memory_bytes"]["parameters"] == smaller


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
