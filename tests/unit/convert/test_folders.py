"""Exported folders are whole, self-contained and ours."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.convert.folder import published
from bd3_megatron.convert.from_hf import read_folder
from bd3_megatron.convert.plain_source import StateSource
from bd3_megatron.convert.to_hf import stream_folder, write_folder
from bd3_megatron.errors import CheckpointError, ConversionError, FolderHeldError, TokenizerError
from bd3_megatron.lease import held_output
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


def test_large_states_are_sharded_and_read_back(tmp_path: Path) -> None:
    state = tiny_model(4, dtype=torch.float32).state_dict()
    stream_folder(StateSource(state), tiny_config(4), tmp_path / "out", shard_bytes=4096)
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
    sentence, dtype = "lacks 1 parameter", torch.float32
    if change == "missing":
        del state["model.norm.weight"]
    elif change == "unknown":
        state["extra"], sentence = torch.zeros(1), r"1 unknown \['extra'\]"
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


def test_what_no_export_writes_is_never_deleted(tmp_path: Path) -> None:
    state = tiny_model(4, dtype=torch.float32).state_dict()
    write_folder(state, tiny_config(4), tmp_path / "out")
    for name in ("notes.txt", ".git/HEAD", "modeling_bd3lm.py"):
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", "utf-8")
        with pytest.raises(
            ConversionError, match=f"holds '{name.split('/')[0]}', which no export writes .* move that file away"
        ):
            write_folder(state, tiny_config(8), tmp_path / "out")
        assert path.read_text("utf-8") == "mine" and read_folder(tmp_path / "out")[0].block_size == 4
        path.unlink()
        if path.parent != tmp_path / "out":
            path.parent.rmdir()
    write_folder(state, tiny_config(8), tmp_path / "out")


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    sentence = rf"^out=.*out is held by another launch \(host .*, process {os.getpid()},"
    with held_output(tmp_path / "out"), pytest.raises(FolderHeldError, match=sentence):
        write_folder(tiny_model(4, dtype=torch.float32).state_dict(), tiny_config(4), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_exported_files_are_readable_by_colleagues(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_folder(tiny_model(4, dtype=torch.float32).state_dict(), tiny_config(4), tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["bos", "eos", "pad"])
def test_a_mask_that_is_another_special_token_is_not_exported(name: str, tmp_path: Path) -> None:
    config = tiny_config(4)
    setattr(config, f"{name}_token_id", config.mask_token_id)
    with pytest.raises(TokenizerError, match=rf"the model: the mask id \d+ is also the id of {name}"):
        write_folder(tiny_model(4, dtype=torch.float32).state_dict(), config, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_folders_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_folder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        read_folder(tmp_path)
    for text, sentence in (
        ("[]", "is damaged .no JSON object."),
        ("{", "is damaged .not JSON.; export the folder again"),
        ('{"model_type": "bd3lm"}', "expected 'bd3': official weights become such a folder"),
        ('{"model_type": "bd3", "style": "odd"}', "style='odd' is unknown"),
        ('{"model_type": "bd3", "mask_token_id": 1}', "model.safetensors does not exist"),
    ):
        (tmp_path / "config.json").write_text(text, "utf-8")
        with pytest.raises(CheckpointError, match=sentence):
            read_folder(tmp_path)
