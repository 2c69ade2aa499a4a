"""The sbatch script of a job: directives and values rendered from profile and run, then a body that never changes.

Everything that varies is a variable assigned above the body, so shellcheck reads `launch/templates/job.sh` as it stands.
Pure: text in, text out; what a value may hold is checked where profiles are read.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bd3_megatron.errors import final_codes
from launch.cluster import ClusterProfile
from launch.container import srun_options, wrapper
from launch.env import FIRST_PORT, NUM_PORTS, PORTS_A_JOB, rank_settings

BODY = Path(__file__).parent / "templates" / "job.sh"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission: what varies between the scripts of one cluster."""

    name: str
    """Job name; a chain is jobs of one name."""
    nodes: int
    """Nodes of the job."""
    folder: Path
    """Where script, resolved configuration and code snapshot lie (absolute)."""
    run_dirs: tuple[Path, ...]
    """Run folder of each array task; one without an array."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """One task a rank, or one torchrun a node."""
    chained: bool = False
    """One of several jobs of one name: the next one continues, this one does not requeue itself."""
    exclude_bad: bool = False
    """Requeue without the nodes that the preflight named."""
    max_attempts: int = 3
    """Attempts in a row without progress after which the job gives up."""
    python: str
    """Interpreter on the nodes."""


def script_of(profile: ClusterProfile, job: Job) -> str:
    """The whole sbatch script.

    Args:
        profile: the cluster's.
        job: this submission's.

    Returns:
        Text that ends with a newline; the same inputs give the same text.
    """
    lines = ["#!/bin/bash", *(f"#SBATCH {d}" for d in directives(profile, job)), "", *_values(profile, job), ""]
    return "\n".join(lines) + "\n" + BODY.read_text(encoding="utf-8")


def directives(profile: ClusterProfile, job: Job) -> list[str]:
    """The #SBATCH options, in a fixed order."""
    # torchrun is one task a node and starts the ranks itself, on the cores of all of them
    tasks, cpus = profile.ranks, profile.cpus_per_rank
    if job.launcher == "torchrun":
        tasks, cpus = 1, profile.ranks * profile.cpus_per_rank
    array = len(job.run_dirs) > 1
    # the order is fixed so that two scripts can be compared
    found = [
        f"--job-name={job.name}",
        f"--partition={profile.partition}",
        *_given("account", profile.account),
        *_given("qos", profile.qos),
        *_given("constraint", profile.constraint),
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        *_gpu_directive(profile),
        # to SLURM 0 means all memory of the node
        f"--mem={profile.memory_gb}G" if profile.memory_gb else "--mem=0",
        f"--time={profile.time}",
        # B: only the batch shell gets it, and tells the ranks
        f"--signal=B:USR1@{profile.signal_lead_seconds}",
        *(["--exclusive"] if profile.exclusive else []),
        *_given("exclude", profile.exclude),
        *([f"--mail-user={profile.mail_user}", "--mail-type=END,FAIL"] if profile.mail_user else []),
        *([f"--array=0-{len(job.run_dirs) - 1}"] if array else []),
        # jobs of one name and user run after one another
        *(["--dependency=singleton"] if job.chained else []),
        "--no-requeue" if job.chained else "--requeue",
        # a requeued job goes on in the same log
        "--open-mode=append",
        f"--output={job.folder}/{'%A_%a' if array else '%j'}.log",
        *profile.extra,
    ]
    return [_quoted_directive(d) for d in found]


def _given(option: str, value: str | None) -> list[str]:
    return [f"--{option}={value}"] if value is not None else []


def _gpu_directive(profile: ClusterProfile) -> list[str]:
    if not profile.gpus_per_node:
        return []
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    return [f"--gpus-per-node={kind}{profile.ranks}"]


def _quoted_directive(directive: str) -> str:
    # sbatch splits directives at blanks as a shell would, and reads # as a comment
    return f'"{directive}"' if set(directive) & set(" #'") else directive


def _values(profile: ClusterProfile, job: Job) -> list[str]:
    settings = {**rank_settings({}, gpu=profile.gpus_per_node > 0, local=False), **profile.environment}
    run_dirs = " ".join(shlex.quote(str(d)) for d in job.run_dirs)
    return [
        "# what varies; the rest of this file is the same for every job",
        f"job_folder={shlex.quote(str(job.folder))}",
        f"run_dirs=({run_dirs})",
        f"launcher={job.launcher}",
        f"ranks_per_node={profile.ranks}",
        f"chained={int(job.chained)}",
        f"exclude_bad={int(job.exclude_bad)}",
        f"max_attempts={job.max_attempts}",
        f"final_codes={shlex.quote(' '.join(map(str, final_codes())))}",
        f"signal_lead_seconds={profile.signal_lead_seconds}",
        f"first_port={FIRST_PORT} num_ports={NUM_PORTS} ports_a_job={PORTS_A_JOB}",
        f"excluded={shlex.quote(profile.exclude or '')}",
        f"python={shlex.quote(job.python)}",
        f"srun_options=({' '.join(map(shlex.quote, srun_options(profile.container)))})",
        f"wrapper=({' '.join(map(shlex.quote, wrapper(profile)))})",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(settings.items())),
        *_setup_lines(profile),
    ]


def _setup_lines(profile: ClusterProfile) -> list[str]:
    return [
        *(f"module load {shlex.quote(m)}" for m in profile.modules),
        *([f"source {shlex.quote(profile.environment_file)}"] if profile.environment_file else []),
        *profile.setup,
    ]
