"""On the grid that saved it, a checkpoint continues the run bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint.load import load, newest_valid
from bd3_megatron.checkpoint.save import save
from bd3_megatron.config.schema import Config
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import build, raw_state, same, steps, tiny
from tests.ranks.harness import run_ranks

GRIDS = [
    {"tp": 2, "pp": 2, "sequence_parallel": True},
    {"dp": 2, "zero_stage": 3},
    pytest.param({"tp": 2, "dp": 2, "zero_stage": 3}, marks=pytest.mark.matrix),
    pytest.param({"dp": 2}, marks=pytest.mark.matrix),
    pytest.param({"dp": 2, "zero_stage": 2}, marks=pytest.mark.matrix),
]
BF16_GRIDS = [{"dp": 2}, pytest.param({"dp": 2, "zero_stage": 3}, marks=pytest.mark.matrix)]


def continued_run(config: Config, folder: Path, dtype: torch.dtype) -> Any:
    """2 steps, save, 2 more; then a fresh engine loads and does the same 2."""

    def on_rank(topology: Topology) -> Any:
        first = build(config, topology, dtype=dtype)
        steps(first, 0, 2)
        save(first, folder, step=2, samples_consumed=16, config=config, train_state={"note": [1, 2]})
        saved = raw_state(first)
        after = steps(first, 2, 4)
        second = build(config, topology, dtype=dtype)
        found = newest_valid(folder)
        assert found is not None
        manifest = load(second, found[0])
        loaded = raw_state(second)
        again = steps(second, 2, 4)
        ends = same(raw_state(first), raw_state(second))
        return (
            same(saved, loaded),
            after == again,
            ends,
            (manifest.step, manifest.samples_consumed, manifest.train_state),
        )

    return run_ranks(on_rank, config.parallel)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_resumed_run_is_bit_equal_on_its_own_grid(grid: dict[str, Any], tmp_path: Path) -> None:
    for differing, same_record, ends, facts in continued_run(tiny(**grid), tmp_path, torch.float32):
        assert (differing, same_record, ends) == ([], True, [])
        assert facts == (2, 16, {"note": [1, 2]})


@pytest.mark.parametrize("grid", BF16_GRIDS, ids=str)
def test_a_resumed_bf16_run_is_bit_equal(grid: dict[str, Any], tmp_path: Path) -> None:
    for differing, same_record, ends, _ in continued_run(tiny(**grid), tmp_path, torch.bfloat16):
        assert (differing, same_record, ends) == ([], True, [])
