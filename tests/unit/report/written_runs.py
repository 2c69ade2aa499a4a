"""Run folders written for tests of reports: a resolved config.yaml and a metrics.jsonl with chosen numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bd3_megatron.config.load import dump_config
from tests.unit.cost.cases import case


def step_record(step: int, time: float, seconds: float, *, tokens_per_second: float, **more: Any) -> dict[str, Any]:
    """A step record with the keys a trainer writes."""
    split = {"forward": 0.3, "backward": 0.5, "optimizer": 0.1, "data_wait": 0.06, "other": 0.04}
    record: dict[str, Any] = {
        "step": step,
        "time": time,
        "tokens": step * 256,
        "throughput/data_tokens_per_second": tokens_per_second,
        "throughput/model_tflops_per_second": tokens_per_second / 1e4,
        "throughput/mfu": 0.4,
        "throughput/mfu_min": 0.35,
        "throughput/hfu": 0.38,
        "memory/peak_bytes": 3 * 2**30,
        "time/step_seconds": seconds,
    }
    record |= {f"time/{kind}_seconds": share * seconds for kind, share in split.items()}
    return record | more


def start_record(time: float, world_size: int, **grid: int) -> dict[str, Any]:
    """What an attempt begins with."""
    return {"event": "start", "time": time, "world_size": world_size, "grid": grid}


def write_run(folder: Path, records: list[dict[str, Any]], *, tail: str = "", **sections: dict[str, Any]) -> Path:
    """Write a run folder; `tail` is appended raw after the last record."""
    folder.mkdir(parents=True)
    dump_config(case(**sections), folder / "config.yaml")
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")
    return folder


def steady_run(folder: Path, devices: int, *, seconds: float = 2.0, batch: int = 8, **sections: dict[str, Any]) -> Path:
    """40 steps logged every 10 by one attempt that began at time 1000, the first 10 slower."""
    rate = batch * 32 / seconds
    records = [start_record(1000.0, devices, tp=1, pp=1, vpp=1, cp=1, dp=devices)]
    for number in range(1, 5):
        slow = 1.5 if number == 1 else 1.0
        records.append(step_record(10 * number, 1000.0 + 25 * number, seconds * slow, tokens_per_second=rate / slow))
    train = {"steps": 40, "global_batch_size": batch}
    return write_run(folder, records, train=train, parallel={"dp": devices}, **sections)
