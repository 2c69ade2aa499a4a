"""Forks or spawns the ranks of one machine and waits for them; the launcher of local runs and the benchmarks use it.

Forked ranks share what their parent imported (seconds and memory are paid once); with CUDA each rank is a fresh process,
because CUDA must not be touched before a fork. Ranks are children in the parent's process group and ask the kernel to be
killed when it dies. The first stop signal is passed on, a second one ends the ranks at once. The first failure is printed.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from bd3_megatron.process.rank_process import die_with_parent, run_reported
from bd3_megatron.process.supervisor import LAUNCHER_STOP_SIGNALS, Supervisor


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
    coordinates = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {**{k: str(v) for k, v in coordinates.items()}, **rendezvous}


def fork_ranks(
    run: Callable[[int], int],
    ranks: int,
    rendezvous: Mapping[str, str],
    on_death: Callable[[str], None] = lambda sentence: None,
) -> int:
    """Fork the ranks from this process, which has imported all they need, and wait for them.

    Args:
        run: the work of one rank, given its number; returns its exit code. CUDA must not have been touched.
        ranks: how many.
        rendezvous: MASTER_ADDR and MASTER_PORT.
        on_death: told, in a sentence, that a rank was ended before it could say why.

    Returns:
        The exit code for the whole run.
    """
    # first: garbage that is frozen is never freed
    gc.collect()
    # frozen objects are not touched by the children's collector, so their pages stay shared
    gc.freeze()
    supervisor = Supervisor(on_death)
    parent = os.getpid()
    for rank in range(ranks):
        # a signal between fork and the child's own handlers would run the parent's handler in the child
        signal.pthread_sigmask(signal.SIG_BLOCK, LAUNCHER_STOP_SIGNALS)
        reader, writer = os.pipe()
        # text left in a buffer would be printed once by every child
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            supervisor.forget()
            os.close(reader)
            die_with_parent(parent)
            os.environ.update(rank_variables(rank, ranks, rendezvous))
            run_reported(partial(run, rank), rank, writer)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, LAUNCHER_STOP_SIGNALS)
        os.close(writer)
        supervisor.add(rank, child, reader)
    return supervisor.watch()


def spawn_ranks(
    command_of: Callable[[int, int], Sequence[str]],
    ranks: int,
    rendezvous: Mapping[str, str],
    on_death: Callable[[str], None] = lambda sentence: None,
) -> int:
    """Start one fresh process a rank and wait for them.

    Args:
        command_of: the command line of one rank, given its number and the file descriptor it reports failures to.
        ranks: how many.
        rendezvous: MASTER_ADDR and MASTER_PORT.
        on_death: as for `fork_ranks`.

    Returns:
        The exit code for the whole run.
    """
    supervisor = Supervisor(on_death)
    for rank in range(ranks):
        reader, writer = os.pipe()
        # Python closes descriptors in a new program unless they are marked (PEP 446)
        os.set_inheritable(writer, True)
        command = command_of(rank, writer)
        environment = {**os.environ, **rank_variables(rank, ranks, rendezvous)}
        child = os.posix_spawn(command[0], list(command), environment, setsigdef=LAUNCHER_STOP_SIGNALS)
        os.close(writer)
        supervisor.add(rank, child, reader)
    return supervisor.watch()
