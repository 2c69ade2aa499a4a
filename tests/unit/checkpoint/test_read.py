"""One process reads whole tensors, whatever the grid was, without any engine being imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint.layout import MANIFEST, rank_name, step_name
from bd3_megatron.checkpoint.read import RELEASE_BYTES, ShardedReader, open_checkpoint, tensors
from bd3_megatron.errors import CheckpointError
from tests.unit.checkpoint.conftest import publish_json
from tools import inspect_checkpoint as tool

EMBEDDING = "embedding.word_embeddings.weight"


def test_names_shapes_and_kinds(checkpoints: Path) -> None:
    reader = open_checkpoint(checkpoints / step_name(2))
    names = reader.names()
    assert names[0] == EMBEDDING and names[-1] == "decoder.final_layernorm.weight" and len(names) == 34
    assert names.index("decoder.layers.3.mlp.linear_fc1.weight") > names.index("decoder.layers.2.mlp.linear_fc1.weight")
    assert reader.kinds() == ["ema", "exp_avg", "exp_avg_sq", "fp32"]
    for name, tensor in tensors(reader):
        assert reader.shape(name) == tuple(tensor.shape) and tensor.dtype == torch.float32
        assert not torch.equal(tensor, reader.tensor(name, "exp_avg"))


def test_files_are_let_go(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint(checkpoints / step_name(2))
    assert isinstance(reader, ShardedReader) and RELEASE_BYTES > 0
    first = reader.tensor(EMBEDDING)
    monkeypatch.setattr("bd3_megatron.checkpoint.read.RELEASE_BYTES", 16)
    assert torch.equal(reader.tensor(EMBEDDING), first)
    reader.close()
    assert torch.equal(reader.tensor(EMBEDDING), first)


def test_what_is_not_there_is_refused(checkpoints: Path) -> None:
    reader = open_checkpoint(checkpoints / step_name(2))
    with pytest.raises(CheckpointError, match="holds no parameter 'output_layer.weight'; it is of another model"):
        reader.tensor("output_layer.weight")
    with pytest.raises(CheckpointError, match="holds no 'momentum'; it has ema, exp_avg, exp_avg_sq, fp32"):
        reader.tensor(EMBEDDING, "momentum")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"{}"])
def test_a_sidecar_that_is_none_is_refused(content: bytes, checkpoints: Path) -> None:
    (checkpoints / step_name(2) / rank_name(1)).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read|is not a sidecar|lacks the field rank"):
        open_checkpoint(checkpoints / step_name(2))


def test_a_hole_is_seen(checkpoints: Path) -> None:
    path = checkpoints / step_name(2) / rank_name(0)
    tree = json.loads(path.read_text())
    tree["pieces"] = [piece for piece in tree["pieces"] if piece[0] != EMBEDDING]
    path.write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="has 0 of 2048 elements on tp rank 0"):
        open_checkpoint(checkpoints / step_name(2)).tensor(EMBEDDING)


def test_reading_imports_no_engine() -> None:
    code = (
        "import sys; import bd3_megatron.checkpoint.read, bd3_megatron.checkpoint.verify, bd3_megatron.checkpoint.compare; "
        "import bd3_megatron.checkpoint.universal, bd3_megatron.checkpoint.whole, bd3_megatron.checkpoint.describe; "
        "print([m for m in ('deepspeed', 'megatron', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_inspector_prints_and_compares(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, first, second = checkpoints.parent, checkpoints / step_name(1), checkpoints / step_name(2)
    assert tool.main([str(run), "--verify", "--norms"]) == 0
    out = capsys.readouterr().out
    assert "step 2, 8 samples consumed" in out and "every checksum is right" in out
    assert f"{EMBEDDING}  [64, 32]  norm " in out and "NOT FINITE" not in out
    assert tool.main([str(second), "--against", str(second), "--which", "ema"]) == 0
    assert "all 34 tensors (ema) are equal" in capsys.readouterr().out
    assert tool.main([str(first), "--against", str(second)]) == 1
    out = capsys.readouterr().out
    assert "step: 1 -> 2" in out and "34 of 34 tensors (model) differ" in out
    (second / rank_name(0)).write_text("{}")
    assert tool.main([str(second), "--verify"]) == 2
    assert capsys.readouterr().err.startswith("inspect_checkpoint: error: ")
    assert tool.main([str(run / "nowhere")]) == 2


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        (
            "config",
            "optim",
            {"lr": -1},
            "the checkpoint's own settings, config in .*manifest.json, are refused: optim.lr=-1",
        ),
        ("train_state", "samples_consumed", 9, "samples_consumed=8 and train_state.samples_consumed=9 differ"),
        ("train_state", "origin_samples", 1, "train_state.samples_consumed=8, and at step 2 its settings come to 9"),
        ("train_state", "block_size", 8, "train_state.block_size=8, and at step 2 its settings come to 4"),
        ("train_state", "origin_step", 1, "train_state.samples_consumed=8, and at step 2 its settings come to 4"),
    ],
)
def test_the_inspector_ends_like_a_resume_where_settings_and_state_do_not_agree(
    section: str, key: str, value: Any, told: str, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints / step_name(2)
    tree = json.loads((folder / MANIFEST).read_text())
    tree[section][key] = value
    publish_json(folder, MANIFEST, tree)
    assert tool.main([str(folder)]) == 2
    assert re.search(told, capsys.readouterr().err)
