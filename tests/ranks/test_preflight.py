"""The examination before the first step, by real ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bd3_megatron.config.load import load_config
from bd3_megatron.config.schema import Config, ParallelConfig
from bd3_megatron.errors import LaunchError, NodeFailure
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.process import preflight as preflight_module
from bd3_megatron.process.preflight import preflight
from tests.ranks.harness import run_ranks

ROOT = Path(__file__).resolve().parents[2]
GRID = ParallelConfig(tp=2, dp=2)
CPU_SECONDS = 1.0
"""Of one rank's processor: the clock's would grow with the machine's load."""


def config(folder: Path, *overrides: str) -> Config:
    return load_config(ROOT / "configs/debug_cpu.yaml", [f"run.dir={folder}/run", *overrides])


def test_healthy_ranks_pass_quickly_and_say_so_in_one_line(tmp_path: Path) -> None:
    def on_rank(topology: Topology) -> tuple[list[str], float]:
        said: list[str] = []
        started = time.process_time()
        preflight(config(tmp_path), topology, said.append)
        return said, time.process_time() - started

    told = run_ranks(on_rank, GRID)
    # rank 0 has all reports, and speaks
    assert [len(said) for said, _ in told] == [1, 0, 0, 0]
    assert told[0][0][0].startswith("preflight: 4 ranks on 1 node, matrix")
    assert "all-reduce tp" in told[0][0][0] and "dp" in told[0][0][0]
    assert max(seconds for _, seconds in told) < CPU_SECONDS
    assert list((tmp_path / "run").iterdir()) == [], "nothing is left behind"


def test_a_rank_of_a_node_with_another_folder_is_named_to_all_and_to_the_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_rank(topology: Topology) -> str:
        os.environ["SLURMD_NODENAME"] = f"n{topology.rank // 2}"
        os.environ["BD3_BAD_NODES"] = str(tmp_path / "bad_nodes")
        own = tmp_path / ("other" if topology.rank == 3 else "shared")
        with pytest.raises(NodeFailure) as caught:
            preflight(config(own), topology, lambda said: None)
        return str(caught.value)

    monkeypatch.setattr(preflight_module, "FOLDER_SECONDS", 0.5)
    sentences = run_ranks(on_rank, GRID)
    assert len(set(sentences)) == 1
    assert sentences[0].startswith("preflight: rank 3 on node n1 does not share the run folder with rank 0")
    assert "leave out node n1 (cluster.exclude, or submit with --exclude-bad)" in sentences[0]
    assert (tmp_path / "bad_nodes").read_text() == "n1\n"


def test_too_little_space_for_a_checkpoint_is_refused(tmp_path: Path) -> None:
    def on_rank(topology: Topology) -> str:
        huge = config(tmp_path, "model.vocab_size=100000000", "model.hidden_size=16384")
        with pytest.raises(LaunchError) as caught:
            preflight(huge, topology, lambda said: None)
        return str(caught.value)

    sentence = run_ranks(on_rank, ParallelConfig())[0]
    assert "GiB free but a checkpoint takes about" in sentence and sentence.endswith("choose another run.dir.")
