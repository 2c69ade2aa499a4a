"""The mean of checkpoints is their mean, of the right ones, and a checkpoint itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.checkpoint.verify import verify
from bd3_megatron.convert.average import average, best_checkpoints, last_checkpoints
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.errors import CheckpointError
from tests.unit.convert.models import run_config, whole_checkpoint
from tools import average_checkpoints as tool


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (1, 2, 3):
        whole_checkpoint(folder / "checkpoints" / step_name(step), run_config(folder), step=step, seed=step)
    records = [{"step": s, "eval/nll_nats_per_token": loss} for s, loss in ((1, 2.0), (2, 5.0), (3, 4.0))]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records) + '\n{"torn')
    return folder


def steps_of(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_the_mean_is_the_mean(run_dir: Path, tmp_path: Path) -> None:
    paths = [run_dir / "checkpoints" / step_name(s) for s in (1, 2, 3)]
    manifest = average(paths, tmp_path / "mean")
    assert (manifest.kind, manifest.step, manifest.origin["averaged_steps"]) == ("whole", 3, [1, 2, 3])
    assert verify(tmp_path / "mean") == manifest
    readers, mean = [open_checkpoint(path) for path in paths], open_checkpoint(tmp_path / "mean")
    for name in mean.names():
        expected = torch.stack([reader.tensor(name).double() for reader in readers]).mean(0).float()
        assert torch.equal(mean.tensor(name), expected), name
    assert convert_checkpoint(tmp_path / "mean", tmp_path / "hf").max_logit_difference < 1e-5


def test_the_last_and_the_best_are_chosen(run_dir: Path) -> None:
    assert steps_of(last_checkpoints(run_dir, 2)) == [step_name(3), step_name(2)]
    assert steps_of(best_checkpoints(run_dir, 2)) == [step_name(1), step_name(3)]
    (run_dir / "checkpoints" / step_name(3) / "weights" / "part-00000.safetensors").write_bytes(b"")
    said: list[str] = []
    assert steps_of(last_checkpoints(run_dir, 2, warn=said.append)) == [step_name(2), step_name(1)]
    assert len(said) == 1 and "torn" in said[0]
    with pytest.raises(CheckpointError, match="has 2 such checkpoints, 3 were asked for"):
        best_checkpoints(run_dir, 3)


def test_what_cannot_be_averaged_is_refused(run_dir: Path, tmp_path: Path) -> None:
    one = run_dir / "checkpoints" / step_name(1)
    with pytest.raises(CheckpointError, match="1 checkpoint is nothing to average"):
        average([one], tmp_path / "mean")
    other = whole_checkpoint(tmp_path / "other", run_config(tmp_path, model={"num_layers": 3}))
    with pytest.raises(CheckpointError, match="are of different models"):
        average([one, other], tmp_path / "mean")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists; name a new folder"):
        average([one, one], tmp_path / "there")
    assert not (tmp_path / "mean").exists()


def test_the_tool(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(run_dir), "--last", "2", "--out", str(tmp_path / "a")]) == 0
    assert "mean of the raw weights of steps [3, 2]" in capsys.readouterr().out
    assert tool.main([str(run_dir), "--best", "2", "--out", str(tmp_path / "b")]) == 0
    assert tool.main([str(run_dir), "--best", "9", "--out", str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.startswith("average_checkpoints: error: ")
