"""Saving behind the training, saves that fail, and resuming with another optimizer setting."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint import record
from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.checkpoint.load import load, newest_valid
from bd3_megatron.checkpoint.read import open_checkpoint, tensors
from bd3_megatron.checkpoint.save import Saver, save
from bd3_megatron.errors import CheckpointError
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import build, raw_state, same, steps, tiny
from tests.ranks.harness import run_ranks


def test_an_asynchronous_save_holds_the_state_of_its_step(tmp_path: Path) -> None:
    config = tiny(tp=2)

    def on_rank(topology: Topology) -> Any:
        engine = build(config, topology)
        steps(engine, 0, 1)
        facts: dict[str, Any] = {"step": 1, "samples_consumed": 4, "config": config, "train_state": {}}
        save(engine, tmp_path / "plain", **facts)
        background = Saver(engine, tmp_path / "background", asynchronous=True)
        background.save(**facts)
        # the originals change while the copies are written
        steps(engine, 1, 2)
        background.save(**(facts | {"step": 2}))
        steps(engine, 2, 3)
        background.finish()
        background.finish()

    run_ranks(on_rank, config.parallel)
    plain, background = (open_checkpoint(tmp_path / name / step_name(1)) for name in ("plain", "background"))
    for kind in plain.kinds():
        for (name, one), (_, other) in zip(tensors(plain, kind), tensors(background, kind), strict=True):
            assert torch.equal(one, other), (name, kind)
    found = newest_valid(tmp_path / "background")
    assert found is not None and found[1].step == 2


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "behind"])
def test_a_failed_save_is_told_and_harms_nothing(asynchronous: bool, tmp_path: Path, monkeypatch: Any) -> None:
    config = tiny(dp=2)
    real = record.write_safetensors

    def on_rank(topology: Topology) -> Any:
        engine, told = build(config, topology), []
        facts: dict[str, Any] = {"samples_consumed": 12, "config": config, "train_state": {}}
        saver = Saver(engine, tmp_path, asynchronous=asynchronous, warn=told.append)
        steps(engine, 0, 1)
        saver.save(step=1, **facts)

        def breaks(*arguments: Any) -> Any:
            if topology.rank == 1:
                raise OSError("the disk went away")
            return real(*arguments)

        saver.finish()
        monkeypatch.setattr(record, "write_safetensors", breaks)
        saver.save(step=2, **facts)
        with pytest.raises(CheckpointError, match="rank 1 could not write|the disk went away"):
            saver.finish()
        monkeypatch.setattr(record, "write_safetensors", real)
        before = newest_valid(tmp_path)
        saver.save(step=3, **facts)
        saver.finish()
        after = newest_valid(tmp_path)
        assert before is not None and after is not None
        return len(told), before[1].step, after[1].step

    assert run_ranks(on_rank, config.parallel) == [(1, 1, 3), (0, 1, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", step_name(1), step_name(3)]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "behind"])
def test_no_rank_waits_for_one_whose_disk_takes_nothing_more(asynchronous: bool, tmp_path: Path) -> None:
    config = tiny(dp=2)

    def on_rank(topology: Topology) -> Any:
        engine = build(config, topology)
        saver = Saver(engine, tmp_path, asynchronous=asynchronous, write_timeout_seconds=6)
        # The system's own refusal, of this rank's sidecar too, by which the other would learn of it.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if topology.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
        saver.save(step=1, samples_consumed=4, config=config, train_state={})
        try:
            saver.finish()
        except CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    first, second = run_ranks(on_rank, config.parallel)
    assert first == second and "File too large" in first and "did not finish" not in first, first
    assert newest_valid(tmp_path) is None


def test_settings_named_anew_are_the_ones_that_hold(tmp_path: Path) -> None:
    """DeepSpeed's own loader would put the saved clip and weight decay back, silently."""
    config, changed = tiny(dp=2), tiny(dp=2, optim={"clip_grad_norm": 0.25, "weight_decay": 0.3, "betas": [0.8, 0.9]})

    def first(topology: Topology) -> None:
        engine = build(config, topology)
        steps(engine, 0, 1)
        save(engine, tmp_path, step=1, samples_consumed=4, config=config, train_state={})

    def second(topology: Topology) -> Any:
        engine = build(changed, topology)
        load(engine, tmp_path / step_name(1))
        groups = [(g["weight_decay"], tuple(g["betas"])) for g in engine.optimizer.param_groups]
        return engine.engine.gradient_clipping(), engine.engine.optimizer.clip_grad, groups

    run_ranks(first, config.parallel)
    assert run_ranks(second, changed.parallel) == [(0.25, 0.25, [(0.3, (0.8, 0.9)), (0.0, (0.8, 0.9))])] * 2


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path: Path) -> None:
    config, other = tiny(), tiny(tie=False)

    def first(topology: Topology) -> None:
        save(build(config, topology), tmp_path, step=0, samples_consumed=0, config=config, train_state={})

    def second(topology: Topology) -> Any:
        engine = build(other, topology)
        before = raw_state(engine)
        with pytest.raises(CheckpointError, match="holds no parameter 'output_layer.weight'; it is of another model"):
            load(engine, tmp_path / step_name(0))
        return same(before, raw_state(engine))

    run_ranks(first, config.parallel)
    assert run_ranks(second, other.parallel) == [[]]


def test_a_state_before_the_first_step_has_no_moments_and_loads(tmp_path: Path) -> None:
    config, other = tiny(dp=2), tiny(tp=2)

    def first(topology: Topology) -> Any:
        engine = build(config, topology)
        save(engine, tmp_path, step=0, samples_consumed=0, config=config, train_state={})
        return steps(engine, 0, 1)

    def second(topology: Topology) -> Any:
        engine = build(other, topology)
        load(engine, tmp_path / step_name(0))
        return steps(engine, 0, 1)

    record_, again = run_ranks(first, config.parallel)[0], run_ranks(second, other.parallel)[0]
    assert open_checkpoint(tmp_path / step_name(0)).kinds() == ["ema", "fp32"]
    assert torch.allclose(torch.tensor(record_), torch.tensor(again), rtol=0, atol=1e-6)
