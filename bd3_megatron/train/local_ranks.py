"""The program `bd3 train` becomes outside torchrun and SLURM: it holds the ranks of one run on this machine.

On CPU it imports the trainer once and forks the ranks; with `--gpu` it imports nothing heavy and spawns them.

    python -m bd3_megatron.train.local_ranks --ranks N [--gpu] CONFIG [section.key=value ...]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from bd3_megatron.config.load import load_config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import BD3Error
from bd3_megatron.process.quiet import drop_known_warnings
from bd3_megatron.process.rank_process import die_with_parent, run_reported
from bd3_megatron.process.ranks import fork_ranks, reserve_port, spawn_ranks
from bd3_megatron.process.status import record_death


def main(argv: Sequence[str] | None = None) -> int:
    """Hold the ranks of one run, or (`--rank`) be one of them.

    Returns:
        0 when every rank ended well, the failing rank's own code for a mistake in the input, 1 otherwise.
    """
    options = build_parser().parse_args(argv)
    if options.rank is not None:
        _be_one_rank(options)
    # nothing is running yet that a Ctrl-C could spoil: die of it like any program, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        config = load_config(options.config, options.overrides)
        # One sentence from the parent instead of one from each rank.
        validate(config, world_size=options.ranks)
    except BD3Error as error:
        print(f"bd3: error: {error}", file=sys.stderr)
        return error.exit_code
    drop_known_warnings()
    # Held until the ranks have bound theirs: two launches on one machine do not take the same.
    port = reserve_port()
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
    on_death = partial(record_death, Path(config.run.dir), launched=time.time())
    # CUDA cannot be used in a process forked from one that has initialised it; forks are for CPU, where they save the
    # import of torch in every rank.
    if options.gpu:
        return spawn_ranks(partial(_command_of, options), options.ranks, rendezvous, on_death)
    # Imported late: the parent of spawned ranks needs neither torch nor megatron.
    from bd3_megatron.train.entry import run_rank

    return fork_ranks(lambda rank: run_rank(config, rank, options.ranks, rank), options.ranks, rendezvous, on_death)


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this module; people use `bd3 train`."""
    parser = argparse.ArgumentParser(prog="python -m bd3_megatron.train.local_ranks")
    parser.add_argument("--ranks", type=int, required=True, help="ranks on this machine")
    parser.add_argument("--gpu", action="store_true", help="one process a rank instead of forks")
    parser.add_argument("--rank", type=int, default=None, help="be this rank (internal)")
    parser.add_argument("--parent", type=int, default=None, help="process id of the holder (internal)")
    parser.add_argument("--report", type=int, default=None, help="file descriptor failures are written to (internal)")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    return parser


def _command_of(options: argparse.Namespace, rank: int, report: int) -> list[str]:
    command = [sys.executable, "-m", "bd3_megatron.train.local_ranks", "--ranks", str(options.ranks), "--gpu"]
    command += ["--rank", str(rank), "--parent", str(os.getpid()), "--report", str(report)]
    return [*command, options.config, *options.overrides]


def _be_one_rank(options: argparse.Namespace) -> NoReturn:
    # A killed launcher must not leave ranks that hold the GPUs.
    die_with_parent(options.parent)

    def run() -> int:
        config = load_config(options.config, options.overrides)
        drop_known_warnings()
        from bd3_megatron.train.entry import run_rank

        return run_rank(config, options.rank, options.ranks, options.rank)

    run_reported(run, options.rank, options.report)


if __name__ == "__main__":
    sys.exit(main())
