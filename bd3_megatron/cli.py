"""The `bd3` command: each sub-command is served by the module that its table row names.

`--help` answers without torch: the module of a sub-command is imported only when it is chosen, and must not import torch
at its top either.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bd3_megatron import __version__
from bd3_megatron.command import CommandParser, add_config_arguments, print_error, run_command
from bd3_megatron.errors import BD3Error

NAME = "bd3"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command: a line for `bd3 --help`, and the two functions that serve it."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code. `bd3 train` outside torchrun and SLURM does not return: the process becomes the ranks' holder.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        options = build_parser(arguments).parse_args(arguments)
        return int(options.run(options))

    return run_command(NAME, work)


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with arguments filled in for the chosen sub-command only (so that only its module is imported)."""
    parser = CommandParser(prog=NAME, description="Block-diffusion language models: train, evaluate, sample.")
    parser.add_argument("--version", action="version", version=f"bd3 {__version__}")
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)
    # argparse itself asks for all arguments of all sub-commands beforehand
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    for name, command in COMMANDS.items():
        child = parsers.add_parser(name, help=command.summary, description=command.summary)
        child.set_defaults(run=command.run)
        if name == chosen:
            command.add_arguments(child)
    return parser


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_config_arguments(parser)
    parser.epilog = (
        "Starts tp x pp x cp x dp ranks on this machine, or joins the job when started by torchrun or srun.\n"
        "The same command on the same run.dir resumes from the last checkpoint.\n\n"
        "  bd3 train configs/debug_cpu.yaml train.steps=30\n"
        "  bd3 train configs/debug_cpu.yaml parallel.tp=2 parallel.dp=2 run.dir=runs/grid\n"
        "  torchrun --nproc-per-node 8 -m bd3_megatron.cli train configs/owt_110m_b4.yaml data.path=DIR"
    )


def _train(options: argparse.Namespace) -> int:
    from launch.env import membership

    member = membership(os.environ)
    if member is None:
        from launch import local

        # the process becomes the ranks' holder: this call does not return
        local.start(options.config, options.overrides)
    return _train_as_rank(options, member.rank, member.world_size, member.local_rank, dict(member.variables))


def _train_as_rank(
    options: argparse.Namespace, rank: int, world_size: int, local_rank: int, variables: dict[str, str]
) -> int:
    from bd3_megatron.config.load import load_config
    from bd3_megatron.config.validate import validate
    from bd3_megatron.process.quiet import drop_known_warnings
    from bd3_megatron.process.status import record_error
    from launch.env import rank_settings, visible_gpus

    try:
        config = load_config(options.config, options.overrides)
        validate(config, world_size=world_size)
    except BD3Error as error:
        # every rank reads the same files and finds the same fault: one of them says it
        if rank == 0:
            print_error(NAME, error)
            # exit codes do not survive srun; the batch script must know that no other attempt would do better
            record_error(None, error)
        return error.exit_code
    # before torch is imported, which reads them then
    os.environ.update(variables)
    os.environ.update(rank_settings(os.environ, gpu=visible_gpus() > 0, local=False))
    drop_known_warnings()
    from bd3_megatron.train.entry import run_rank

    try:
        return run_rank(config, rank, world_size, local_rank)
    except BD3Error as error:
        print_error(NAME, error, where="" if rank == 0 else f"[rank {rank}] ")
        return error.exit_code


def _add_arguments_of(module: str) -> Callable[[argparse.ArgumentParser], None]:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        importlib.import_module(module).add_arguments(parser)

    return add_arguments


def _run_of(module: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        from bd3_megatron.process.quiet import drop_known_warnings

        drop_known_warnings()
        return importlib.import_module(module).run(options)

    return run


COMMANDS = {
    "train": Command(summary="Train a model from a configuration.", add_arguments=_add_train_arguments, run=_train),
    "evaluate": Command(
        summary="Perplexity of a checkpoint or exported folder on held-out text.",
        add_arguments=_add_arguments_of("bd3_megatron.evaluate.cli"),
        run=_run_of("bd3_megatron.evaluate.cli"),
    ),
    "sample": Command(
        summary="Generate text from an exported folder.",
        add_arguments=_add_arguments_of("bd3_megatron.sampling.cli"),
        run=_run_of("bd3_megatron.sampling.cli"),
    ),
    "doctor": Command(
        summary="Prove that no block sees what it must not, under a configuration's backend and packing.",
        add_arguments=add_config_arguments,
        run=_run_of("bd3_megatron.train.doctor"),
    ),
    "config": Command(
        summary="Explain one key of a configuration, or print all of them.",
        add_arguments=_add_arguments_of("bd3_megatron.config.reference"),
        run=_run_of("bd3_megatron.config.reference"),
    ),
}


if __name__ == "__main__":
    sys.exit(main())
