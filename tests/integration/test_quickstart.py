"""README's quickstart with few steps: from any folder, killed behind the training, it goes on to everything it promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = "12"
PROMISED = {"config.yaml", "metrics.jsonl", "checkpoints", "hf", "samples.txt", "data"}


COMMAND = ["bash", str(ROOT / "launch/quickstart.sh")]


def quickstart(cwd: Path, env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=580)


def killed_after_training(cwd: Path, env: Mapping[str, str], *arguments: str) -> str:
    """Start a quickstart and kill it when it begins to convert; what it said until then."""
    said = ""
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=cwd, env=dict(env), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if line.startswith("[3/5]"):
                os.killpg(process.pid, signal.SIGKILL)
                break
    return said


@pytest.mark.timeout(600)
def test_the_quickstart_keeps_its_promises(tmp_path: Path, clean_environment: Mapping[str, str]) -> None:
    arguments = ("--steps", STEPS, "--out")
    said = killed_after_training(tmp_path, clean_environment, *arguments, "out")
    done = quickstart(ROOT, clean_environment, *arguments, str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out"
    assert f"quickstart: starts in {folder}" in said
    assert f"quickstart: resumes in {folder}" in done.stdout
    assert PROMISED <= {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors"} <= {p.name for p in (folder / "hf").iterdir()}
    for word in ("perplexity", "throughput", "data tokens/s", "MFU", "words", "samples"):
        assert word in done.stdout.split("quickstart: done in")[1], done.stdout
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    perplexities = [r["eval/perplexity"] for r in records if "eval/perplexity" in r]
    assert len(perplexities) == 2 and perplexities[1] < perplexities[0]
    assert (folder / "samples.txt").read_text().count("\n\n----\n\n") == 2


def test_settings_that_cannot_run_are_refused(tmp_path: Path, clean_environment: Mapping[str, str]) -> None:
    done = quickstart(tmp_path, clean_environment, "--grid", "tp=3", "--out", "out")
    assert (done.returncode, done.stderr) == (
        2,
        "quickstart: error: tp=3 does not divide num_heads=4; use 1, 2 or 4.\n",
    )
    assert not (tmp_path / "out").exists()


def test_a_grid_that_is_none_is_refused(tmp_path: Path, clean_environment: Mapping[str, str]) -> None:
    done = quickstart(tmp_path, clean_environment, "--grid", "dp2", "--out", "out")
    assert done.returncode == 2
    assert "'dp2' is no axis with a value; write for example --grid tp=1,dp=2." in done.stderr


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, clean_environment: Mapping[str, str]) -> None:
    (tmp_path / "thesis.tex").touch()
    done = quickstart(tmp_path, clean_environment, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "holds files that are not the quickstart's; give another --out." in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
