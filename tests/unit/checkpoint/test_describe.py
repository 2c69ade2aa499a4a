"""The commit is read from the checkout's own files, whatever form they are in."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.checkpoint import describe
from bd3_megatron.checkpoint.describe import software_versions, source_commit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkout(root: Path, monkeypatch: pytest.MonkeyPatch, head: str, files: dict[str, str]) -> None:
    (root / ".git").mkdir()
    for name, content in {"HEAD": head, **files}.items():
        (root / ".git" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / ".git" / name).write_text(content)
    monkeypatch.setattr(describe, "__file__", str(root / "package" / "inner" / "describe.py"))


@pytest.mark.parametrize(
    ("head", "files", "expected"),
    [
        (f"{COMMIT}\n", {}, COMMIT),
        ("ref: refs/heads/main\n", {"refs/heads/main": f"{COMMIT}\n"}, COMMIT),
        ("ref: refs/heads/main\n", {"packed-refs": f"# pack\n{COMMIT} refs/heads/main\n"}, COMMIT),
        ("ref: refs/heads/main\n", {"packed-refs": f"{COMMIT} refs/heads/other\n"}, None),
        ("ref: refs/heads/main\n", {}, None),
    ],
)
def test_the_commit_is_found(
    head: str, files: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tmp_path, monkeypatch, head, files)
    assert source_commit() == expected


@pytest.mark.parametrize(("noted", "expected"), [(f"{COMMIT}\n", COMMIT), ("\n", None)])
def test_a_launchers_copy_says_which_commit_it_is_of(
    noted: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(describe, "__file__", str(tmp_path / "package" / "inner" / "describe.py"))
    (tmp_path / "COMMIT").write_text(noted)
    assert source_commit() == expected


def test_without_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "__file__", str(tmp_path / "package" / "inner" / "describe.py"))
    assert source_commit() is None


def test_versions_of_what_writes_are_told() -> None:
    assert {"torch", "deepspeed", "megatron-core"} <= set(software_versions())
