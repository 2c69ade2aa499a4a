"""A checkpoint of a mixture of experts goes on at its own grid and at others, expert-parallel ranks and biases included."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.checkpoint.read import open_checkpoint
from tests.ranks.test_checkpoint_elastic import check_record, differing, first_run, hop

EXPERTS = {"number": 4, "top_k": 2, "width": 24, "shared_width": 16, "leading_dense_layers": 1, "score": "sigmoid"}
EXPERTS |= {"bias": True, "bias_rate": 0.01}
CHAIN: list[dict[str, Any]] = [
    {"ep": 2, "dp": 2},
    {"ep": 2, "dp": 2},
    {"ep": 4, "tp": 2, "sequence_parallel": True, "cp": 2},
    {"pp": 2},
]
MATRIX: list[dict[str, Any]] = [
    {},
    {"ep": 2, "dp": 4},
    {"ep": 4, "dp": 4},
    {"tp": 2, "sequence_parallel": True},
    {"tp": 2, "sequence_parallel": True, "ep": 2, "pp": 2},
    {"ep": 2, "cp": 2},
    {"ep": 2, "dp": 2, "pp": 2},
    {"ep": 4, "tp": 2, "sequence_parallel": True, "dp": 2},
]


@pytest.mark.timeout(300)
def test_a_run_with_experts_goes_on_through_a_chain_of_grids(tmp_path: Path) -> None:
    expected = first_run(CHAIN[0], tmp_path, experts=EXPERTS)
    stored = open_checkpoint(tmp_path / step_name(2))
    # a bias that never moved would prove nothing
    assert len(stored.bias_names()) == 3 and all(stored.tensor(name).count_nonzero() for name in stored.bias_names())
    for number, grid in enumerate(CHAIN[1:]):
        step = number + 2
        found = hop(grid, tmp_path, step, 1, experts=EXPERTS)
        check_record(found, expected[number : number + 1])
        # on the same grid bit for bit
        assert number or found == expected[:1]
        assert differing(tmp_path / step_name(step), tmp_path / "again" / step_name(step)) == [], grid


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_every_grid_with_experts_goes_on_from_every_other(tmp_path: Path) -> None:
    records = {n: first_run(grid, tmp_path / str(n), experts=EXPERTS) for n, grid in enumerate(MATRIX)}
    for source, target in permutations(range(len(MATRIX)), 2):
        folder = tmp_path / f"{source}-{target}"
        folder.mkdir()
        (folder / step_name(2)).symlink_to(tmp_path / str(source) / step_name(2))
        check_record(hop(MATRIX[target], folder, 2, 5, experts=EXPERTS), records[source][:5])
        assert differing(folder / step_name(2), folder / "again" / step_name(2)) == [], (MATRIX[source], MATRIX[target])
