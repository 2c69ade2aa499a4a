"""The manifest is read strictly: what it says must be complete, of a known version, and inside its folder."""

from __future__ import annotations

import json
from dataclasses import fields, replace
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
    rank_name,
    read_manifest,
    step_name,
    step_of,
)
from bd3_megatron.checkpoint.manifest_fields import MANIFEST_FIELDS
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
        files={"deepspeed/a.pt": FileRecord(3, "0" * 64), rank_name(0): FileRecord(5, "1" * 64)},
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
        ({"surprise": 1}, "has the unknown field 'surprise'; use a newer bd3_megatron"),
        ({"step": True}, r"step=True must be a whole number from 0 to 2\*\*53; use another checkpoint"),
        ({"step": 10**400}, r"step=10{70,79}\.\.\. must be a whole number"),
        ({"samples_consumed": 1.5}, "samples_consumed=1.5 must be a whole number"),
        ({"grid": {"tp": 1}}, "grid=.* must be sizes from 1 to .* of the axes tp, pp, vpp, cp, dp"),
        ({"world_size": 2**60}, "world_size=1152921504606846976 must be a whole number from 1 to"),
        ({"world_size": 2}, r"world_size=2 is not tp\*pp\*cp\*dp=1 of its grid"),
        ({"config": {"data": {}}}, "config=.* must be sections of settings, model among them"),
        ({"mask_id": 61}, "mask_id=61 lies outside the vocabulary of 61"),
        ({"seeds": {}}, r"seeds=\{\} must be whole numbers by name, that of the run among them"),
        ({"seeds": {"run": 1.5}}, "must be whole numbers by name"),
        ({"config": {"model": {}, "run": {"seed": 2}}}, "seeds.run=1 and config.run.seed=2 differ; use another"),
        ({"train_state": {"step": 29}}, "step=30 and train_state.step=29 differ"),
        ({"train_state": {"samples_consumed": 5}}, "samples_consumed=240 and train_state.samples_consumed=5 differ"),
        ({"config": {"model": {}, "parallel": {"tp": 2}}}, "grid.tp=1 and config.parallel.tp=2 differ"),
        ({"samples_consumed": 5}, "samples_consumed=5 cannot be after step=30, since an update takes one sample or"),
        ({"step": 0}, "samples_consumed=240 cannot be after step=0"),
        ({"engine": {"adam_step": -1}}, "engine=.* must be numbers from 0 by name"),
        ({"kind": "other"}, "kind='other' must be sharded or whole"),
        ({"kind": "whole"}, "lists no complete checkpoint: weights are not among its 2 files"),
        ({"files": {}}, r"files=\{\} must be size and SHA-256 of one file or more"),
        ({"files": {"a": 3}}, "must be size and SHA-256"),
        ({"files": {"a": {"bytes": 1, "sha256": "0" * 64}}}, "the sidecars of 1 rank are not among its 1 file"),
        ({"files": {"../a": {"bytes": 1, "sha256": "0" * 64}}}, "leaves the folder"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "leaves the folder"),
        ({"files": {"a/../../b": {"bytes": 1, "sha256": "0" * 64}}}, "leaves the folder"),
        ({"files": {"a\0b": {"bytes": 1, "sha256": "0" * 64}}}, "is no plain name"),
    ],
)
def test_a_wrong_manifest_is_refused(change: dict[str, object], match: str, tmp_path: Path) -> None:
    tree = json.loads(manifest_bytes(manifest())) | change
    with pytest.raises(CheckpointError, match=match):
        parse_manifest(json.dumps(tree).encode(), tmp_path)


def test_every_field_has_a_law() -> None:
    assert set(MANIFEST_FIELDS) == {f.name for f in fields(Manifest)}


def test_a_manifest_without_a_field_is_refused_unless_the_field_is_younger(tmp_path: Path) -> None:
    tree = json.loads(manifest_bytes(manifest()))
    for name in ("engine", "software", "origin", "kind"):
        del tree[name]
    assert parse_manifest(json.dumps(tree).encode(), tmp_path) == manifest()
    del tree["mask_id"]
    with pytest.raises(CheckpointError, match="lacks the field mask_id"):
        parse_manifest(json.dumps(tree).encode(), tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
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
