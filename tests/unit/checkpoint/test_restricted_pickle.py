"""A file from outside never runs anything: it is data, or a typed error."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint.layout import STATE_DIR, step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.checkpoint.restricted_pickle import open_pt
from bd3_megatron.errors import CheckpointError


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("wrapped", ["alone", "nested", "beside tensors"])
def test_a_hostile_file_raises_and_does_nothing(wrapped: str, tmp_path: Path) -> None:
    proof, path = tmp_path / "executed", tmp_path / "state.pt"
    hostile = Hostile(proof)
    content = {"alone": hostile, "nested": {"a": [hostile]}, "beside tensors": {"t": torch.ones(3), "h": hostile}}[
        wrapped
    ]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="holds more than plain data and was not opened"):
        open_pt(path)
    assert not proof.exists()


def test_a_bare_pickle_raises_and_does_nothing(tmp_path: Path) -> None:
    proof, path = tmp_path / "executed", tmp_path / "state.pt"
    path.write_bytes(pickle.dumps(Hostile(proof)))
    with pytest.raises(CheckpointError, match="is damaged|holds more"):
        open_pt(path)
    assert not proof.exists()


def test_a_hostile_file_in_a_checkpoint_raises_and_does_nothing(checkpoints: Path, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    state = checkpoints / step_name(2) / STATE_DIR
    for path in state.glob("*.pt"):
        torch.save({"optimizer_state_dict": Hostile(proof)}, path)
    reader = open_checkpoint(checkpoints / step_name(2))
    with pytest.raises(CheckpointError, match="was not opened"):
        reader.tensor("embedding.word_embeddings.weight")
    assert not proof.exists()


def test_stand_ins_take_attributes_and_no_others_are_resolved(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    for content in (torch.nn.Linear(1, 1), os.path.join, pytest.raises):
        torch.save({"x": content}, path)
        with pytest.raises(CheckpointError, match="was not opened"):
            open_pt(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with pytest.raises(CheckpointError, match="does not exist"):
        open_pt(path)
    torch.save({"a": torch.arange(100)}, path)
    assert torch.equal(open_pt(path)["a"], torch.arange(100))
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="is damaged"):
        open_pt(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"garbage")
    with pytest.raises(CheckpointError, match="is damaged|was not opened"):
        open_pt(path)
