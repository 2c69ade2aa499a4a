"""A checkpoint that is not exactly what was written is never used, and the one before it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.checkpoint.layout import LATEST, read_manifest, step_name
from bd3_megatron.checkpoint.verify import excess_files, newest_valid, problem_of, verify
from bd3_megatron.errors import CheckpointError
from tests.unit.checkpoint.conftest import state_at


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def newest_step(checkpoints: Path) -> int:
    found = newest_valid(checkpoints)
    assert found is not None
    return found[1].step


def test_an_intact_checkpoint_is_found(checkpoints: Path) -> None:
    found = newest_valid(checkpoints)
    assert found is not None
    path, manifest = found
    assert path.name == step_name(2) == (checkpoints / LATEST).read_text().strip()
    assert (manifest.step, manifest.samples_consumed, manifest.train_state) == (2, 8, state_at(2))
    assert excess_files(path, manifest) == []
    assert len(manifest.files) == len(files_of(path)) - 2


def test_a_flipped_bit_in_any_file_is_seen(checkpoints: Path) -> None:
    newest = checkpoints / step_name(2)
    for path in files_of(newest):
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
            assert newest_step(checkpoints) == 1, (path.name, place)
        path.write_bytes(content)
    assert newest_step(checkpoints) == 2


def test_a_truncated_or_longer_file_is_seen(checkpoints: Path) -> None:
    for path in files_of(checkpoints / step_name(2)):
        content = path.read_bytes()
        for other in (b"", content[:-1], content[: len(content) // 2], content + b"\0"):
            path.write_bytes(other)
            assert newest_step(checkpoints) == 1, (path.name, len(other))
        path.write_bytes(content)


def test_a_missing_file_is_seen(checkpoints: Path) -> None:
    for path in files_of(checkpoints / step_name(2)):
        content = path.read_bytes()
        path.unlink()
        assert newest_step(checkpoints) == 1, path.name
        path.write_bytes(content)


def test_what_is_skipped_is_said_once(checkpoints: Path) -> None:
    sidecar = checkpoints / step_name(2) / "rank_00001.json"
    sidecar.write_text(sidecar.read_text().replace("fp32", "fp16", 1))
    (checkpoints / step_name(1) / "manifest.json").unlink()
    said: list[str] = []
    assert newest_valid(checkpoints, warn=said.append) is None
    assert len(said) == 2
    assert said[0].startswith("skips checkpoint step_00000002: ") and "does not match its checksum" in said[0]
    assert said[1].startswith("skips checkpoint step_00000001: ") and "cannot be read" in said[1]


def test_the_pointer_is_a_convenience(checkpoints: Path) -> None:
    (checkpoints / LATEST).write_text("step_00000001\n")
    assert newest_step(checkpoints) == 2
    (checkpoints / LATEST).unlink()
    assert newest_step(checkpoints) == 2


def test_unfinished_folders_are_no_candidates(checkpoints: Path) -> None:
    (checkpoints / step_name(2)).rename(checkpoints / f".tmp_{step_name(2)}")
    assert newest_step(checkpoints) == 1


def test_a_folder_that_is_being_replaced_still_counts(checkpoints: Path) -> None:
    (checkpoints / step_name(2)).rename(checkpoints / f"{step_name(2)}.replaced")
    assert newest_step(checkpoints) == 2


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nowhere") is None


def test_verify_says_why(checkpoints: Path) -> None:
    path = checkpoints / step_name(2)
    assert verify(path) == read_manifest(path) and problem_of(path) is None
    (path / "rank_00000.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 0 bytes in place of .* torn"):
        verify(path)
