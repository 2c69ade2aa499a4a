"""A checkpoint continues on any other grid: the state is equal to the last bit, and the run goes on as if undisturbed.

The default suite goes once through a chain of grids in which every way of cutting is both left and entered; every
ordered pair is behind the marker `matrix`.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint.layout import UNIVERSAL_SUFFIX, step_name
from bd3_megatron.checkpoint.load import load, newest_valid
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.checkpoint.save import save
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import build, steps, tiny
from tests.ranks.harness import run_ranks
from tests.tolerances import RESUMED

Grid = dict[str, Any]
LAYERS = 4
"""As many as the grid with the most stages needs."""
CHAIN: list[Grid] = [
    {"tp": 2, "dp": 2, "sequence_parallel": True},
    {"pp": 2, "vpp": 2},
    {"tp": 2, "dp": 2, "zero_stage": 3},
    {"cp": 2, "zero_stage": 2},
    {"dp": 2},
    {},
]
MATRIX: list[Grid] = [
    {},
    {"dp": 4},
    {"tp": 2, "dp": 2, "sequence_parallel": True},
    {"pp": 4},
    {"pp": 2, "vpp": 2, "dp": 2},
    {"cp": 2, "tp": 2, "pp": 2},
    {"tp": 2, "pp": 2, "dp": 2, "sequence_parallel": True},
    {"dp": 2, "zero_stage": 2},
    {"tp": 2, "dp": 2, "zero_stage": 3},
]


def first_run(grid: Grid, folder: Path, **shape: Any) -> list[tuple[float, float]]:
    """2 steps and a save, then 7 more undisturbed; their record."""
    config = tiny(layers=LAYERS, **grid, **shape)

    def on_rank(topology: Topology) -> list[tuple[float, float]]:
        engine = build(config, topology)
        steps(engine, 0, 2)
        save(engine, folder, step=2, samples_consumed=8, config=config, train_state={})
        return steps(engine, 2, 9)

    return run_ranks(on_rank, config.parallel, timeout=300.0)[0]


def hop(grid: Grid, folder: Path, first: int, count: int, **shape: Any) -> list[tuple[float, float]]:
    """Load the newest, save it again unchanged beside, do `count` steps and save; their record."""
    config = tiny(layers=LAYERS, **grid, **shape)

    def on_rank(topology: Topology) -> list[tuple[float, float]]:
        engine = build(config, topology)
        found = newest_valid(folder)
        assert found is not None and found[1].step == first
        load(engine, found[0])
        save(engine, folder / "again", step=first, samples_consumed=4 * first, config=config, train_state={})
        record = steps(engine, first, first + count)
        save(engine, folder, step=first + count, samples_consumed=4 * (first + count), config=config, train_state={})
        return record

    return run_ranks(on_rank, config.parallel, timeout=300.0)[0]


def differing(first: Path, second: Path) -> list[str]:
    """Whole tensors of two checkpoints that are not equal to the bit."""
    one, two = open_checkpoint(first), open_checkpoint(second)
    assert one.names() == two.names() and one.kinds() == two.kinds() == ["ema", "exp_avg", "exp_avg_sq", "fp32"]
    assert one.manifest.engine == two.manifest.engine
    found = [(name, kind) for name in one.names() for kind in one.kinds()]
    found += [(name, "fp32") for name in one.bias_names()]
    assert one.bias_names() == two.bias_names()
    return [f"{n}/{k}" for n, k in found if not torch.equal(one.tensor(n, k), two.tensor(n, k))]


def check_record(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=0, atol=RESUMED), (found, expected)


@pytest.mark.timeout(600)
def test_a_run_goes_on_through_a_chain_of_grids(tmp_path: Path) -> None:
    expected = first_run(CHAIN[0], tmp_path)
    for number, grid in enumerate(CHAIN[1:]):
        step = number + 2
        count = 1 if step < 9 else 0
        check_record(hop(grid, tmp_path, step, count), expected[number : number + count])
        assert differing(tmp_path / step_name(step), tmp_path / "again" / step_name(step)) == [], grid


@pytest.mark.matrix
@pytest.mark.timeout(300)
def test_the_papers_style_changes_its_grid_too(tmp_path: Path) -> None:
    expected = first_run({"tp": 2}, tmp_path, style="paper")
    check_record(hop({"pp": 2}, tmp_path, 2, 2, style="paper"), expected[:2])
    assert differing(tmp_path / step_name(2), tmp_path / "again" / step_name(2)) == []


@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_every_grid_goes_on_from_every_other(tmp_path: Path, tie: bool) -> None:
    records = {number: first_run(grid, tmp_path / str(number), tie=tie) for number, grid in enumerate(MATRIX)}
    worst = 0.0
    for source, target in permutations(range(len(MATRIX)), 2):
        folder = tmp_path / f"{source}-{target}"
        folder.mkdir()
        for name in (step_name(2), step_name(2) + UNIVERSAL_SUFFIX):
            if (tmp_path / str(source) / name).exists():
                (folder / name).symlink_to(tmp_path / str(source) / name)
        record = hop(MATRIX[target], folder, 2, 5, tie=tie)
        expected = records[source][:5]
        worst = max(
            worst, *(abs(a - b) for x, y in zip(record, expected, strict=True) for a, b in zip(x, y, strict=True))
        )
        check_record(record, expected)
        assert differing(folder / step_name(2), folder / "again" / step_name(2)) == [], (MATRIX[source], MATRIX[target])
    print(f"{len(MATRIX)} grids, all ordered pairs: largest difference {worst:.2e}")
