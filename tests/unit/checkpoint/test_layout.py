"""The manifest is read strictly: what it says must be complete, of a known version, and inside its folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bd3_megatron.checkpoint.layout import (
    MANIFEST,
    MANIFEST_DIGEST,
    VERSION,
    FileRecord,
    Manifest,
    checkpoint_folders,
    digest_bytes,
    inside,
    manifest_bytes,
    parse_manifest,
    read_manifest,
    step_name,
    step_of,
)
from bd3_megatron.errors import CheckpointError


def manifest() -> Manifest:
    return Manifest(
        step=30,
        samples_consumed=240,
        grid={"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
        zero_stage=1,
        world_size=1,
        config={"model": {}},
        git_commit=None,
        seeds={"run": 1},
        vocab_size=61,
        mask_id=60,
        train_state={"interval": [0.1, 0.9]},
        files={"deepspeed/a.pt": FileRecord(3, "00")},
    )


def written(folder: Path, content: bytes) -> Path:
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_DIGEST).write_bytes(f"{digest_bytes(content)}\n".encode())
    return folder


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_manifest(written(tmp_path, manifest_bytes(manifest()))) == manifest()


def test_a_manifest_is_guarded_by_its_digest(tmp_path: Path) -> None:
    written(tmp_path, manifest_bytes(manifest()))
    (tmp_path / MANIFEST).write_bytes(manifest_bytes(replace(manifest(), step=31)))
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": VERSION + 1}, "use a newer bd3_megatron"),
        ({"version": None}, "has no version"),
        ({"surprise": 1}, "lacks fields or has unknown ones"),
        ({"files": {"a": 3}}, "describes its files wrongly"),
        ({"files": {"../a": {"bytes": 1, "sha256": ""}}}, "leaves the folder"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}, "leaves the folder"),
        ({"files": {"a/../../b": {"bytes": 1, "sha256": ""}}}, "leaves the folder"),
    ],
)
def test_a_wrong_manifest_is_refused(change: dict[str, object], match: str, tmp_path: Path) -> None:
    tree = json.loads(manifest_bytes(manifest())) | change
    with pytest.raises(CheckpointError, match=match):
        parse_manifest(json.dumps(tree).encode(), tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_manifest_that_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not JSON|has no version"):
        parse_manifest(content, tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "outside").write_text("x")
    (folder / "a.pt").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        inside(folder, "a.pt")
    assert inside(folder, "deepspeed/b.pt") == folder / "deepspeed/b.pt"


def test_folders_are_tried_from_the_newest(tmp_path: Path) -> None:
    for name in (
        "step_00000009",
        "step_123456789",
        "step_00000010.replaced",
        "step_00000010",
        ".tmp_step_00000011",
        "x",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000012").write_text("a file")
    assert [p.name for p in checkpoint_folders(tmp_path)] == [
        "step_123456789",
        "step_00000010",
        "step_00000010.replaced",
        "step_00000009",
    ]


def test_step_names_sort_like_steps() -> None:
    assert step_name(30) == "step_00000030" and step_of("step_00000030") == 30
    assert step_of("step_30") is None and step_of("step_00000030.universal") is None
