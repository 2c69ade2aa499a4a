"""Imported weights start a run on any grid: the same tensors everywhere, zero moments, an average that starts at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint.layout import Manifest, step_name
from bd3_megatron.checkpoint.load import load
from bd3_megatron.checkpoint.read import open_checkpoint
from bd3_megatron.checkpoint.save import save
from bd3_megatron.checkpoint.whole import write_whole
from bd3_megatron.config.load import to_tree
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import VOCAB, build, steps, tiny
from tests.ranks.harness import run_ranks


@pytest.mark.parametrize("grid", [{"tp": 2, "pp": 2}, {"dp": 2, "zero_stage": 3}], ids=str)
def test_a_whole_checkpoint_loads_on_any_grid(grid: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(**grid)

    def on_rank(topology: Topology) -> Any:
        engine = build(config, topology)
        if topology.rank == 0:
            write_imported(tmp_path / step_name(0), names_and_shapes())
        torch.distributed.barrier()
        # a used engine too takes the state over completely
        steps(engine, 0, 1)
        manifest = load(engine, tmp_path / step_name(0))
        save(engine, tmp_path / "again", step=0, samples_consumed=0, config=config, train_state={})
        return manifest.origin, engine.ema is not None and engine.ema.num_updates

    def names_and_shapes() -> dict[str, tuple[int, ...]]:
        reader = open_checkpoint(shapes_of)
        return {name: reader.shape(name) for name in reader.names()}

    def write_imported(out: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(5)
        single = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1}
        manifest = Manifest(
            step=0,
            samples_consumed=0,
            grid=single,
            zero_stage=1,
            world_size=1,
            config=to_tree(config),
            git_commit=None,
            seeds={"run": config.run.seed},
            vocab_size=VOCAB,
            mask_id=VOCAB - 1,
            train_state={},
            origin={"model_type": "test"},
        )
        write_whole(out, manifest, shapes, lambda name: torch.randn(shapes[name], generator=generator))

    shapes_of = one_rank_checkpoint(tmp_path / "shapes")
    assert run_ranks(on_rank, config.parallel)[0] == ({"model_type": "test"}, 0)
    source, found = open_checkpoint(tmp_path / step_name(0)), open_checkpoint(tmp_path / "again" / step_name(0))
    for name in source.names():
        assert torch.equal(source.tensor(name), found.tensor(name)), name
        assert torch.equal(source.tensor(name), found.tensor(name, "ema")), name
        assert not found.tensor(name, "exp_avg").count_nonzero(), name


def one_rank_checkpoint(folder: Path) -> Path:
    """What the model's parameters are called and how large they are."""
    config = tiny()

    def on_rank(topology: Topology) -> None:
        save(build(config, topology), folder, step=0, samples_consumed=0, config=config, train_state={})

    run_ranks(on_rank, config.parallel)
    return folder / step_name(0)
