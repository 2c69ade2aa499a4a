"""What is published is whole, what is deleted goes at once, and what must stay stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.checkpoint.layout import LATEST, read_manifest, step_name
from bd3_megatron.checkpoint.publish import delete_old, publish, publish_files, sweep
from bd3_megatron.checkpoint.verify import newest_valid
from bd3_megatron.errors import CheckpointError
from bd3_megatron.files import temporary_name


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def with_steps(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / step_name(step)).mkdir()
    return folder


def test_the_newest_and_every_nth_stay(tmp_path: Path) -> None:
    with_steps(tmp_path, 10, 20, 30, 40, 50, 60)
    for step in (10, 20, 50):
        (tmp_path / f"{step_name(step)}.universal").mkdir()
    gone = delete_old(tmp_path / step_name(50), keep_last=2, keep_every_steps=20)
    assert [p.name for p in gone] == [step_name(30), step_name(10)]
    # 60 is of an abandoned future: not counted, not touched
    assert folders(tmp_path) == [
        step_name(20),
        step_name(40),
        step_name(50),
        f"{step_name(50)}.universal",
        step_name(60),
    ]


def test_the_newest_one_known_to_be_finite_stays(tmp_path: Path) -> None:
    with_steps(tmp_path, 10, 20, 30, 40)
    delete_old(tmp_path / step_name(40), keep_last=1, keep_every_steps=0, finite_step=29)
    assert folders(tmp_path) == [step_name(20), step_name(40)]
    delete_old(tmp_path / step_name(40), keep_last=1, keep_every_steps=0, finite_step=19)
    assert folders(tmp_path) == [step_name(40)]


def test_none_is_deleted_without_a_limit_and_never_the_last(tmp_path: Path) -> None:
    with_steps(tmp_path, 1, 2, 3)
    assert delete_old(tmp_path / step_name(3), keep_last=0, keep_every_steps=0) == []
    delete_old(tmp_path / step_name(1), keep_last=1, keep_every_steps=0)
    assert folders(tmp_path) == [step_name(s) for s in (1, 2, 3)]
    delete_old(tmp_path / step_name(3), keep_last=1, keep_every_steps=0)
    assert folders(tmp_path) == [step_name(3)]


def test_leftovers_are_swept(tmp_path: Path) -> None:
    with_steps(tmp_path, 1)
    host = temporary_name(tmp_path / "a").name.split(".")[2]
    # no process has this number: it is beyond Linux's largest
    for name in (".tmp_step_00000002", f".step_00000001.{host}.{2**22 + 1}.01234567.tmp", ".other"):
        (tmp_path / name / "inner").mkdir(parents=True)
    sweep(tmp_path)
    assert folders(tmp_path) == [".other", step_name(1)]


def test_a_repeated_step_replaces_the_torn_one(checkpoints: Path) -> None:
    good = checkpoints / step_name(2)
    manifest = read_manifest(good)
    temporary = good.rename(checkpoints / ".tmp_step_00000002")
    with_steps(checkpoints, 2)
    (good / "manifest.json").write_text("{}")
    (checkpoints / f"{step_name(2)}.universal").mkdir()
    (temporary / "zero_to_fp32.py").write_text("print('a script that loads pickles')")
    assert publish_files(temporary, manifest) == good
    assert folders(checkpoints) == [step_name(1), step_name(2)]
    assert (checkpoints / LATEST).read_text() == f"{step_name(2)}\n"
    assert not (good / "zero_to_fp32.py").exists()
    found = newest_valid(checkpoints)
    assert found is not None and found[0] == good


def test_a_rank_that_failed_or_is_late_spoils_the_save_only(checkpoints: Path) -> None:
    manifest = read_manifest(checkpoints / step_name(2))
    temporary = checkpoints / ".tmp_step_00000003"
    temporary.mkdir()
    with pytest.raises(
        CheckpointError, match="rank 0 did not finish writing .* in 0 s; earlier checkpoints are intact"
    ):
        publish(temporary, manifest, timeout_seconds=0.0)
    (temporary / "rank_00000.json").write_text('{"error": "OSError: disk full"}')
    with pytest.raises(
        CheckpointError, match=r"rank 0 could not write .*\(OSError: disk full\); earlier ones are intact"
    ):
        publish(temporary, manifest, timeout_seconds=0.0)
    found = newest_valid(checkpoints)
    assert found is not None and found[1].step == 2
