"""From a temporary folder to a checkpoint, and the end of old ones: what rank 0 does with the file system.

Decides: manifest last, then one rename, then LATEST. A folder of the same step that is in the way (torn, or made by a run
that is being repeated) is moved aside under a name that is still a candidate, so that no moment has less than before.
Old checkpoints lose their names before they are deleted: a crash never leaves half of one.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

from bd3_megatron.checkpoint.files import record_of
from bd3_megatron.checkpoint.layout import (
    LATEST,
    MANIFEST,
    MANIFEST_DIGEST,
    REPLACED_SUFFIX,
    TEMPORARY_PREFIX,
    UNIVERSAL_SUFFIX,
    FileRecord,
    Manifest,
    digest_bytes,
    manifest_bytes,
    rank_name,
    step_name,
    step_of,
)
from bd3_megatron.checkpoint.verify import excess_files
from bd3_megatron.errors import CheckpointError
from bd3_megatron.files import discard, move, remove_leftovers, write_bytes, write_text

# Sidecars are looked for on a shared file system: short beside a write, long beside a directory look-up.
PUBLISH_POLL_SECONDS = 0.02


def publish(
    temporary: Path, manifest: Manifest, *, timeout_seconds: float, given_up: threading.Event | None = None
) -> Path:
    """Make a finished temporary folder a checkpoint.

    Args:
        temporary: every rank has written, or is still writing, its files and then its sidecar here.
        manifest: without files.
        timeout_seconds: for the slowest rank.
        given_up: set by another thread that knows of a rank that failed.

    Returns:
        The published folder.

    Raises:
        CheckpointError: a rank failed or did not end in time.
    """
    files = _collect(temporary, manifest.world_size, timeout_seconds, given_up or threading.Event())
    return publish_files(temporary, replace(manifest, files=files))


def publish_files(temporary: Path, manifest: Manifest) -> Path:
    """Write the manifest of a folder whose files are all there, and put the folder in its place."""
    _remove_excess_files(temporary, manifest)
    # The manifest comes after every file it names: a folder without one is not a checkpoint.
    content = manifest_bytes(manifest)
    write_bytes(temporary / MANIFEST, content)
    write_text(temporary / MANIFEST_DIGEST, f"{digest_bytes(content)}\n")
    target = temporary.parent / step_name(manifest.step)
    aside = temporary.parent / f"{target.name}{REPLACED_SUFFIX}"
    if target.exists():
        # Left by a process killed during an earlier replacement.
        discard(aside)
        move(target, aside)
        # Made from the folder that was just moved aside.
        discard(target.with_name(target.name + UNIVERSAL_SUFFIX))
    move(temporary, target)
    discard(aside)
    point_latest(target)
    return target


def point_latest(target: Path) -> None:
    """LATEST names `target`; replaced in one step."""
    write_text(target.parent / LATEST, f"{target.name}\n")


def _collect(
    temporary: Path, world_size: int, timeout_seconds: float, given_up: threading.Event
) -> dict[str, FileRecord]:
    """Wait for every rank's sidecar; what they and the sidecars themselves record."""
    deadline = time.monotonic() + timeout_seconds
    files: dict[str, FileRecord] = {}
    for rank in range(world_size):
        path = temporary / rank_name(rank)
        # Files and not a collective: this runs in a background thread beside the steps' own collectives, and a rank
        # that died is told by the deadline.
        while not path.is_file():
            if given_up.is_set() or time.monotonic() > deadline:
                raise CheckpointError(
                    f"rank {rank} did not finish writing {temporary} in {timeout_seconds:.0f} s; earlier checkpoints are intact."
                )
            given_up.wait(PUBLISH_POLL_SECONDS)
        tree = json.loads(path.read_bytes())
        # A rank that cannot write its tensors still writes the reason, so that nobody waits for the deadline.
        if tree.get("error"):
            raise CheckpointError(
                f"rank {rank} could not write {temporary.name} ({tree['error']}); earlier ones are intact."
            )
        files |= {name: FileRecord(**record) for name, record in tree["files"].items()}
        # A sidecar cannot hold its own checksum.
        files[rank_name(rank)] = record_of(path)
    return files


def _remove_excess_files(temporary: Path, manifest: Manifest) -> None:
    """Only what is listed enters a checkpoint: no script or pickle that somebody left beside the state."""
    for name in excess_files(temporary, manifest):
        (temporary / name).unlink()


def sweep(folder: Path) -> None:
    """Remove what interrupted saves and deletions left behind."""
    for path in folder.iterdir():
        # Only one save is in flight, and it has not begun: whatever is temporary was left.
        if path.is_dir() and path.name.startswith(TEMPORARY_PREFIX):
            shutil.rmtree(path)
    remove_leftovers(folder)


def delete_old(newest: Path, *, keep_last: int, keep_every_steps: int, finite_step: int | None = None) -> list[Path]:
    """Delete checkpoints that need not be kept, and universal forms of older ones; never `newest` nor a later step.

    Args:
        newest: the checkpoint just published.
        keep_last: how many of the newest stay, `newest` included; 0: all.
        keep_every_steps: multiples of this stay for ever; 0: none is special.
        finite_step: the newest checkpoint up to this step stays too; None: none is special.

    Returns:
        What was deleted.
    """
    current = step_of(newest.name)
    assert current is not None
    folders = [path for path in newest.parent.iterdir() if path.is_dir()]
    for path in folders:
        step = step_of(path.name.removesuffix(UNIVERSAL_SUFFIX))
        if path.name.endswith(UNIVERSAL_SUFFIX) and step is not None and step < current:
            # a form is for starting from its checkpoint, and nobody starts from there now
            discard(path)
    if keep_last == 0:
        return []
    # Folders moved aside are candidates for resuming, but are not counted as kept.
    found = {step_of(path.name): path for path in folders if not path.name.endswith(REPLACED_SUFFIX)}
    # Later steps, left by a run that went back to an earlier one, are not this save's to delete.
    older = sorted((step for step in found if step is not None and step <= current), reverse=True)
    # Where the loss-spike guard would go back to.
    finite = next((step for step in older if finite_step is not None and step <= finite_step), None)
    gone = [s for s in older[keep_last:] if s != finite and not (keep_every_steps and s % keep_every_steps == 0)]
    for step in gone:
        discard(found[step])
    return [found[step] for step in gone]
