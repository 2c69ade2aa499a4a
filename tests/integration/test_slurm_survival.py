"""What befalls long runs on a real SLURM: limits, cancels, dead ranks, nodes and controllers. The run ends complete each time.

Minutes each, for SLURM's own clocks and requeues; run by tests/run.sh --slurm.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from bd3_megatron.config.load import with_later
from tests.integration.slurm_client import AT_STEP, DEBUG, Slurm, last_step, losses, status

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_long, pytest.mark.timeout(1800)]

STEPS = 40
WAIT_SECONDS = 900.0
"""A few attempts, each importing and joining on a busy machine."""

SLOWLY = AT_STEP.format(body="time.sleep(0.0 if attempt else 1.0)")
"""The first attempt takes a second a step, so that something can happen to it."""


def overrides(tokens: Path, *more: str) -> list[str]:
    fixed = ["watch.leak_check=false", "throughput.peak_tflops=1.0", "checkpoint.every_steps=5", f"train.steps={STEPS}"]
    return with_later([f"data.path={tokens}", *fixed], more)


def is_complete(run: Path, steps: int = STEPS) -> bool:
    """Finished, each step once."""
    return status(run)["status"] == "finished" and [s for s, _ in losses(run)] == list(range(1, steps + 1))


def started(slurm: Slurm, job: int, run: Path, step: int) -> None:
    slurm.until(lambda: last_step(run) >= step, job, WAIT_SECONDS)


def at_home(tmp_path: Path, tokens: Path, env: Mapping[str, str], ranks: int) -> list[tuple[int, float]]:
    typed = [f"run.dir={tmp_path}/home", f"parallel.dp={ranks}", *overrides(tokens)]
    local = [sys.executable, "-m", "bd3_megatron.cli", "train", str(DEBUG), *typed]
    subprocess.run(local, env=dict(env), check=True, capture_output=True, timeout=WAIT_SECONDS)
    return losses(tmp_path / "home")


@pytest.mark.parametrize(("launcher", "nodes", "ranks"), [("torchrun", 2, 2), ("srun", 4, 1), ("torchrun", 4, 1)])
def test_every_launcher_trains_as_at_home(
    slurm: Slurm,
    tmp_path: Path,
    byte_tokens: Path,
    clean_environment: Mapping[str, str],
    launcher: str,
    nodes: int,
    ranks: int,
) -> None:
    profile = slurm.profile(sys.executable, ranks_per_node=ranks)
    arguments = ["--nodes", str(nodes), "--launcher", launcher, *overrides(byte_tokens)]
    job = slurm.train(*arguments, profile=profile)
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run")
    assert losses(tmp_path / "run") == at_home(tmp_path, byte_tokens, clean_environment, nodes * ranks)


def test_torchrun_hands_the_signal_on_and_the_job_continues(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    steps = 100_000
    profile = slurm.profile(sys.executable, ranks_per_node=2)
    arguments = ["--nodes", "1", "--launcher", "torchrun", *overrides(byte_tokens, f"train.steps={steps}")]
    job = slurm.train(*arguments, profile=profile)
    started(slurm, job, tmp_path / "run", 3)
    slurm.lab.run("scancel", "--batch", "--signal=USR1", str(job))
    slurm.until(lambda: int(slurm.job(job)["Restarts"]) == 1, job, WAIT_SECONDS)
    stopped = status(tmp_path / "run")["step"]
    started(slurm, job, tmp_path / "run", stopped + 1)
    seen = [step for step, _ in losses(tmp_path / "run")]
    assert seen == list(range(1, seen[-1] + 1)) and f"resumes at step {stopped}" in slurm.log(job)


def test_the_time_limit_comes_and_the_run_finishes_in_the_next_attempt(
    slurm: Slurm, tmp_path: Path, byte_tokens: Path
) -> None:
    profile = slurm.faulty(AT_STEP.format(body="time.sleep(0.0 if attempt else 2.0)"))
    profile.write_text(profile.read_text().replace("signal_lead_seconds: 120", "signal_lead_seconds: 90"))
    more = ("train.steps=150", "checkpoint.every_steps=1000")
    job = slurm.train("--time", "00:05:00", "--nodes", "2", *overrides(byte_tokens, *more), profile=profile)
    slurm.until(lambda: int(slurm.job(job)["Restarts"]) == 1, job, WAIT_SECONDS)
    assert status(tmp_path / "run")["status"] == "stopped" and 0 < last_step(tmp_path / "run") < 150
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run", 150) and "cancelled" not in slurm.log(job)


def test_scontrol_requeue_saves_first(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    job = slurm.train("--nodes", "2", *overrides(byte_tokens), profile=slurm.faulty(SLOWLY))
    started(slurm, job, tmp_path / "run", 3)
    slurm.lab.run("scontrol", "requeue", str(job))
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run") and slurm.job(job)["Restarts"] == "1"
    assert "ranks save and stop" in slurm.log(job) and "anew" not in slurm.log(job).partition("attempt 1")[2]


def test_a_job_cancelled_twice_goes_on_when_submitted_again(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    profile = slurm.faulty(SLOWLY)
    job = slurm.train("--nodes", "2", *overrides(byte_tokens), profile=profile)
    started(slurm, job, tmp_path / "run", 7)
    for _ in range(2):
        slurm.lab.run("scancel", str(job), check=False)
        time.sleep(1.5)
    slurm.until(lambda: slurm.job(job)["JobState"] == "CANCELLED", job)
    again = slurm.train("--nodes", "2", *overrides(byte_tokens), profile=slurm.profile(sys.executable))
    assert slurm.wait(again, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(again)
    assert is_complete(tmp_path / "run") and "anew" not in slurm.log(again)


@pytest.mark.parametrize("how", ["down", "power"])
def test_a_node_lost_mid_job_is_replaced(slurm: Slurm, tmp_path: Path, byte_tokens: Path, how: str) -> None:
    job = slurm.train("--nodes", "2", *overrides(byte_tokens), profile=slurm.faulty(SLOWLY))
    started(slurm, job, tmp_path / "run", 7)
    lost = slurm.lab.nodes[1]
    if how == "power":
        slurm.lab.crash_node(lost)
    else:
        slurm.lab.run("scontrol", "update", f"nodename={lost.name}", "state=down", "reason=test")
    try:
        assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
        used = slurm.lab.run("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).stdout.split()
        assert lost.name not in used
        assert is_complete(tmp_path / "run")
    finally:
        if how == "power":
            slurm.lab.start_node(lost)
        slurm.lab.run("scontrol", "update", f"nodename={lost.name}", "state=resume", check=False)
        slurm.cancel_all()
        slurm.lab.wait_idle(120)


def test_a_killed_rank_costs_only_what_was_not_saved(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    fault = AT_STEP.format(body="if attempt == 0 and rank == 1 and now == 12: os.kill(os.getpid(), signal.SIGKILL)")
    job = slurm.train("--nodes", "2", *overrides(byte_tokens), profile=slurm.faulty(fault))
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run") and "resumes at step 10" in slurm.log(job)


def test_a_restarted_controller_does_not_disturb_the_run(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    job = slurm.train("--nodes", "2", *overrides(byte_tokens), profile=slurm.faulty(SLOWLY))
    started(slurm, job, tmp_path / "run", 3)
    slurm.lab.stop_controller()
    time.sleep(5)
    slurm.lab.start_controller()
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run") and slurm.job(job)["Restarts"] == "0"


def test_a_rank_that_hangs_is_named_and_the_job_continues(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    fault = AT_STEP.format(body="if attempt == 0 and rank == 1 and now == 12: threading.Event().wait()")
    watch = ("watch.hang_factor=2", "watch.hang_seconds=20")
    job = slurm.train("--nodes", "2", *overrides(byte_tokens, *watch), profile=slurm.faulty(fault))
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run")
    assert "after step 11 (limit 20 s): rank 1 (node n2) is in no collective" in slurm.log(job)
    assert "; the others wait in all_reduce" in slurm.log(job)
    stacks = next((tmp_path / "run/logs").glob("*.0/hang/rank-1.txt")).read_text()
    assert "fault.py" in stacks


def test_a_node_that_is_slow_is_left_out_of_the_next_attempt(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    fault = (
        "from bd3_megatron.process import preflight\n"
        "measure = preflight.time_product\n"
        "preflight.time_product = lambda d: (measure(d)[0] * (50 if node == 'n2' else 1), True)"
    )
    profile = slurm.faulty(fault)
    job = slurm.train("--nodes", "2", "--exclude-bad", *overrides(byte_tokens), profile=profile)
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert "rank 1 on node n2 is slow: a matrix product takes" in slurm.log(job)
    assert slurm.job(job)["ExcNodeList"] == "n2" and is_complete(tmp_path / "run")


def test_a_chain_of_real_jobs_finishes_the_run(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    profile = slurm.faulty(AT_STEP.format(body="if now == 15: os.kill(os.getpid(), signal.SIGUSR1)"))
    slurm.train("--nodes", "2", "--chain", "3", *overrides(byte_tokens), profile=profile)
    for job in slurm.jobs:
        assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run") and "resumes at step 15" in slurm.log(slurm.jobs[1])


def test_an_array_of_real_jobs_trains_each_with_its_rate(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    tasks = [word for lr in ("1e-3", "2e-3", "3e-3") for word in ("--array", f"optim.lr={lr}")]
    job = slurm.train(*tasks, *overrides(byte_tokens), profile=slurm.profile(sys.executable))
    for task in range(3):
        assert slurm.wait(f"{job}_{task}", WAIT_SECONDS)["JobState"] == "COMPLETED"
        assert is_complete(tmp_path / f"run-{task}")
    assert len({losses(tmp_path / f"run-{task}")[-1] for task in range(3)}) == 3


def test_wandb_keeps_one_run_across_requeues(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    body = "if now == (12, 24, 0)[attempt] and rank == 0: os.kill(os.getpid(), signal.SIGUSR1)"
    profile = slurm.faulty(AT_STEP.format(body=body))
    job = slurm.train("--nodes", "2", *overrides(byte_tokens, "log.wandb=offline"), profile=profile)
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run") and slurm.job(job)["Restarts"] == "2"
    runs = sorted(p for p in (tmp_path / "run/wandb").iterdir() if p.name.startswith("offline-run-"))
    assert len(runs) == 3 and len({p.name.rsplit("-", 1)[1] for p in runs}) == 1
    assert all(any(f.stat().st_size > 1000 for f in p.glob("run-*.wandb")) for p in runs)


def test_an_outage_of_wandb_does_not_stop_training(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    fault = (
        "from bd3_megatron.train.loggers import WandbMirror\n"
        "keep = WandbMirror.write\n"
        "def write(self, record):\n"
        "    if record['step'] > 4: raise ConnectionError('the tracker is gone')\n"
        "    keep(self, record)\n"
        "WandbMirror.write = write"
    )
    job = slurm.train("--nodes", "2", *overrides(byte_tokens, "log.wandb=offline"), profile=slurm.faulty(fault))
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run")
    assert slurm.log(job).count("wandb failed and is left out from here on: ConnectionError: the tracker is gone") == 1


def test_a_second_signal_ends_ranks_at_once_and_spares_the_last_checkpoint(
    slurm: Slurm, tmp_path: Path, byte_tokens: Path
) -> None:
    profile = slurm.faulty(AT_STEP.format(body="time.sleep(0.0 if attempt else (60.0 if now == 8 else 0.5))"))
    job = slurm.train("--nodes", "2", *overrides(byte_tokens), profile=profile)
    started(slurm, job, tmp_path / "run", 7)
    for _ in range(2):
        slurm.lab.run("scancel", f"--signal={signal.SIGTERM.value}", str(job))
        time.sleep(2.0)
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run") and "resumes at step 5" in slurm.log(job)


def test_a_node_that_was_cut_off_and_its_successor_never_write_the_folder_at_once(
    slurm: Slurm, tmp_path: Path, byte_tokens: Path
) -> None:
    if slurm.lab.layout != "netns":
        pytest.skip("cables can be pulled with networks of their own only")
    run, patience = tmp_path / "run", "parallel.collective_timeout_seconds=1200"
    job = slurm.train(*overrides(byte_tokens, patience, "train.steps=400"), profile=slurm.faulty(SLOWLY))
    started(slurm, job, run, 3)
    node = next(n for n in slurm.lab.nodes if n.name == slurm.job(job)["NodeList"])
    slurm.lab.set_link(node, up=False)
    try:
        slurm.until(lambda: "waits for its end, or for a sign of life" in slurm.log(job), job, WAIT_SECONDS)
        # the first attempt, which no controller reaches, goes on: the second one must not touch its record
        seen = last_step(run)
        started(slurm, job, run, seen + 3)
        assert status(run)["attempt"] == 1
    finally:
        slurm.lab.set_link(node, up=True)
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(run, 400) and status(run)["attempt"] == 2
    slurm.lab.wait_idle(120)


def test_a_requeue_waits_for_an_attempt_that_is_still_saving(slurm: Slurm, tmp_path: Path, byte_tokens: Path) -> None:
    fault = SLOWLY + (
        "from bd3_megatron.checkpoint.save import Saver\n"
        "save = Saver.save\n"
        "def slowly(self, **facts):\n"
        "    time.sleep(0.0 if attempt else 8.0)\n"
        "    save(self, **facts)\n"
        "Saver.save = slowly\n"
    )
    job = slurm.train("--nodes", "2", *overrides(byte_tokens, "checkpoint.every_steps=0"), profile=slurm.faulty(fault))
    started(slurm, job, tmp_path / "run", 3)
    slurm.lab.run("scontrol", "requeue", str(job))
    assert slurm.wait(job, WAIT_SECONDS)["JobState"] == "COMPLETED", slurm.log(job)
    assert is_complete(tmp_path / "run") and status(tmp_path / "run")["attempt"] == 2
    assert "anew" not in slurm.log(job).partition("attempt 1")[2]
