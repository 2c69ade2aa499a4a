"""Bytes are hashed as they are written; what others read back is what was recorded."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bd3_megatron.checkpoint import files
from bd3_megatron.checkpoint.files import (
    check_space,
    record_of,
    stream_safetensors,
    tensor_bytes,
    write_safetensors,
    write_torch,
)
from bd3_megatron.checkpoint.restricted_pickle import open_pt
from bd3_megatron.errors import CheckpointError


def test_records_are_of_what_is_on_the_disk(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.empty(0, 4)}
    assert write_torch(tmp_path / "deep" / "x.pt", tensors) == record_of(tmp_path / "deep" / "x.pt")
    assert write_safetensors(tmp_path / "x.safetensors", tensors, {"k": "v"}) == record_of(tmp_path / "x.safetensors")
    assert torch.equal(open_pt(tmp_path / "deep" / "x.pt")["a"], tensors["a"])
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"k": "v"} and set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_a_streamed_tensor_must_be_as_announced(tmp_path: Path) -> None:
    specs = {"a": (torch.float32, (2, 2))}
    with pytest.raises(ValueError, match=r"a is torch.float32 \[4\], announced as torch.float32 \[2, 2\]"):
        stream_safetensors(tmp_path / "x", specs, lambda _: torch.zeros(4), {})


def test_a_full_disk_is_seen_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(10, 9, 2**30))
    check_space(tmp_path, 2**29)
    with pytest.raises(CheckpointError, match="has 1.00 GiB free and a checkpoint needs 2.10 GiB; free some space"):
        check_space(tmp_path, 2**31)


def test_shared_storages_are_counted_once() -> None:
    flat = torch.zeros(100)
    assert tensor_bytes([{"a": flat[:50], "b": [flat[50:], (torch.zeros(5),)]}, 3, "text"]) == 400 + 20
