"""Ranks on this machine: refuse what cannot run, then become the process that holds them.

Everything that can be refused is, before anything is started or written. Torch-free; about 0.2 s.

    python -m launch.local CONFIG [section.key=value ...]      the same as `bd3 train` outside torchrun and SLURM
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bd3_megatron.command import config_first, run_command
from bd3_megatron.config.load import load_config
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.config.validate_run import refuse_without_held_out, refuse_without_text
from bd3_megatron.errors import LaunchError, counted, cut
from launch.env import rank_settings, visible_gpus

HOLDER = "bd3_megatron.train.local_ranks"
MOST_CPU_RANKS = 512
"""Processes on one machine without GPUs; a larger grid is meant for a cluster."""


@dataclass(frozen=True, kw_only=True)
class LocalLaunch:
    """What will be started: a command line and its whole environment."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def local_launch(config_path: str, overrides: Sequence[str], environ: Mapping[str, str]) -> LocalLaunch:
    """The process that will hold the local ranks of this configuration.

    Args:
        config_path: YAML file.
        overrides: "section.key=value" strings.
        environ: the user's environment; what it sets is kept.

    Raises:
        ConfigError, GridError: the configuration cannot run.
        LaunchError: too few GPUs, or the run folder cannot be made.
    """
    config = load_config(config_path, overrides)
    validate(config)
    ranks, gpus = config.parallel.world_size(), visible_gpus(environ)
    check_gpus(ranks, gpus)
    check_run_folder(config)
    check_training_data(config)
    command = [sys.executable, "-m", HOLDER, "--ranks", str(ranks)]
    if gpus:
        command.append("--gpu")
    # the user's variables and the table's never name the same one
    environment = {**environ, **rank_settings(environ, gpu=gpus > 0, local=True)}
    return LocalLaunch(command=(*command, config_path, *overrides), environment=environment)


def check_gpus(ranks: int, gpus: int) -> None:
    """Refuse more ranks than one machine holds.

    Raises:
        LaunchError: more ranks than GPUs (NCCL cannot serve two ranks on one), or without GPUs more than 512.
    """
    if not gpus and ranks > MOST_CPU_RANKS:
        raise LaunchError(
            f"the grid asks for {ranks} ranks on this machine's CPU; use a grid of {MOST_CPU_RANKS} or fewer, or submit it to a "
            "cluster with launch/slurm.py."
        )
    if gpus and ranks > gpus:
        raise LaunchError(
            f"the grid asks for {ranks} ranks but {counted(gpus, 'GPU is', 'GPUs are')} visible; "
            f"use a grid of {gpus} or fewer, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU."
        )


def check_run_folder(config: Config) -> None:
    """Refuse a run folder that cannot be made or written, without making it.

    Raises:
        LaunchError: a part of the path is a file, or the nearest folder that exists is not writable.
    """
    folder = Path(config.run.dir).absolute()
    said = f"run.dir={cut(config.run.dir)}"
    # os.path.exists says no where a part of the path may not be entered; the part before it is then the nearest
    nearest = next(p for p in (folder, *folder.parents) if os.path.exists(p))
    if not nearest.is_dir():
        raise LaunchError(f"{said}: '{cut(str(nearest))}' is a file; give a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise LaunchError(f"{said}: '{cut(str(nearest))}' is not writable; give a folder you may write to.")


def check_training_data(config: Config) -> None:
    """Refuse a configuration that names no data, or a prepared folder here that lacks what is asked of it.

    Raises:
        ConfigError: nothing to train on, or an evaluation without held-out rows. A folder that only the ranks see passes.
    """
    data = config.data
    if data.path is None and not data.mixtures:
        refuse_without_text(data)
        return
    # of a mixture without path, the first folder gives the held-out rows
    folder = Path(data.path or data.mixed_folders[0])
    if (folder / "train").is_dir() and not (folder / "valid").is_dir():
        refuse_without_held_out(config, f"'{cut(str(folder))}' has no split valid")


def start(config_path: str, overrides: Sequence[str]) -> NoReturn:
    """Become the process that holds the ranks; never returns.

    Raises:
        BD3Error: as `local_launch`, before anything is started.
    """
    launch = local_launch(config_path, overrides, os.environ)
    # buffers do not survive exec
    sys.stdout.flush()
    sys.stderr.flush()
    # no process stays between the user's signal and the ranks' parent, with which the ranks die
    os.execve(launch.command[0], launch.command, launch.environment)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m launch.local`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(
            "usage: python -m launch.local CONFIG [section.key=value ...]", file=sys.stdout if arguments else sys.stderr
        )
        return 0 if arguments else 2
    config, *overrides = config_first(arguments)
    return run_command("bd3", lambda: start(config, overrides))


if __name__ == "__main__":
    sys.exit(main())
