"""A cluster's profile: what a site wants of every job, as data in configs/cluster/NAME.yaml.

Names, units and forms of its keys are here, and what a profile alone can refute. It knows nothing about any run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from bd3_megatron.config.load import build
from bd3_megatron.config.ranges import FilePath, Matches, Range
from bd3_megatron.config.yaml_file import read_yaml
from bd3_megatron.errors import ConfigError, LaunchError, cut, shown
from bd3_megatron.planner.machines import ClusterFile

# what sbatch reads as one word; a quote or blank would end the directive early
SITE_NAME = Matches(r"[\w@+][\w.,@+-]*", "a name of letters, digits and . , @ + _ -")
FEATURES = Matches(r"[\w(\[!][\w.,:&|*()\[\]!=+-]*", "node features joined by & or |")
NODES = Matches(r"[\w/][\w.,/\[\]-]*", "a list of nodes such as n[3,7]")
ADDRESS = Matches(r"[^\s\"'\\,]+", "one mail address")
MODULE = Matches(r"[^\s\"'\\]+", "one module's name")
VARIABLE = Matches(r"[A-Za-z_]\w*", "a variable's name: letters, digits and _")
OPTION = Matches(r"--?[A-Za-z][^\x00-\x1f\"\\]*", "an option of sbatch such as --comment=text, without quotes")
JOB_NAME = Matches(r"[^\x00-\x1f\"\\/,%]{1,200}", "a job's name: one line without quotes and / , %")
FOLDER = Matches(r"[^\"\\%]+", "a path that SLURM reads as it stands: without double quotes, backslashes and %")
SLURM_EARLY_SECONDS = 60
"""By so much SLURM may send a signal too early."""
LONGEST_DAYS = 365


@dataclass(frozen=True, kw_only=True)
class ContainerProfile:
    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """pyxis: enroot images through srun's own flags. apptainer: the command is wrapped in `apptainer exec`."""
    image: Annotated[str, Matches(r"[^\s\"'~\\][^\s\"'\\]*|", "an image without blanks, quotes and a leading ~")] = ""
    """Image of the container: a registry reference or .sqsh file (pyxis), a .sif file (apptainer)."""
    mounts: tuple[Annotated[str, Matches(r"/[^:,]*:/[^:,]*(:[\w=+-]+)?", "a mount /host:/container")], ...] = ()
    """host:container pairs; the run folder, the snapshot and the data must be among them or below one of them."""
    python: Annotated[str, FilePath()] = "python3"
    """Interpreter inside the image; the host's virtual environment is not visible there."""

    @property
    def is_used(self) -> bool:
        """Ranks run in a container."""
        return self.kind != "none"

    @property
    def is_started_by_srun(self) -> bool:
        """pyxis: options of srun."""
        return self.kind == "pyxis"

    @property
    def is_a_program(self) -> bool:
        """apptainer: a program that runs another."""
        return self.kind == "apptainer"


@dataclass(frozen=True, kw_only=True)
class ClusterProfile:
    partition: Annotated[str, SITE_NAME]
    """Queue the job is put in."""
    account: Annotated[str, SITE_NAME] | None = None
    """Whom the hours are charged to; None: the site's default."""
    qos: Annotated[str, SITE_NAME] | None = None
    """Quality of service; None: the site's default."""
    constraint: Annotated[str, FEATURES] | None = None
    """Node features, for example "a100&ib"."""
    gpus_per_node: Annotated[int, Range(0, 1000)] = 0
    """GPUs of a node, one rank each; 0: a CPU job."""
    gpu_type: Annotated[str, SITE_NAME] | None = None
    """SLURM's name of the GPU model (as in gres.conf); None: any."""
    ranks_per_node: Annotated[int, Range(1, 1000)] | None = None
    """Ranks of a node; None: gpus_per_node."""
    cpus_per_rank: Annotated[int, Range(1, 1000)] = 1
    """Cores a rank may use: itself, its loader processes, its communication threads."""
    memory_gb: Annotated[int, Range(0, 1e6)] = 0
    """Memory of a node for the job in GiB; 0: all of it."""
    time: str = "24:00:00"
    """Time limit: [days-]hours:minutes:seconds. A job that is not done then requeues itself."""
    # sbatch takes 16 bits
    signal_lead_seconds: Annotated[int, Range(1, 65535)] = 180
    """How long before the limit ranks are told to save: a step, a save, and SLURM's own 60 s of imprecision."""
    exclusive: bool = True
    """Nobody else on the nodes."""
    exclude: Annotated[str, NODES] | None = None
    """Nodes never to be used, as SLURM writes them: n[3,7]."""
    mail_user: Annotated[str, ADDRESS] | None = None
    """Address for mail at end and failure; None: no mail."""
    modules: tuple[Annotated[str, MODULE], ...] = ()
    """`module load` these."""
    setup: tuple[str, ...] = ()
    """Shell lines run on the first node before the ranks start."""
    environment_file: Annotated[str, FilePath()] | None = None
    """A file of export lines that is sourced (secrets such as a tracker's key belong there, not here)."""
    # other names would end the export line early
    environment: dict[Annotated[str, VARIABLE], str] = field(default_factory=dict)
    """Variables of every rank; they win over launch/env.py's table."""
    python: Annotated[str, FilePath()] | None = None
    """Interpreter on the nodes; None: the one that submits."""
    # checked where it is used: the planner knows its devices
    planner_gpu: str | None = None
    """Device as tools/plan.py names it (a100-80g, h100-sxm, ...); None: no speed is predicted."""
    planner: ClusterFile = field(default_factory=ClusterFile)
    """The planner's numbers for this cluster; peak_tflops is needed with planner_gpu."""
    container: ContainerProfile = field(default_factory=ContainerProfile)
    """Where the ranks run."""
    extra: tuple[Annotated[str, OPTION], ...] = ()
    """Further sbatch options, as on its command line."""

    @property
    def ranks(self) -> int:
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node


def load_cluster(path: Path, changes: Mapping[str, Any] | None = None) -> ClusterProfile:
    """Read a profile and refuse what it alone can refute.

    Args:
        path: a YAML file.
        changes: keys of the command line, which replace the file's.

    Raises:
        ConfigError: missing file, unknown or missing key, wrong type, a number outside its range.
        LaunchError: no ranks, or times that cannot hold a save.
    """
    tree = read_yaml(path, "cluster profile", "a copy of one of configs/cluster/ that names your partition") or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"cluster profile '{cut(str(path))}' holds {shown(tree)}, not keys; see configs/cluster/.")
    profile: ClusterProfile = build(ClusterProfile, tree | dict(changes or {}), where="cluster")
    check_cluster(profile)
    return profile


def check_cluster(profile: ClusterProfile) -> None:
    """Rules between the keys of a profile.

    Raises:
        LaunchError: one sentence with value, rule and remedy.
    """
    if profile.ranks < 1:
        raise LaunchError(
            f"cluster.gpus_per_node={profile.gpus_per_node} and cluster.ranks_per_node={profile.ranks_per_node} "
            "leave a node without ranks; set one of them to at least 1."
        )
    # fewer ranks than GPUs are a way to leave some to others
    if profile.gpus_per_node and profile.ranks > profile.gpus_per_node:
        raise LaunchError(
            f"cluster.ranks_per_node={profile.ranks} exceeds gpus_per_node={profile.gpus_per_node}, and two ranks cannot "
            f"share a GPU; use {profile.gpus_per_node} or leave ranks_per_node unset."
        )
    # ranks are told to save so long before the end; less than that leaves no step
    limit = seconds_of(profile.time)
    if limit <= profile.signal_lead_seconds + SLURM_EARLY_SECONDS:
        raise LaunchError(
            f"cluster.time={profile.time} leaves no time to train: ranks are told to save {profile.signal_lead_seconds} s "
            f"before the limit and SLURM may do so {SLURM_EARLY_SECONDS} s early; raise time or lower signal_lead_seconds."
        )
    _check_environment(profile.environment)
    if profile.container.is_used and not profile.container.image:
        raise LaunchError(
            f"cluster.container.kind={profile.container.kind} without an image; set cluster.container.image."
        )


def _check_environment(environment: Mapping[str, str]) -> None:
    # without them a batch script finds none of its programs, and programs no folder for what they keep
    for name in ("PATH", "HOME"):
        if name in environment and not environment[name].strip():
            raise ConfigError(
                f"cluster.environment.{name}={shown(environment[name])} is empty, and the job would find "
                f"{'no program' if name == 'PATH' else 'no home folder'}; give its value, or leave it out."
            )


def seconds_of(limit: str) -> int:
    """Seconds of a SLURM time limit "[days-]hours:minutes:seconds".

    Raises:
        LaunchError: another form (SLURM's shorter forms are read in surprising ways: "30" is minutes, "1-2" days-hours).
    """
    found = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,4}):([0-5]\d):([0-5]\d)", limit, re.ASCII)
    if found is None:
        raise LaunchError(
            f'cluster.time={shown(limit)} is not [days-]hours:minutes:seconds; write for example "1-12:00:00".'
        )
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    if days * 24 + hours > LONGEST_DAYS * 24 or (found[1] is not None and hours > 23):
        raise LaunchError(
            f"cluster.time={shown(limit)} is more than {LONGEST_DAYS} days, or has days and more than 23 hours; write for "
            'example "1-12:00:00".'
        )
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
