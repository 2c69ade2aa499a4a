"""Between the first forward of a step and its record the host asks the device for nothing, and a late answer is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.build import build_trainer
from bd3_megatron.train.trainer import read_lag
from tests.ranks.harness import run_ranks
from tests.ranks.test_not_finite import planted
from tests.ranks.train_runs import BATCH, train_config, write_data
from tools.bench.counts import HOST_READS, StepCounts, bytes_a_parameter, step_counts
from tools.bench.host_reads import HostReads


def counts_of_ranks(folder: Path, **sections: dict[str, Any]) -> list[StepCounts]:
    sections["train"] = {"steps": 3} | sections.get("train", {})
    config = train_config(write_data(folder / "data", longest_document=40), folder / "run", **sections)
    return run_ranks(lambda topology: step_counts(build_trainer(config, topology)), config.parallel)


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"precision": "bf16"}},
        {"parallel": {"dp": 2}, "data": {"packing": "isolated"}, "optim": {"clip_grad_norm": 0.1}},
        {"parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}},
    ],
    ids=str,
)
def test_a_step_asks_the_device_for_nothing(sections: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    assert all(found.host_reads == {} for found in counts_of_ranks(tmp_path, **sections))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_stage_of_zero_asks_is_what_the_table_says(stage: int, tmp_path: Path) -> None:
    one_micro_batch = {"precision": "bf16", "micro_batch_size": BATCH // 2}
    for found in counts_of_ranks(tmp_path, parallel={"dp": 2, "zero_stage": stage}, train=one_micro_batch):
        assert found.host_reads == HOST_READS[stage]
        # norms and sums of a few bytes, and under ZeRO 3 DeepSpeed's broadcasts of names, on a model of 28,000 elements
        assert (
            bytes_a_parameter(zero_stage=stage) <= found.bytes_a_parameter < bytes_a_parameter(zero_stage=stage) + 0.05
        )


def test_reads_are_noticed() -> None:
    """The counter sees every way of asking, and only on what descends from the device."""
    device, host = torch.ones(4), torch.ones(4)
    ways = [
        lambda t: float(t.sum()),
        lambda t: bool((t > 0).all()),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: (t > 0).nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.zeros(4).copy_(t)[0].item(),
    ]
    reads = HostReads([device])
    with reads.counting():
        for way in ways:
            way(host)
        assert not reads.found
        for way in ways:
            way(device)
    assert sum(reads.found.values()) == len(ways)


@pytest.mark.parametrize(("device", "guard", "lag"), [("cuda", 0.0, 1), ("cuda", 3.0, 0), ("cpu", 0.0, 0)])
def test_a_gpu_is_read_one_step_late_unless_a_guard_asks_in_between(device: str, guard: float, lag: int) -> None:
    assert read_lag(device, guard) == lag


def test_an_answer_read_late_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, one step late, an update that is left out among them: record and state do not change."""
    data = write_data(tmp_path / "data")

    def run(lag: int) -> tuple[Any, list[dict[str, Any]]]:
        config = train_config(
            data,
            tmp_path / f"lag{lag}",
            train={"steps": 6},
            checkpoint={"every_steps": 4},
            log={"every_steps": 2},
            parallel={"dp": 2},
        )

        def on_rank(topology: Topology) -> Any:
            trainer = build_trainer(config, topology)
            trainer.lag_steps = lag
            assert trainer.run() == "finished"
            return {**trainer.state.to_json(), "wandb_id": None}

        with planted(monkeypatch, "gradient", [3], value=float("nan")):
            states = run_ranks(on_rank, config.parallel)
        lines = [json.loads(line) for line in (tmp_path / f"lag{lag}/metrics.jsonl").read_text().splitlines()]
        kernels = lines[0]["kernels"]
        assert kernels["optimizer"] == "torch AdamW, fused" and kernels.keys() >= {"attention", "rows"}
        sums = "gradients reduced to their owners in float32 during the last backward"
        assert kernels["communication"] == f"gloo, ZeRO 1, {sums}"
        kept = ("step", "tokens", "loss", "noise", "event", "optim/lr", "optim/grad_norm", "optim/skipped")
        return states, [{k: v for k, v in line.items() if k.startswith(kept)} for line in lines]

    late, at_once = run(1), run(0)
    assert repr(late) == repr(at_once)
    assert [line["step"] for line in at_once[1] if line.get("event") == "not_finite"] == [3]
