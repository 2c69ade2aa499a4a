"""Where a checkpoint's files are and what its manifest says.

Contract: RUN_DIR/checkpoints/step_00000030 holds manifest.json (`Manifest`, guarded by manifest.sha256), one sidecar a rank
(rank_00003.json), and the files these name; beside it stand its universal form (universal.py) and the pointer LATEST.
A checkpoint is complete when its manifest is there and every file it names has the size and SHA-256 it says.
Refuses: paths in a manifest that leave the folder, manifests of a newer version, anything that is not plain JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from bd3_megatron.checkpoint.manifest_fields import SHARDED_KIND, WHOLE_KIND, check_manifest
from bd3_megatron.errors import CheckpointError, counted

# Raised when a reader of today would misread a file of tomorrow; older programs refuse new fields by name.
VERSION = 1
# For people and tools. Resuming does not trust it: it takes the newest folder that verifies.
LATEST = "LATEST"
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
# DeepSpeed's own sharded state, *.pt: the tag that its save_checkpoint is given.
STATE_DIR = "deepspeed"
# Shards of the averaged weights, tensor for tensor as the fp32 partitions lie in deepspeed/.
EMA_DIR = "ema"
# Expert biases of a stage: fp32, moved by no optimizer, so in no partition.
BIAS_DIR = "biases"
WEIGHTS_KIND, AVERAGES_KIND = "fp32", "ema"
"""Kinds of state beside Adam's moments: the weights, and their moving averages."""
# In place of both in checkpoints of kind "whole" (imported or averaged weights).
WEIGHTS_DIR = "weights"
UNIVERSAL_SUFFIX = ".universal"
# The older folder of a step that was saved twice, until the new one has its name; it is still a candidate.
REPLACED_SUFFIX = ".replaced"
# Starts unlike a step, so that nothing takes a folder that is being written for a checkpoint.
TEMPORARY_PREFIX = ".tmp_"
_PLAIN_NAME = re.compile(r"[\w.,=+@/-]{1,200}")
"""Names of files in manifests and indices: no control characters, no backslashes, nothing longer than disks take."""
# Eight digits keep names in order of steps in a directory listing; longer runs get longer names.
_STEP_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a checkpoint that is not tensors."""

    step: int
    """Optimizer updates done."""
    samples_consumed: int
    """Position in the order of data."""
    grid: dict[str, int]
    """Sizes of the axes tp, pp, vpp, cp, dp."""
    zero_stage: int
    world_size: int
    config: dict[str, Any]
    """The resolved configuration, as config.load.to_tree gives it."""
    git_commit: str | None
    seeds: dict[str, int]
    vocab_size: int
    """V, mask id included, without padding rows."""
    mask_id: int | None
    train_state: dict[str, Any]
    """The trainer's own state (phase, interval, run ids): plain JSON that checkpoint/ does not read."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Counters of the optimizer: adam_step, skipped_steps, global_steps, ema_updates, loss_scale."""
    software: dict[str, str] = field(default_factory=dict)
    """Versions that wrote it."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """How the run's likelihood is measured (data/convention.py), in JSON; empty: the defaults."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where imported or averaged weights came from; empty for a run's own checkpoints."""
    kind: str = SHARDED_KIND
    """sharded: written by a run, cut over its ranks. whole: weights only, parameter by parameter."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    version: int = VERSION

    @property
    def is_whole(self) -> bool:
        """Weights only, whole; no rank of a run wrote them."""
        return self.kind == WHOLE_KIND


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step a folder name stands for, or None when it is not a checkpoint's."""
    match = _STEP_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def rank_name(rank: int) -> str:
    """What rank `rank` says about the files it wrote."""
    return f"rank_{rank:05d}.json"


def ema_name(rank: int) -> str:
    """Rank `rank`'s shards of the averaged weights."""
    return f"{EMA_DIR}/rank_{rank:05d}.safetensors"


def bias_name(rank: int) -> str:
    """The expert biases of a pipeline stage, as rank `rank` wrote them."""
    return f"{BIAS_DIR}/rank_{rank:05d}.safetensors"


def checkpoint_folders(checkpoints_dir: Path) -> list[Path]:
    """Folders that may hold a checkpoint, newest first; one that was being replaced stands behind its successor."""
    if not checkpoints_dir.is_dir():
        return []
    found = [(step_of(p.name), p) for p in checkpoints_dir.iterdir() if p.is_dir()]
    # False sorts before True, and the list is reversed: of one step the complete successor is tried first.
    known = [(step, not path.name.endswith(REPLACED_SUFFIX), path) for step, path in found if step is not None]
    return [path for _, _, path in sorted(known, reverse=True)]


def digest_bytes(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a manifest in `folder`.

    Raises:
        CheckpointError: an absolute name, one with `..`, or a link that leads out of the folder.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or not _PLAIN_NAME.fullmatch(name):
        raise CheckpointError(
            f"{folder}: the manifest names '{name!r:.80}', which leaves the folder or is no plain name; "
            "do not use this checkpoint."
        )
    path = folder / pure
    # A link inside the folder could point anywhere, whatever its name says.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}: '{name}' is a link out of the folder; do not use this checkpoint.")
    return path


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is written."""
    # Sorted keys: equal states give equal bytes, and so equal digests.
    return (json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, itself checked; its files are not (see verify.py).

    Raises:
        CheckpointError: missing, torn, altered, of a newer version, or naming files outside the folder.
    """
    content = _read(folder / MANIFEST)
    recorded = _read(folder / MANIFEST_DIGEST)
    # Before the JSON is read: a torn write must not be reported as a syntax error.
    if recorded != (digest_bytes(content) + "\n").encode():
        raise CheckpointError(f"{folder / MANIFEST} does not match its checksum; use another checkpoint.")
    return parse_manifest(content, folder)


def parse_manifest(content: bytes, folder: Path) -> Manifest:
    """A manifest from its bytes.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    try:
        tree = json.loads(content)
    # A hostile file may nest deeper than Python's stack.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not JSON ({error}); use another checkpoint.") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("version"), int):
        raise CheckpointError(f"{folder / MANIFEST} has no version; use another checkpoint.")
    if tree["version"] > VERSION:
        raise CheckpointError(
            f"{folder} has manifest version {tree['version']}, this program reads up to {VERSION}; use a newer bd3_megatron."
        )
    # A field of a newer program may change what the others mean, so it is not dropped silently.
    unknown = sorted(set(tree) - {f.name for f in fields(Manifest)})
    if unknown:
        raise CheckpointError(
            f"{folder / MANIFEST} has the unknown field '{unknown[0]:.80}'; use a newer bd3_megatron, or another checkpoint."
        )
    # Fields that were added later have defaults: checkpoints of older versions stay readable.
    tree = _defaults() | tree
    check_manifest(tree, folder / MANIFEST)
    manifest = Manifest(**{**tree, "files": {name: FileRecord(**record) for name, record in tree["files"].items()}})
    _check_complete(manifest, folder)
    return manifest


def _defaults() -> dict[str, Any]:
    """Values of fields that are younger than a manifest may be."""
    made = {f.name: f.default_factory() for f in fields(Manifest) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(Manifest) if f.default is not MISSING}


def _check_complete(manifest: Manifest, folder: Path) -> None:
    """Refuse a list of files without those that a checkpoint of this kind cannot do without."""
    for name in manifest.files:
        inside(folder, name)
    if manifest.is_whole:
        complete = any(name.startswith(f"{WEIGHTS_DIR}/") for name in manifest.files)
    else:
        complete = all(rank_name(rank) in manifest.files for rank in range(manifest.world_size))
    if not complete:
        what = "weights" if manifest.is_whole else f"the sidecars of {counted(manifest.world_size, 'rank')}"
        raise CheckpointError(
            f"{folder / MANIFEST} lists no complete checkpoint: {what} are not among its {counted(len(manifest.files), 'file')}; "
            "use another."
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); use another checkpoint.") from None
