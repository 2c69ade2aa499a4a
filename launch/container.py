"""Containers of a job: how ranks are started inside one, and whether they would see every path they open there.

Ranks run from copies on the host's file systems, under the names that the paths have on the login node: so each path must
lie below a folder that is mounted under its own name. Nothing here runs a container.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    mounts = [Path(mount.split(":")[0]) for mount in container.mounts if _keeps_its_name(mount)]
    for name, path in opened.items():
        # by name, not by what links point to: the ranks open the name
        if any(path.is_relative_to(mount) for mount in mounts):
            continue
        shown = f"{cut(either(mounts))} under its own name" if mounts else "no folder under its own name"
        raise LaunchError(
            f"{name}={cut(str(path))} is not visible in the container, which mounts {shown}; name a folder below one that is, "
            "or add it to cluster.container.mounts with the same path on both sides, as in /shared:/shared."
        )


def _keeps_its_name(mount: str) -> bool:
    # the third part is flags
    host, inside = mount.split(":")[:2]
    return Path(host) == Path(inside)
