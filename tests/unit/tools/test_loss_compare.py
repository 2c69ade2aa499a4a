"""Curves are compared where all runs have them; a difference beyond the tolerance is an exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tools.loss_compare import main

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "debug_cpu.yaml"


def write(folder: Path, losses: dict[int, float]) -> str:
    folder.mkdir()
    shutil.copy(CONFIG, folder / "config.yaml")
    lines = [json.dumps({"step": step, "loss/train_nats_per_token": loss}) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_equal_curves_pass_and_unequal_ones_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", {1: 5.0, 2: 4.0, 3: 3.0})
    same = write(tmp_path / "same", {2: 4.0 + 1e-7, 3: 3.0})
    far = write(tmp_path / "far", {1: 5.0, 2: 4.5})
    assert main([one, same, "--svg", str(tmp_path / "curves.svg")]) == 0
    assert "2   1.00e-07" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert main([one, far]) == 1
    assert "5.00e-01" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", {1: 5.0})
    other = write(tmp_path / "other", {2: 5.0})
    empty = write(tmp_path / "empty", {})
    assert main([one, other]) == 2
    assert "have no logged step in common" in capsys.readouterr().err
    assert main([one, empty]) == 2
    assert "has logged no loss/train_nats_per_token yet" in capsys.readouterr().err
    assert main([one, str(tmp_path / "nowhere")]) == 2
    assert "give the run.dir of a run that has started" in capsys.readouterr().err
