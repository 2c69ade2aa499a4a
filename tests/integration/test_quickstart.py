"""README's quickstart with few steps: from any folder, to everything it promises, and a second run goes on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMISED = {"config.yaml", "metrics.jsonl", "checkpoints", "hf", "samples.txt", "data"}


def quickstart(cwd: Path, env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "launch/quickstart.sh"), *arguments]
    return subprocess.run(command, cwd=cwd, env=dict(env), capture_output=True, text=True, timeout=580)


@pytest.mark.timeout(600)
def test_the_quickstart_keeps_its_promises(tmp_path: Path, clean_environment: Mapping[str, str]) -> None:
    done = quickstart(tmp_path, clean_environment, "--steps", "30", "--out", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out"
    assert f"quickstart: starts in {folder}" in done.stdout
    assert PROMISED <= {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors"} <= {p.name for p in (folder / "hf").iterdir()}
    for word in ("perplexity", "throughput", "data tokens/s", "MFU", "words", "samples"):
        assert word in done.stdout.split("quickstart: done in")[1], done.stdout
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    perplexities = [r["eval/perplexity"] for r in records if "eval/perplexity" in r]
    assert len(perplexities) == 2 and perplexities[1] < perplexities[0]
    assert (folder / "samples.txt").read_text().count("----") == 2

    again = quickstart(ROOT, clean_environment, "--steps", "30", "--out", str(folder))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"quickstart: resumes in {folder}" in again.stdout


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
