"""Real checkpoints to spoil: two steps of a tiny two-rank run, made once and copied for each test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.checkpoint.layout import MANIFEST, MANIFEST_DIGEST, digest_bytes
from bd3_megatron.checkpoint.save import save
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import BATCH, BLOCK, build, steps, tiny
from tests.ranks.harness import run_ranks


def publish_json(folder: Path, name: str, tree: dict[str, Any]) -> None:
    """Replace one JSON file of a checkpoint as somebody would who also recomputes every checksum."""
    manifest = json.loads((folder / MANIFEST).read_text()) if name != MANIFEST else tree
    if name != MANIFEST:
        content = json.dumps(tree).encode()
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": digest_bytes(content)}
    content = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(content)
    (folder / MANIFEST_DIGEST).write_text(f"{digest_bytes(content)}\n")


def state_at(step: int) -> dict[str, int]:
    """As the trainer leaves it: the run began at step 0."""
    return {
        "step": step,
        "samples_consumed": BATCH * step,
        "block_size": BLOCK,
        "origin_step": 0,
        "origin_samples": 0,
    }


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoints folder with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    config = tiny(layers=4, dp=2)

    def on_rank(topology: Topology) -> None:
        engine = build(config, topology)
        for step in (1, 2):
            steps(engine, step - 1, step)
            save(engine, folder, step=step, samples_consumed=BATCH * step, config=config, train_state=state_at(step))

    run_ranks(on_rank, config.parallel)
    return folder


@pytest.fixture
def checkpoints(saved_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(saved_run, tmp_path / "run" / "checkpoints")
