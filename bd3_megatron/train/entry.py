"""One rank of a training run, from joining the grid to leaving it."""

from __future__ import annotations

import sys
from pathlib import Path

from bd3_megatron.config.schema import Config
from bd3_megatron.errors import BD3Error
from bd3_megatron.parallel.topology import leave
from bd3_megatron.process.status import write_status
from bd3_megatron.train.build import build_trainer


def run_rank(config: Config, rank: int, world_size: int, local_rank: int) -> int:
    """Train as rank `rank` of `world_size`; MASTER_ADDR and MASTER_PORT are in the environment.

    Returns:
        0 when the run finished or stopped on request.

    Raises:
        BD3Error: what cannot run, as one sentence; the caller prints it.
    """
    try:
        trainer = build_trainer(config, rank=rank, world_size=world_size, local_rank=local_rank)
    except BD3Error as error:
        # a batch script must not try a mistake in the input again
        if rank == 0 and error.exit_code == BD3Error.exit_code:
            write_status(Path(config.run.dir), "failed", reason=str(error), step=0)
        raise
    reason = trainer.run()
    if rank == 0:
        done = f"{trainer.state.step} of {trainer.plan.total_steps} steps"
        ending = "finished" if reason == "finished" else f"stopped ({reason}) after"
        print(f"bd3: {ending} {done}; run folder {config.run.dir}", file=sys.stderr, flush=True)
    leave()
    return 0
