"""ruff and mypy are part of the suite: the tree is clean under both, with the settings of the dot files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run_module(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=root, capture_output=True, text=True)


def test_ruff_finds_nothing(root: Path) -> None:
    done = run_module(root, "ruff", "check", "--output-format", "concise", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_would_lay_out_nothing_anew(root: Path) -> None:
    done = run_module(root, "ruff", "format", "--check", ".")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_mypy_finds_nothing(root: Path) -> None:
    done = run_module(root, "mypy", "--config-file", ".mypy.ini")
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_parse(root: Path) -> None:
    for script in shell_scripts(root):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert done.returncode == 0, f"{script}: {done.stderr}"


def test_shellcheck_finds_nothing(root: Path) -> None:
    try:
        done = subprocess.run(["shellcheck", *map(str, shell_scripts(root))], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed")
    assert done.returncode == 0, done.stdout


def shell_scripts(root: Path) -> list[Path]:
    return [root / ".ci/run", *sorted((root / "launch").glob("*.sh")), *sorted((root / "tests").glob("*.sh"))]
