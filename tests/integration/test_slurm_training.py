"""Training through the shipped batch script on a real SLURM: the same losses as at home, and nothing lost on the way."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integration.slurm_client import AT_STEP, DEBUG, Slurm, last_step, losses, status

pytestmark = pytest.mark.slurm

STEPS = 8
"""Some before the stop, some after it."""
START_SECONDS = 240.0
"""Importing and joining on a busy machine."""


def overrides(tokens: Path) -> list[str]:
    fixed = ["watch.leak_check=false", "throughput.peak_tflops=1.0", "checkpoint.every_steps=20"]
    return [f"data.path={tokens}", f"train.steps={STEPS}", *fixed]


def a_second_launch_is_refused(slurm: Slurm, tokens: Path, profile: Path, holder: int) -> None:
    job = slurm.train(*overrides(tokens), profile=profile)
    assert slurm.wait(job, START_SECONDS)["JobState"] == "FAILED" and slurm.job(job)["Restarts"] == "0"
    held = rf"gives up: run.dir=.*/run is held by .*\(host n\d, process \d+, SLURM job {holder}, started"
    assert re.search(held, slurm.log(job)), slurm.log(job)


def test_two_nodes_told_to_stop_requeue_and_end_with_the_losses_of_a_local_run(
    slurm: Slurm, tmp_path: Path, byte_tokens: Path, clean_environment: Mapping[str, str]
) -> None:
    run = tmp_path / "run"
    # the first attempt waits for the signal, so that the second launch finds it at work
    waits = (
        "[time.sleep(0.05) for _ in iter(lambda: attempt > 0 or now < 4 or self.stop._signalled_at is not None, True)]"
    )
    profile = slurm.faulty(AT_STEP.format(body=waits))
    job = slurm.train("--nodes", "2", *overrides(byte_tokens), profile=profile)
    slurm.until(lambda: (run / "lease.json").exists(), job, START_SECONDS)
    a_second_launch_is_refused(slurm, byte_tokens, profile, job)
    slurm.until(lambda: last_step(run) >= 2, job, START_SECONDS)
    slurm.lab.run("scancel", "--batch", "--signal=USR1", str(job))
    slurm.until(lambda: int(slurm.job(job)["Restarts"]) == 1, job)
    stopped = last_step(run)
    ended = status(run)
    assert [ended[key] for key in ("status", "reason", "step", "attempt", "job")] == [
        "stopped",
        "signal",
        stopped,
        1,
        str(job),
    ]
    assert slurm.wait(job, START_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert status(run)["status"] == "finished" and "requeues itself" in slurm.log(job)

    home = [f"run.dir={tmp_path}/home", "parallel.dp=2", *overrides(byte_tokens)]
    local = [sys.executable, "-m", "bd3_megatron.cli", "train", str(DEBUG), *home]
    subprocess.run(local, env=dict(clean_environment), check=True, capture_output=True, timeout=280)
    assert losses(run) == losses(tmp_path / "home")
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1)), "none lost, none repeated"
