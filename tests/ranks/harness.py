"""Real gloo ranks on one machine, forked from one parent that has imported everything once.

A test hands a function; it runs in `world_size` forked processes that meet over a file, and what each returns comes
back in rank order. A rank that raises shows its traceback; a rank that hangs is killed with the others after `timeout`.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# everything the ranks need, imported in the parent: a fork then costs nothing
import bd3_megatron.engine.zero_engine  # noqa: F401
from bd3_megatron.compat import deepspeed as deepspeed_compat
from bd3_megatron.compat import megatron as megatron_compat
from bd3_megatron.compat.device import keep_freed_memory
from bd3_megatron.config.schema import ParallelConfig
from bd3_megatron.parallel.topology import Topology, join, leave

RankFunction = Callable[[Topology], Any]


def run_ranks(function: RankFunction, parallel: ParallelConfig, *, timeout: float = 120.0) -> list[Any]:
    """Run `function(topology)` on every rank of a grid.

    Returns:
        What each rank returned, in rank order (plain data and CPU tensors).

    Raises:
        AssertionError: with every failing rank's traceback, or the ranks that did not end in time.
    """
    world_size = parallel.world_size()
    megatron_compat.install()
    deepspeed_compat.load_deepspeed()
    with tempfile.TemporaryDirectory() as folder:
        children = {rank: _fork(function, parallel, rank, Path(folder)) for rank in range(world_size)}
        late = _wait(children, time.monotonic() + timeout, Path(folder))
        reports = [_report(Path(folder), rank) for rank in range(world_size)]
    failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(reports) if not ok]
    if failed or late:
        raise AssertionError(f"ranks that did not end in time: {late}\n" + "\n".join(failed))
    return [value for _, value in reports]


def _fork(function: RankFunction, parallel: ParallelConfig, rank: int, folder: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become(function, parallel, rank, folder)
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # no atexit handlers, no pytest teardown in a rank
        os._exit(code)


def _become(function: RankFunction, parallel: ParallelConfig, rank: int, folder: Path) -> None:
    # what was inherited is not the collector's business here: walking it would copy its pages, half a second a collection
    gc.freeze()
    keep_freed_memory()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(parallel.world_size()))
    os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=parallel.world_size()
    )
    topology = join(parallel, rank=rank, world_size=parallel.world_size(), device=torch.device("cpu"))
    value = function(topology)
    temporary = folder / f"{rank}.tmp"
    temporary.write_bytes(pickle.dumps(value))
    temporary.rename(folder / f"{rank}.done")
    torch.distributed.barrier()
    leave()


def _wait(children: dict[int, int], deadline: float, folder: Path) -> list[int]:
    """Reap children; when one fails the others get a moment, then all that are left are killed. Returns the late ranks."""
    running = dict(children)
    while running and time.monotonic() < deadline:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank]
                if status:
                    deadline = min(deadline, time.monotonic() + 2.0)
                    error = folder / f"{rank}.error"
                    if not error.exists():
                        error.write_text(f"ended with status {status}\n")
        time.sleep(0.005)
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return sorted(running)


def _report(folder: Path, rank: int) -> tuple[bool, Any]:
    done, error = folder / f"{rank}.done", folder / f"{rank}.error"
    if error.exists():
        return False, error.read_text()
    return (True, pickle.loads(done.read_bytes())) if done.exists() else (False, "killed\n")
