"""Tensors are read one at a time from folders of one file or many; what an index promises must be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bd3_megatron.convert.plain_source import INDEX, SINGLE, FolderSource
from bd3_megatron.errors import CheckpointError, ConversionError


def indexed(folder: Path, weight_map: dict[str, str]) -> Path:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_one_file_or_many_hold_the_same(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    save_file(tensors, tmp_path / "one" / SINGLE)
    save_file({"a": tensors["a"]}, tmp_path / "many" / "x.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "many" / "y.safetensors")
    indexed(tmp_path / "many", {"a": "x.safetensors", "b": "y.safetensors"})
    for name in ("one", "many"):
        source = FolderSource(tmp_path / name)
        assert sorted(source.names()) == ["a", "b"] and source.shape("b") == (2, 3)
        assert all(torch.equal(source.tensor(key), tensor) for key, tensor in tensors.items())
        with pytest.raises(ConversionError, match="tensor 'c' is missing in"):
            source.tensor("c")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors"])
def test_an_index_does_not_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        FolderSource(indexed(tmp_path / "inner", {"a": name}))


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model.safetensors and no"):
        FolderSource(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="lacks 'b', which the index names"):
        FolderSource(indexed(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        FolderSource(indexed(tmp_path, {"a": "y.safetensors"}))
    for content in ("{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]", "null", "[" * 100_000):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(CheckpointError, match="has no weight_map; copy|is damaged .*; copy the folder again"):
            FolderSource(tmp_path)
