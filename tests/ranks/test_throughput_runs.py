"""What real runs record of their speed: where the time went, and the figures of the documents that were trained on."""

from __future__ import annotations

import json
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.config.load import replace_field
from bd3_megatron.cost.pairs import attended_pairs, mean_pairs
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.planner.peaks import PeakTflops
from bd3_megatron.report.run_record import read_run
from bd3_megatron.train.batches import StepBatch, StepBatches
from bd3_megatron.train.build import build_trainer
from bd3_megatron.train.throughput import figures
from bd3_megatron.train.timeline import Timeline
from tests.ranks.harness import run_ranks
from tests.ranks.train_runs import BATCH, LENGTH, train, train_config, write_data
from tests.unit.data.corpora import documents, write_split

DELAY_SECONDS = 1000.0
"""By the timeline's clock, which is put forward: nobody waits, and no other load looks like it."""
STEPS = 9
"""Odd ones read late; the first, which warms up, is among them."""


def _records(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if "time/step_seconds" in line]


def _columns(record: dict[str, Any]) -> dict[str, float]:
    """{kind: seconds} of one step."""
    kinds = {k: v for k, v in record.items() if k.startswith("time/") and k.endswith("_seconds")}
    return {k: v for k, v in kinds.items() if "pause" not in k and k not in ("time/step_seconds",)}


def test_a_data_delay_shows_as_data_wait_and_nowhere_else(tmp_path: Path) -> None:
    config = train_config(write_data(tmp_path / "data"), tmp_path / "run", train={"steps": STEPS})

    def on_rank(topology: Topology) -> None:
        prompt, delays = StepBatches.next, [0.0]
        # this process is the rank's own: what is changed in it ends with it
        Timeline.__init__.__kwdefaults__["clock"] = lambda: time.perf_counter() + sum(delays)
        trainer = build_trainer(config, topology)

        def late(self: StepBatches, step: int, *more: Any) -> StepBatch:
            # what is left of a delay once the step before could not hide it: the training thread waits for the batch
            if step % 2 == 0:
                delays.append(DELAY_SECONDS)
            return prompt(self, step, *more)

        StepBatches.next = late  # type: ignore[method-assign]
        trainer.run()

    run_ranks(on_rank, config.parallel)
    records = _records(tmp_path / "run")
    assert len(records) == STEPS
    for record in records:
        assert sum(_columns(record).values()) == pytest.approx(record["time/step_seconds"], rel=0.02)
    slow, quick = records[2::2], records[1::2]
    for kind in set.union(*(set(_columns(r)) for r in records)):
        more = min(r.get(kind, 0.0) for r in slow) - min(r.get(kind, 0.0) for r in quick)
        expected = DELAY_SECONDS if kind == "time/data_wait_seconds" else 0.0
        assert more == pytest.approx(expected, abs=DELAY_SECONDS / 100), kind
    assert min(r["time/data_wait_seconds"] for r in slow) >= DELAY_SECONDS


@pytest.mark.parametrize("parallel", [{}, {"dp": 2}, {"cp": 2}], ids=str)
def test_figures_count_the_documents_that_were_trained_on(parallel: dict[str, Any], tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_split(tmp_path / "data" / split, [documents(120, seed=1, longest=40)])
    config = train_config(tmp_path / "data", tmp_path / "run", train={"steps": 1}, parallel=parallel)
    train(replace_field(config, "data.packing", "isolated"))
    run = read_run(tmp_path / "run").config
    record = _records(tmp_path / "run")[0]
    rows = TokenDataset.open(
        tmp_path / "data" / "train", seq_len=LENGTH, packing="isolated", block_size=4, seed=run.run.seed
    )
    ids_BL = rows.batch_for(torch.arange(BATCH)).document_id_BL
    assert ids_BL is not None
    pairs = mean_pairs(
        [attended_pairs(LENGTH, 4, [len(list(run)) for _, run in groupby(row)]) for row in ids_BL.tolist()]
    )
    devices, seconds = config.parallel.world_size(), record["time/step_and_pause_seconds"]
    expected = figures(
        run, seconds, record["noise/masked_fraction"], devices, PeakTflops(1.0, "given"), pairs=pairs
    ).metrics()
    assert {key: record[key] for key in expected} == pytest.approx(expected)
    whole = figures(run, seconds, record["noise/masked_fraction"], devices, PeakTflops(1.0, "given")).metrics()
    assert all(record[f"throughput/{name}"] < whole[f"throughput/{name}"] for name in ("mfu", "mfu_min", "hfu"))


def test_measuring_costs_less_than_a_hundredth_of_a_small_step(tmp_path: Path) -> None:
    """Marks of a real step times the cost of one: the fastest of each, so that a busy machine does not decide."""
    config = train_config(write_data(tmp_path / "data"), tmp_path / "run", train={"steps": 4})

    def on_rank(topology: Topology) -> tuple[float, float]:
        trainer = build_trainer(config, topology)
        marks = 0
        real = trainer.timeline._mark

        def counted(owner: str) -> None:
            nonlocal marks
            marks += 1
            real(owner)

        trainer.timeline._mark = counted  # type: ignore[method-assign]
        trainer.run()
        return marks / config.train.steps, min(_cost_of_a_mark() for _ in range(20))  # type: ignore[operator]

    marks, seconds = run_ranks(on_rank, config.parallel)[0]
    fastest = min(record["time/step_seconds"] for record in _records(tmp_path / "run"))
    assert 0 < marks * seconds < 0.01 * fastest


def _cost_of_a_mark(spans: int = 500) -> float:
    """Seconds a mark takes, of those of a step of many spans, with the step's own share of the bookkeeping."""
    timeline = Timeline()
    start = time.perf_counter()
    timeline.start_step(1)
    for _ in range(spans):
        with timeline.span("forward"):
            pass
    timeline.end_step()
    timeline.finished()
    return (time.perf_counter() - start) / (2 * spans)


def test_a_cpu_is_measured_once_in_the_life_of_a_run(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    config = train_config(data, tmp_path / "run", train={"steps": 4}, throughput={"peak_tflops": None})
    (first,) = train(config, stop_after=2)
    (second,) = train(config)
    starts = [
        json.loads(line)
        for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()
        if '"event": "start"' in line
    ]
    assert len(starts) == 2 and first["state"]["cpu_peak"] == second["state"]["cpu_peak"]
    assert [s["throughput/peak_tflops"] for s in starts] == [first["state"]["cpu_peak"]["tflops"]] * 2
    assert "in fp32 measured once" in starts[0]["throughput/peak_source"]
