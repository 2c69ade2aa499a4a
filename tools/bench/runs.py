"""Whole training runs inside a benchmark: ranks forked from this process, their output in a log, their record read back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from bd3_megatron.config.schema import Config
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.sources import text_source
from bd3_megatron.errors import LaunchError
from bd3_megatron.process.ranks import fork_ranks, reserve_port
from bd3_megatron.report.run_record import RunRecord, read_run
from bd3_megatron.train.entry import run_rank


def prepare_bytes(out: Path, vocab_size: int) -> None:
    """Text that every Python has, as bytes padded to `vocab_size` ids, in folder `out`; what is there is kept."""
    source = {"train": text_source(("builtin:python-topics",))}
    prepare(PrepareRequest(out=out, sources=source, tokenizer="bytes", vocab_size=vocab_size), say=lambda _: None)


def on_ranks(work: Callable[[int], int], ranks: int, log: Path, *, threads: int) -> None:
    """Run `work(rank)` in forked ranks that write to `log` instead of the terminal.

    Raises:
        LaunchError: a rank failed; the log's end is shown.
    """
    # Held until the ranks have ended.
    port = reserve_port()
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}

    def quietly(rank: int) -> int:
        # In the rank, after the fork: the parent's thread pool does not exist here.
        torch.set_num_threads(threads)
        with log.open("a") as file:
            # File descriptors and not sys.stdout: libraries in C print too.
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        return work(rank)

    code = fork_ranks(quietly, ranks, rendezvous)
    port.close()
    if code:
        raise LaunchError(f"a rank ended with exit code {code}: {log.read_text()[-400:]}")


def trained(config: Config, log: Path, *, threads: int, work: Callable[[int], int] | None = None) -> RunRecord:
    """Train on as many forked ranks as the grid has, and read the record.

    Args:
        config: its run.dir is where the record lies.
        log: file the ranks write to.
        threads: of each rank.
        work: one rank of it; None: the trainer as it is.
    """
    ranks = config.parallel.world_size()
    on_ranks(work or (lambda rank: run_rank(config, rank, ranks, rank)), ranks, log, threads=threads)
    return read_run(Path(config.run.dir))
