"""One rank of a training run, from joining the grid to leaving it.

The run folder is held from before it is first read until the end, and status.json says at each moment what holds true.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from bd3_megatron.config.schema import Config
from bd3_megatron.errors import BD3Error
from bd3_megatron.lease import LEASE_FILE, PATIENCE_SECONDS, Lease, acquire
from bd3_megatron.parallel.topology import Topology, leave
from bd3_megatron.process.status import RunStatus, begin_attempt, record_error, record_steps
from bd3_megatron.train.build import announce, build_trainer, meet
from bd3_megatron.train.trainer import Trainer


def run_rank(config: Config, rank: int, world_size: int, local_rank: int) -> int:
    """Train as rank `rank` of `world_size`; MASTER_ADDR and MASTER_PORT are in the environment.

    Returns:
        0 when the run finished or stopped on request.

    Raises:
        BD3Error: what cannot run, as one sentence; the caller prints it.
    """
    run_dir = Path(config.run.dir)
    try:
        topology = meet(config, rank=rank, world_size=world_size, local_rank=local_rank)
        lease, began = _take_folder(config, topology)
    except BaseException as error:
        # what the folder says is another launch's
        record_error(None, error)
        raise
    trainer = None
    try:
        trainer = build_trainer(config, topology)
        # Only an attempt with a step left to make is recorded as running from that step.
        if began is not None and trainer.state.step < trainer.plan.total_steps:
            record_steps(run_dir, began, step=trainer.state.step)
        reason = trainer.run()
    except BaseException as error:
        record_error(run_dir, error, step=None if trainer is None else trainer.state.step)
        # after a crash other ranks may go on writing for a moment: the next launch finds this process gone
        if lease is not None and isinstance(error, BD3Error):
            lease.release()
        raise
    if lease is not None:
        _conclude(trainer, reason)
        lease.release()
    # Only a rank that ended well leaves its process group; after an error the launcher ends the others, and waiting for
    # them here would hang.
    leave()
    return 0


def _take_folder(config: Config, topology: Topology) -> tuple[Lease | None, RunStatus | None]:
    """Hold the run folder and count the attempt, on rank 0; (None, None) elsewhere. Collective.

    Raises:
        FolderHeldError, LaunchError: on every rank alike.
    """
    lease, began = None, None
    refusal: list[Any] = [None]
    if topology.rank == 0:
        run_dir = Path(config.run.dir)
        # the other ranks wait in the broadcast below
        patience = min(PATIENCE_SECONDS, config.parallel.collective_timeout_seconds / 2)
        try:
            lease = acquire(run_dir / LEASE_FILE, name=f"run.dir={run_dir}", say=announce, patience_seconds=patience)
            began = begin_attempt(run_dir)
        except BD3Error as error:
            refusal = [error]
    # The error itself travels, so that every rank exits with its code.
    dist.broadcast_object_list(refusal, src=0, device=topology.device)
    if refusal[0] is not None:
        raise refusal[0]
    return lease, began


def _conclude(trainer: Trainer, reason: str) -> None:
    """Say how the run ended and do away with what asked for it."""
    config, step, total = trainer.config, trainer.state.step, trainer.plan.total_steps
    if reason == "file" and config.train.stop_file is not None:
        try:
            # left there, it would stop the next attempt after one step
            Path(config.train.stop_file).unlink(missing_ok=True)
        except OSError as error:
            announce(
                f"train.stop_file={config.train.stop_file} cannot be removed ({error.strerror}); remove it by hand"
            )
    if step > total:
        announce(
            f"nothing to do: the run is at step {step} and train asks for {total}; "
            f"raise train.steps or train.tokens to go on; run folder {config.run.dir}"
        )
        return
    ending = "finished" if reason == "finished" else f"stopped ({reason}) after"
    announce(f"{ending} {step} of {total} steps; run folder {config.run.dir}")
