"""Kill a training run at random moments, again and again, and compare what it recorded with an undisturbed run's.

Half of the kills are aimed into a save (as soon as its temporary folder is seen), the others fall at a random time; each
hits, by chance, the process that holds the ranks or one of the ranks. Nothing but SIGKILL is used. The short form is a
test of the default suite; the long one is

    python -m tests.ranks.kill_runs --kills 100
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bd3_megatron.train.entry  # noqa: F401 - imported once here, so that every start is a fork
from bd3_megatron.compat import deepspeed as deepspeed_compat
from bd3_megatron.compat import megatron as megatron_compat
from bd3_megatron.config.load import load_config, with_later
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.process.ranks import fork_ranks, reserve_port
from bd3_megatron.train.dataset import prepare_text
from bd3_megatron.train.entry import run_rank

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
COMPARED = ("loss/train_nats_per_token", "optim/grad_norm", "noise/masked_fraction", "optim/lr", "tokens")


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    in_a_save: int = 0
    of_one_rank: int = 0
    steps_lost: list[int] = field(default_factory=list)


def make_config(folder: Path, name: str, num_steps: int, *overrides: str) -> Config:
    """A small run, on 4 ranks if `overrides` do not say otherwise, that saves at every other step."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n\n".join(f"Line {n} is about the number {n * n}." for n in range(2000)))
    fixed = [
        f"run.dir={folder / name}",
        f"data.text=[{text}]",
        "data.seq_len=16",
        "model.hidden_size=32",
        "parallel.tp=2",
        "parallel.dp=2",
        f"train.steps={num_steps}",
        "train.global_batch_size=4",
        "checkpoint.every_steps=2",
        "throughput.peak_tflops=0.1",
        "watch.leak_check=false",
        "watch.preflight=false",
    ]
    config = load_config(ROOT / "configs/debug_cpu.yaml", with_later(fixed, overrides))
    validate(config, world_size=config.parallel.world_size())
    return config


def start(config: Config, log: Path) -> int:
    """Fork a process that holds the ranks; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        port = reserve_port()
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
        ranks = config.parallel.world_size()
        code = fork_ranks(lambda rank: run_rank(config, rank, ranks, rank), ranks, rendezvous)
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    """The wait status of a process that has ended; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return status if done else None


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return []


def step_reached(run_dir: Path) -> int:
    return max((r["step"] for r in step_records(run_dir)), default=0)


def step_records(run_dir: Path) -> list[dict[str, Any]]:
    """Complete records of training steps, in the file's order; a line that is being written is left out."""
    path, found = run_dir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if COMPARED[0] in record:
            found.append(record)
    return found


def run_undisturbed(config: Config, log: Path) -> None:
    status = os.waitpid(start(config, log), 0)[1]
    assert status == 0, log.read_text()[-3000:]


def kill_once(config: Config, log: Path, chance: random.Random, tally: Tally) -> bool:
    """Start the run and kill it; False when it finished before."""
    run_dir, before = Path(config.run.dir), step_reached(Path(config.run.dir))
    starts = num_starts(run_dir)
    pid = start(config, log)
    deadline = time.monotonic() + START_SECONDS
    aimed = chance.random() < 0.5
    # a run that is killed before it has done anything tells nothing: wait for the first step of its own
    while (status := ended(pid)) is None and not _has_stepped(run_dir, starts):
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)
    until = time.monotonic() + chance.uniform(0.0, 1.5)
    while status is None and time.monotonic() < (until + 5.0 if aimed else until):
        if aimed and any((run_dir / "checkpoints").glob(".tmp_*")):
            break
        time.sleep(0.001)
        status = ended(pid)
    if status is not None:
        assert status == 0, log.read_text()[-3000:]
        return False
    ranks = children_of(pid)
    victim = chance.choice(ranks) if ranks and chance.random() < 0.5 else pid
    tally.in_a_save += any((run_dir / "checkpoints").glob(".tmp_*"))
    os.kill(victim, signal.SIGKILL)
    os.waitpid(pid, 0)
    _wait_for_death(ranks)
    tally.kills += 1
    tally.of_one_rank += victim != pid
    tally.steps_lost.append(step_reached(run_dir) - before)
    return True


def lines_of(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def num_starts(run_dir: Path) -> int:
    return sum('"event": "start"' in line for line in lines_of(run_dir))


def _has_stepped(run_dir: Path, starts: int) -> bool:
    """The run has started once more than `starts` times and recorded a step since."""
    lines = lines_of(run_dir)
    return num_starts(run_dir) > starts and bool(lines) and f'"{COMPARED[0]}"' in lines[-1]


def _wait_for_death(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 30.0
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived the process that holds them"
        time.sleep(0.01)


def kill_and_compare(folder: Path, *, kills: int, num_steps: int, seed: int, overrides: Sequence[str] = ()) -> Tally:
    """The whole experiment.

    Raises:
        AssertionError: the record differs from the undisturbed run's anywhere, or a start failed.
    """
    megatron_compat.install()
    deepspeed_compat.load_deepspeed()
    chance, tally = random.Random(seed), Tally()
    whole = make_config(folder, "whole", num_steps, *overrides)
    prepare_text(whole, lambda _: None)
    shared = f"data.path={folder / 'whole' / 'data'}"
    whole = make_config(folder, "whole", num_steps, *overrides, shared)
    killed = make_config(folder, "killed", num_steps, *overrides, shared)
    run_undisturbed(whole, folder / "whole.log")
    while tally.kills < kills and kill_once(killed, folder / "killed.log", chance, tally):
        pass
    if step_reached(Path(killed.run.dir)) < num_steps:
        run_undisturbed(killed, folder / "killed.log")
    expected, found = step_records(Path(whole.run.dir)), step_records(Path(killed.run.dir))
    assert [r["step"] for r in found] == [r["step"] for r in expected] == list(range(1, num_steps + 1))
    for one, other in zip(expected, found, strict=True):
        differing = {key: (one[key], other[key]) for key in COMPARED if one[key] != other[key]}
        assert not differing, f"step {one['step']}: {differing}"
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400, help="more than the kills can use up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_and_compare(
            Path(folder), kills=options.kills, num_steps=options.steps, seed=options.seed, overrides=options.overrides
        )
    print(
        f"{tally.kills} kills in {time.monotonic() - began:.0f} s ({tally.in_a_save} in a save, {tally.of_one_rank} of one "
        f"rank alone); the record of {options.steps} steps equals the undisturbed run's"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
