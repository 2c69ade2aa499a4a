#!/usr/bin/env python3
"""Submit a training run to SLURM: render, refuse what cannot run, snapshot, hand to sbatch.

    launch/slurm.py CONFIG --cluster configs/cluster/NAME.yaml [--nodes N] [--dry-run] [section.key=value ...]

Whatever can be refused is, before the queue sees anything and before anything is written; what only SLURM knows (unknown
partition, too many nodes) is asked of `sbatch --test-only`. Torch-free; under a second with --dry-run.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, add_config_arguments, run_tool
from bd3_megatron.config.load import RECORD_KEY, load_config, replace_field, with_later
from bd3_megatron.config.schema import Config
from bd3_megatron.config.unreached import unreached_settings
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import GridError, LaunchError, counted, shown
from launch.batch_script import Job, script_of
from launch.cluster import FOLDER, JOB_NAME, ClusterProfile, load_cluster
from launch.container import check_visible, check_writable_mounts
from launch.local import check_run_folder, check_training_data
from launch.prediction import prediction_lines
from launch.submission import paths_of, with_absolute_paths, write_submission, written_paths

MOST_JOBS = 1000
"""Of a chain or an array, as SLURM's MaxArraySize is by default."""
MOST_NODES = 100_000


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Everything that is decided before anything is written."""

    profile: ClusterProfile
    job: Job
    configs: tuple[Config, ...]
    script: str
    copies: int


def main(argv: Sequence[str] | None = None) -> int:
    """Submit, or with --dry-run print what would be submitted.

    Returns:
        0, or 2 with one line on stderr for a mistake in the input.
    """
    typed = list(sys.argv[1:] if argv is None else argv)

    def work(options: argparse.Namespace) -> int:
        submission = submission_of(options, Path.cwd(), datetime.now())
        if options.dry_run:
            print(submission.script, end="")
            print("\n".join(f"# {line}" for line in plan_lines(submission)))
        else:
            submit(submission, typed)
        return 0

    return run_tool(build_parser(), work, typed)


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="slurm", description="Submit a training run to SLURM.")
    add_config_arguments(parser)
    parser.add_argument("--cluster", metavar="FILE", required=True, type=Path, help="a profile of configs/cluster/")
    parser.add_argument("--nodes", type=int, help="nodes (default: what a given parallel.dp needs, else 1)")
    parser.add_argument("--ranks-per-node", type=int, help="ranks of a node, instead of the profile's")
    parser.add_argument("--time", help="time limit, instead of the profile's: [days-]hours:minutes:seconds")
    parser.add_argument("--name", help="job name (default: bd3- and the run folder's name)")
    parser.add_argument(
        "--launcher", choices=("srun", "torchrun"), default="srun", help="one task a rank, or one torchrun a node"
    )
    parser.add_argument(
        "--array",
        metavar='"KEY=VALUE ..."',
        action="append",
        default=[],
        help="overrides of one array task; repeat for each",
    )
    parser.add_argument(
        "--chain", metavar="N", type=int, default=1, help="N jobs after one another, none requeues itself"
    )
    parser.add_argument("--exclude-bad", action="store_true", help="requeue without nodes the preflight names")
    parser.add_argument("--max-attempts", type=int, default=3, help="attempts without progress before giving up (3)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script and the plan; write and submit nothing"
    )
    return parser


def submission_of(options: argparse.Namespace, here: Path, now: datetime) -> Submission:
    """Decide everything and refuse what cannot run; writes nothing.

    Args:
        options: of `build_parser`.
        here: working directory; relative paths of the configuration mean this one.
        now: names the submission's folder.

    Raises:
        ConfigError, GridError, LaunchError: one sentence with value, rule and remedy.
    """
    profile = _profile(options)
    _check_typed(options)
    main_config = with_absolute_paths(load_config(options.config, options.overrides), here)
    nodes = nodes_of(main_config, profile, options.nodes)
    configs = _array_configs(options, main_config, here) if options.array else (main_config,)
    run_dir = Path(main_config.run.dir)
    folder = run_dir / "slurm" / now.strftime("%Y%m%d-%H%M%S")
    for config in configs:
        validate(config, world_size=nodes * profile.ranks)
        FOLDER.check(config.run.dir, "run.dir")
        check_run_folder(config)
        check_training_data(config)
        check_visible(profile.container, {**paths_of(config), "the code's folder": folder})
        check_writable_mounts(profile.container, written_paths(config, profile.environment))
    job = Job(
        # of a folder's name, what a job's name may hold
        name=re.sub(r"[^\w.+-]", "-", f"bd3-{run_dir.name}") if options.name is None else options.name,
        nodes=nodes,
        folder=folder,
        run_dirs=tuple(Path(c.run.dir) for c in configs),
        launcher=options.launcher,
        chained=options.chain > 1,
        exclude_bad=options.exclude_bad,
        max_attempts=options.max_attempts,
        python=profile.container.python if profile.container.is_used else profile.python or sys.executable,
    )
    return Submission(profile=profile, job=job, configs=configs, script=script_of(profile, job), copies=options.chain)


def _check_typed(options: argparse.Namespace) -> None:
    for name, number in (("--chain", options.chain), ("--max-attempts", options.max_attempts)):
        if not 1 <= number <= MOST_JOBS:
            raise LaunchError(f"{name} {number} is outside [1, {MOST_JOBS}]; give a number inside.")
    if len(options.array) > MOST_JOBS:
        raise LaunchError(f"{len(options.array)} --array tasks are more than SLURM takes; give at most {MOST_JOBS}.")
    if options.chain > 1 and options.array:
        raise LaunchError("--chain with --array: tasks of an array would wait for each other; submit one of them.")
    if options.name is not None:
        JOB_NAME.check(options.name, "--name")


def _profile(options: argparse.Namespace) -> ClusterProfile:
    changes = {"ranks_per_node": options.ranks_per_node, "time": options.time}
    return load_cluster(options.cluster, {k: v for k, v in changes.items() if v is not None})


def _array_configs(options: argparse.Namespace, main_config: Config, here: Path) -> tuple[Config, ...]:
    tasks: list[Config] = []
    found = []
    for number, overrides in enumerate(options.array):
        try:
            own = shlex.split(overrides)
        except ValueError as error:
            raise LaunchError(f"--array {shown(overrides)} is no shell text ({error}); mend its quotes.") from error
        config = with_absolute_paths(load_config(options.config, with_later(options.overrides, own)), here)
        # which keys were named, and in which order, makes no other run
        what_runs = replace_field(config, RECORD_KEY, ())
        if what_runs in tasks:
            raise LaunchError(
                f"--array {shown(options.array[tasks.index(what_runs)])} and --array {shown(overrides)} are the same run; "
                "leave one of them out."
            )
        tasks.append(what_runs)
        if config.run.dir == main_config.run.dir:
            config = replace_field(config, "run.dir", f"{main_config.run.dir}-{number}")
        found.append(config)
    # a folder has one owner: the second task would be refused on the nodes
    folders = [c.run.dir for c in found]
    if len(set(folders)) < len(folders):
        raise LaunchError(f"--array tasks share a run folder ({folders}); give each its own run.dir or none.")
    return tuple(found)


def nodes_of(config: Config, profile: ClusterProfile, asked: int | None) -> int:
    """Nodes of the job: asked for, or what a given dp needs, or one.

    Raises:
        GridError: nodes x ranks do not make the grid.
    """
    per_node, parallel = profile.ranks, config.parallel
    wanted = parallel.world_size() if parallel.dp is not None else None
    if asked is not None and not 1 <= asked <= MOST_NODES:
        raise GridError(f"--nodes {asked} is outside [1, {MOST_NODES}]; ask for the nodes of the grid.")
    if wanted is None:
        nodes = asked or 1
        if nodes * per_node % parallel.model_ranks:
            axes = f"tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} = {parallel.model_ranks}"
            raise GridError(
                f"{counted(nodes, 'node')} x {counted(per_node, 'rank')} = {nodes * per_node} is not a multiple of {axes}; "
                f"use --nodes {_fitting_nodes(per_node, parallel.model_ranks)} or a multiple of it."
            )
        return nodes
    # what a given dp needs, rounded up so that the sentence below can name it
    nodes = asked or -(-wanted // per_node)
    if nodes * per_node != wanted:
        axes = f"tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp} x dp={parallel.dp} = {wanted}"
        exact = f"use --nodes {wanted // per_node} or " if wanted % per_node == 0 else "use --ranks-per-node or "
        raise GridError(
            f"{counted(nodes, 'node')} x {counted(per_node, 'rank')} = {nodes * per_node} do not match {axes}; "
            f"{exact}leave parallel.dp unset."
        )
    return nodes


def _fitting_nodes(per_node: int, model_ranks: int) -> int:
    # the least n for which model_ranks divides n x per_node
    return model_ranks // math.gcd(per_node, model_ranks)


def plan_lines(submission: Submission) -> list[str]:
    """What a person wants to know before the queue does: grid, memory, speed, folders."""
    config, job, profile = submission.configs[0], submission.job, submission.profile
    parallel, ranks = config.parallel, job.nodes * profile.ranks
    dp = ranks // parallel.model_ranks
    axes = f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {dp}"
    tasks = f", {len(submission.configs)} array tasks" if len(submission.configs) > 1 else ""
    chain = f", a chain of {submission.copies} jobs" if submission.copies > 1 else ""
    lines = [
        f"job      {job.name} on partition {profile.partition}, limit {profile.time}{tasks}{chain}",
        f"grid     {counted(job.nodes, 'node')} x {counted(profile.ranks, 'rank')} = {axes}, {job.launcher}",
        *prediction_lines(replace_field(config, "parallel.dp", dp), profile),
        f"folder   {job.folder}",
        f"ranks    {Path(config.run.dir) / 'logs'}/JOB.ATTEMPT/rank-N.log",
    ]
    if parallel.tp > profile.ranks:
        lines.append(
            f"warning  tp={parallel.tp} spans nodes of {counted(profile.ranks, 'rank')}: its traffic leaves the node"
        )
    # tasks of an array mostly share them
    said = dict.fromkeys(sentence for task in submission.configs for sentence in unreached_settings(task))
    return [*lines, *(f"warning  {sentence}" for sentence in said)]


def submit(submission: Submission, typed: Sequence[str]) -> None:
    """Test with sbatch, write the folder, submit, and say where everything is.

    Raises:
        LaunchError: sbatch is absent or refuses the job; then nothing was submitted.
    """
    # only SLURM knows its partitions, limits and accounts
    _sbatch(["--test-only"], submission.script)
    folder = submission.job.folder
    try:
        write_submission(folder, submission.configs, submission.script, typed)
    except OSError as error:
        raise LaunchError(f"'{folder}' cannot be written ({error.strerror}); choose another run.dir.") from error
    # on a cluster of several SLURMs the id comes as id;cluster
    numbers = [_sbatch(["--parsable"], submission.script).split(";")[0].strip() for _ in range(submission.copies)]
    print("\n".join(plan_lines(submission)))
    log = f"{folder}/{'JOB_TASK' if len(submission.configs) > 1 else numbers[0]}.log"
    print(f"job id   {', '.join(numbers)}")
    print(f"watch    tail -F {log}    squeue --jobs {','.join(numbers)}")
    print(f"stop     scancel {' '.join(numbers)}    (saves first; the same command then continues)")


def _sbatch(options: Sequence[str], script: str) -> str:
    # a job that submits another one must not pass its own settings on
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_")) or k == "SLURM_CONF"
    }
    try:
        done = subprocess.run(
            ["sbatch", *options], input=script, env=clean, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise LaunchError("sbatch is not on this machine; run this on a login node, or look with --dry-run.") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.replace("sbatch: error:", "").replace("allocation failure:", "").split())
        raise LaunchError(
            f"sbatch refuses the job ({said}); nothing was submitted: mend the cluster profile or --nodes."
        )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
