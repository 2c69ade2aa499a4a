"""Exported folders are whole, self-contained and ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.convert.folder import published
from bd3_megatron.convert.from_hf import read_folder
from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.errors import CheckpointError, ConversionError
from tests.unit.hf.models import STYLES, tiny_config, tiny_model


@pytest.mark.parametrize("style", STYLES)
def test_a_folder_gives_back_its_state_bit_by_bit(style: str, tmp_path: Path) -> None:
    config = tiny_config(4, style=style)
    state = dict(tiny_model(4, style=style, dtype=torch.float32).state_dict())
    if style == "tied":
        del state["lm_head.weight"]
    write_folder(state, config, tmp_path / "out")
    read, again = read_folder(tmp_path / "out")
    assert set(again) == set(state) and all(torch.equal(again[name], state[name]) for name in state)
    assert {k: v for k, v in vars(read).items() if k in ("style", "block_size", "qk_norm", "objective")} == {
        k: v for k, v in vars(config).items() if k in ("style", "block_size", "qk_norm", "objective")
    }


def test_large_states_are_sharded_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bd3_megatron.convert.to_hf.SHARD_BYTES", 4096)
    state = tiny_model(4, dtype=torch.float32).state_dict()
    write_folder(state, tiny_config(4), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again = read_folder(tmp_path / "out")[1]
    assert all(torch.equal(again[name], state[name]) for name in state)
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-.* does not exist; copy the folder again"):
        read_folder(tmp_path / "out")


def test_tokenizer_files_come_along_and_weights_do_not(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "pytorch_model.bin", ".hidden"):
        (tmp_path / "tokenizer" / name).write_text("{}", "utf-8")
    state = tiny_model(4, dtype=torch.float32).state_dict()
    copied = write_folder(state, tiny_config(4), tmp_path / "out", tokenizer_dir=tmp_path / "tokenizer")
    assert copied == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype"])
def test_states_that_are_not_the_configurations_are_refused(change: str, tmp_path: Path) -> None:
    state: dict[str, Any] = dict(tiny_model(4, dtype=torch.float32).state_dict())
    sentence, dtype = "lacks 1 parameters", torch.float32
    if change == "missing":
        del state["model.norm.weight"]
    elif change == "unknown":
        state["extra"], sentence = torch.zeros(1), r"1 unknown ones \['extra'\]"
    elif change == "shape":
        state["model.norm.weight"], sentence = torch.zeros(3), r"has shape \[3\]; the configuration asks for \[16\]"
    else:
        dtype, sentence = torch.int8, "dtype=torch.int8 cannot be exported"
    with pytest.raises(ConversionError, match=sentence):
        write_folder(state, tiny_config(4), tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_only_folders_of_the_same_kind_are_replaced(tmp_path: Path) -> None:
    state = tiny_model(4, dtype=torch.float32).state_dict()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear", "utf-8")
    with pytest.raises(ConversionError, match="holds something that is not a bd3 folder"):
        write_folder(state, tiny_config(4), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text("utf-8") == "dear"
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(ConversionError, match="is a file; give a folder"):
        write_folder(state, tiny_config(4), tmp_path / "file")
    for block_size in (4, 8):
        write_folder(state, tiny_config(block_size), tmp_path / "out")
    assert read_folder(tmp_path / "out")[0].block_size == 8


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    write_folder(tiny_model(4, dtype=torch.float32).state_dict(), tiny_config(4), tmp_path / "out")
    before = sorted(os.listdir(tmp_path / "out"))
    with pytest.raises(OSError, match="disk"), published(tmp_path / "out", model_type="bd3") as staging:
        (staging / "config.json").write_text("{}", "utf-8")
        raise OSError("disk is full")
    assert sorted(os.listdir(tmp_path / "out")) == before
    assert os.listdir(tmp_path) == ["out"]


def test_folders_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_folder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        read_folder(tmp_path)
    for text, sentence in (
        ("[]", "holds no JSON object"),
        ("{", "cannot be read"),
        ('{"model_type": "bd3lm"}', "expected 'bd3': official weights become such a folder"),
        ('{"model_type": "bd3", "style": "odd"}', "style='odd' is unknown"),
        ('{"model_type": "bd3", "mask_token_id": 1}', "model.safetensors does not exist"),
    ):
        (tmp_path / "config.json").write_text(text, "utf-8")
        with pytest.raises(CheckpointError, match=sentence):
            read_folder(tmp_path)
