"""Real checkpoints to spoil: two steps of a tiny two-rank run, made once and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bd3_megatron.checkpoint.save import save
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import build, steps, tiny
from tests.ranks.harness import run_ranks


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoints folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    config = tiny(layers=4, dp=2)

    def on_rank(topology: Topology) -> None:
        engine = build(config, topology)
        for step in (1, 2):
            steps(engine, step - 1, step)
            save(engine, folder, step=step, samples_consumed=4 * step, config=config, train_state={"step": step})

    run_ranks(on_rank, config.parallel)
    return folder


@pytest.fixture
def checkpoints(saved_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(saved_run, tmp_path / "run" / "checkpoints")
