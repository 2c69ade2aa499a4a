"""Which checkpoint is complete: sizes and checksums of every file against the manifest.

Decides: the newest folder whose manifest is intact and whose every file is as it was written. Ranks share the reading
(file i is hashed by rank i mod world size) and come to one verdict. What is skipped is said, once, with the reason.
Costs: reading every byte of the checkpoint once, over all ranks; about 1.5 GB/s a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bd3_megatron.checkpoint import agree
from bd3_megatron.checkpoint.files import record_of
from bd3_megatron.checkpoint.layout import (
    MANIFEST,
    MANIFEST_DIGEST,
    Manifest,
    checkpoint_folders,
    inside,
    read_manifest,
)
from bd3_megatron.errors import CheckpointError


def newest_valid(checkpoints_dir: Path, *, warn: Callable[[str], None] | None = None) -> tuple[Path, Manifest] | None:
    """The newest complete and verified checkpoint. Collective when there is a process group.

    Args:
        checkpoints_dir: RUN_DIR/checkpoints.
        warn: told on rank 0, one sentence for each checkpoint that was skipped.

    Returns:
        Its folder and manifest, the same on every rank; None when there is none.
    """
    rank, _ = agree.rank_and_size()
    # Rank 0's listing, so that every rank makes the same collective calls in the same order.
    names = agree.from_first([path.name for path in checkpoint_folders(checkpoints_dir)])
    for name in names:
        path = checkpoints_dir / name
        problem = problem_of(path)
        if problem is None:
            return path, read_manifest(path)
        if warn is not None and rank == 0:
            warn(f"skips checkpoint {name}: {problem}")
    return None


def problem_of(path: Path) -> str | None:
    """Why a checkpoint cannot be used, in one sentence; None when it is complete and unaltered. Collective."""
    rank, size = agree.rank_and_size()
    try:
        manifest = read_manifest(path)
        problem = None
    except CheckpointError as error:
        manifest, problem = None, str(error)
    # a rank that cannot read the manifest must not leave the others in a collective
    problem = agree.first_failure(problem)
    if problem is not None or manifest is None:
        return problem
    # File i is hashed by rank i mod world size: every byte is read once, over all ranks.
    mine = sorted(manifest.files)[rank::size]
    found = next((text for text in (_file_problem(path, manifest, name) for name in mine) if text is not None), None)
    return agree.first_failure(found)


def verify(path: Path) -> Manifest:
    """The manifest of a checkpoint that is complete and unaltered. Collective.

    Raises:
        CheckpointError: it is not.
    """
    problem = problem_of(path)
    if problem is not None:
        raise CheckpointError(problem)
    return read_manifest(path)


def _file_problem(folder: Path, manifest: Manifest, name: str) -> str | None:
    expected, path = manifest.files[name], inside(folder, name)
    try:
        size = path.stat().st_size
        # Size first: a torn file is the common case and costs no read.
        if size != expected.bytes:
            return f"{path} has {size} bytes in place of {expected.bytes}; it is torn, use another checkpoint."
        if record_of(path) != expected:
            return f"{path} does not match its checksum; it was altered after it was written, use another checkpoint."
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); the checkpoint is incomplete, use another."
    return None


def excess_files(path: Path, manifest: Manifest) -> list[str]:
    """Files in the folder that the manifest does not name (they are never read)."""
    known = {*manifest.files, MANIFEST, MANIFEST_DIGEST}
    return sorted(
        str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and str(p.relative_to(path)) not in known
    )
