"""Containers of a job: how ranks are started inside one, and whether they would see every path they open there.

Ranks run from copies on the host's file systems, under the names that the paths have on the login node: so each path must
lie below a folder that is mounted under its own name, what they write below one that is writable. Nothing here runs a container.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bd3_megatron.errors import LaunchError, cut, either
from launch.cluster import ClusterProfile, ContainerProfile


def srun_options(container: ContainerProfile) -> list[str]:
    """Options of srun: pyxis starts the container."""
    if not container.is_started_by_srun:
        return []
    # Python would find packages of the home folder before those of the image
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts, "--no-container-mount-home"]


def wrapper(profile: ClusterProfile) -> list[str]:
    """Words before the ranks' command: apptainer is a program that runs another."""
    container = profile.container
    if not container.is_a_program:
        return []
    gpu = ["--nv"] if profile.gpus_per_node else []
    return ["apptainer", "exec", *gpu, *(f"--bind={mount}" for mount in container.mounts), container.image]


def check_visible(container: ContainerProfile, opened: Mapping[str, Path]) -> None:
    """Refuse a path that ranks open and the container does not show.

    Args:
        container: of the profile.
        opened: what names each path in a sentence, for example "run.dir", and the absolute path.

    Raises:
        LaunchError: the path, what is mounted, and the mount that would show it.
    """
    if not container.is_used:
        return
    mounts = _mounts(container)
    for name, path in opened.items():
        mount = _mount_of(path, mounts)
        if mount is not None and mount.host == mount.inside:
            continue
        named = [mount.inside for mount in mounts if mount.host == mount.inside]
        shown = f"{cut(either(named))} under its own name" if named else "no folder under its own name"
        raise LaunchError(
            f"{name}={cut(str(path))} is not visible in the container, which mounts {shown}; name a folder below one that is, "
            "or add it to cluster.container.mounts with the same path on both sides, as in /shared:/shared."
        )


def check_writable_mounts(container: ContainerProfile, written: Mapping[str, Path]) -> None:
    """Refuse a path that ranks write to and the container mounts read-only.

    Args:
        container: of the profile.
        written: as `check_visible`; a path below no mount is the container's own and passes.

    Raises:
        LaunchError: the path and the mount.
    """
    mounts = _mounts(container) if container.is_used else []
    for name, path in written.items():
        mount = _mount_of(path, mounts)
        if mount is not None and mount.is_read_only:
            raise LaunchError(
                f"{name}={cut(str(path))} is written by the ranks, and the container mounts {cut(str(mount.inside))} "
                "read-only; drop ro from that entry of cluster.container.mounts, or name a folder below another."
            )


@dataclass(frozen=True)
class _Mount:
    host: Path
    inside: Path
    is_read_only: bool


def _mounts(container: ContainerProfile) -> list[_Mount]:
    split = [mount.split(":") for mount in container.mounts]
    # the third part is flags, which enroot joins by +
    return [_Mount(Path(host), Path(inside), "ro" in "+".join(flags).split("+")) for host, inside, *flags in split]


def _mount_of(path: Path, mounts: list[_Mount]) -> _Mount | None:
    """What a path inside the container leads to: the deepest mount above it, of equal ones the last."""
    # by name, not by what links point to: the ranks open the name
    above = [mount for mount in mounts if path.is_relative_to(mount.inside)]
    return max(reversed(above), key=lambda mount: len(mount.inside.parts), default=None)
