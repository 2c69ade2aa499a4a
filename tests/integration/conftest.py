"""Fixtures of tests that use whole programs: a SLURM for the session, and tokens made once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.slurm_client import ROOT, Slurm
from tests.integration.slurm_lab import SlurmLab, missing_programs


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    """Four nodes. Skips with the remedy where SLURM is absent, and fails instead when REQUIRE_SLURM=1."""
    absent = missing_programs()
    if absent is not None and os.environ.get("REQUIRE_SLURM") == "1":
        pytest.fail(absent)
    if absent is not None:
        pytest.skip(absent)
    with SlurmLab(tmp_path_factory.mktemp("slurm"), layout=os.environ.get("SLURM_LAB_LAYOUT", "auto")) as lab:
        yield lab


@pytest.fixture
def slurm(lab: SlurmLab, tmp_path: Path) -> Iterator[Slurm]:
    """The cluster for one test, which leaves no job."""
    client = Slurm(lab, tmp_path, [])
    yield client
    client.cancel_all()


@pytest.fixture(scope="session")
def byte_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of the debug run's text, made once."""
    folder = tmp_path_factory.mktemp("data") / "bytes"
    tool = [sys.executable, str(ROOT / "tools/prepare_data.py"), "--builtin", "python-topics", "--tokenizer", "bytes"]
    subprocess.run([*tool, "--out", str(folder), "--quiet"], check=True, capture_output=True, timeout=300)
    return folder
