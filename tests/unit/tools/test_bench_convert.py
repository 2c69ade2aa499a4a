"""The checkpoint that the benchmark makes is one that a run could have left, and it converts."""

from __future__ import annotations

from pathlib import Path

import torch

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.checkpoint.verify import verify
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from tests.unit.convert.models import run_config
from tools.bench.convert import CHECKPOINT_STEP, write_random_checkpoint


def test_the_offline_layout_is_a_runs(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path, run_config(tmp_path), vocab_size=61)
    assert path.name == step_name(CHECKPOINT_STEP)
    verify(path)
    reader = open_checkpoint(path)
    assert reader.kinds() == ["ema", "fp32"] and reader.manifest.grid["tp"] == reader.manifest.grid["pp"] == 2
    for name in reader.names():
        assert torch.equal(reader.tensor(name, "model"), 2 * reader.tensor(name, "ema")), name
    report = convert_checkpoint(path, tmp_path / "hf")
    assert report.which == "averaged" and report.max_logit_difference < 1e-5
