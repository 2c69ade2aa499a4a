"""The process that holds the ranks of one machine: starts them, passes signals on, and says which one failed.

Decides: on CPU it imports the trainer once and forks the ranks (seconds and memory are paid once); with `--gpu` it
imports nothing and starts one process a rank, because CUDA must not be touched before a fork. Ranks are direct children
in its process group and ask the kernel to be killed when it dies, however it dies. The first stop signal is passed on
and the ranks finish their step; a second one ends them at once. When a rank fails, the others are ended within
GRACE_SECONDS and the failure that came first is printed, once. Refuses: nothing that `launch.local` has not refused.
Costs: one select() a quarter of a second.

    python -m bd3_megatron.train.ranks --ranks N [--gpu] CONFIG [section.key=value ...]
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn

from bd3_megatron.config.load import load_config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import BD3Error
from bd3_megatron.train.quiet import drop_known_warnings
from bd3_megatron.train.rank_process import die_with_parent, run_reported
from bd3_megatron.train.supervisor import STOP_SIGNALS, Supervisor


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
        validate(config, world_size=options.ranks)
    except BD3Error as error:
        print(f"bd3: error: {error}", file=sys.stderr)
        return error.exit_code
    drop_known_warnings()
    port = reserve_port()
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.getsockname()[1])}
    if options.gpu:
        return spawn_ranks(options, rendezvous)
    from bd3_megatron.train.entry import run_rank

    return fork_ranks(lambda rank: run_rank(config, rank, options.ranks, rank), options.ranks, rendezvous)


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this module; people use `bd3 train`."""
    parser = argparse.ArgumentParser(prog="python -m bd3_megatron.train.ranks")
    parser.add_argument("--ranks", type=int, required=True, help="ranks on this machine")
    parser.add_argument("--gpu", action="store_true", help="one process a rank instead of forks")
    parser.add_argument("--rank", type=int, default=None, help="be this rank (internal)")
    parser.add_argument("--parent", type=int, default=None, help="process id of the holder (internal)")
    parser.add_argument("--report", type=int, default=None, help="file descriptor failures are written to (internal)")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    return parser


def reserve_port() -> socket.socket:
    """A free loopback port, held: bound but not listening, so that nobody else is given it and rank 0 still can listen.

    Linux lets two sockets bind one port when both set SO_REUSEADDR and none listens yet; torch's store sets it.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def rank_variables(rank: int, ranks: int, rendezvous: Mapping[str, str]) -> dict[str, str]:
    """What torch's env:// rendezvous reads in one rank."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {**{k: str(v) for k, v in place.items()}, **rendezvous}


def fork_ranks(run: Callable[[int], int], ranks: int, rendezvous: Mapping[str, str]) -> int:
    """Fork the ranks from this process, which has imported all they need, and wait for them.

    Args:
        run: the work of one rank, given its number; returns its exit code. CUDA must not have been touched.
        ranks: how many.
        rendezvous: MASTER_ADDR and MASTER_PORT.

    Returns:
        The exit code for the whole run.
    """
    gc.collect()
    # frozen objects are not touched by the children's collector, so their pages stay shared
    gc.freeze()
    supervisor = Supervisor()
    parent = os.getpid()
    for rank in range(ranks):
        # a signal between fork and the child's own handlers would run the parent's handler in the child
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            supervisor.forget()
            os.close(reader)
            die_with_parent(parent)
            os.environ.update(rank_variables(rank, ranks, rendezvous))
            run_reported(partial(run, rank), rank, writer)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        os.close(writer)
        supervisor.add(rank, child, reader)
    return supervisor.watch()


def spawn_ranks(options: argparse.Namespace, rendezvous: Mapping[str, str]) -> int:
    """Start one fresh process a rank and wait for them.

    Args:
        options: this module's own arguments, passed on.
        rendezvous: MASTER_ADDR and MASTER_PORT.

    Returns:
        The exit code for the whole run.
    """
    supervisor = Supervisor()
    for rank in range(options.ranks):
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)
        command = [sys.executable, "-m", "bd3_megatron.train.ranks", "--ranks", str(options.ranks), "--gpu"]
        command += ["--rank", str(rank), "--parent", str(os.getpid()), "--report", str(writer)]
        command += [options.config, *options.overrides]
        environment = {**os.environ, **rank_variables(rank, options.ranks, rendezvous)}
        child = os.posix_spawn(sys.executable, command, environment, setsigdef=STOP_SIGNALS)
        os.close(writer)
        supervisor.add(rank, child, reader)
    return supervisor.watch()


def _be_one_rank(options: argparse.Namespace) -> NoReturn:
    die_with_parent(options.parent)

    def run() -> int:
        config = load_config(options.config, options.overrides)
        drop_known_warnings()
        from bd3_megatron.train.entry import run_rank

        return run_rank(config, options.rank, options.ranks, options.rank)

    run_reported(run, options.rank, options.report)


if __name__ == "__main__":
    sys.exit(main())
