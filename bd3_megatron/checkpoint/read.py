"""Read a checkpoint in one process: no process group, no DeepSpeed, no megatron, parameter by parameter.

Decides: a parameter is assembled from the pieces the ranks' sidecars name: data-parallel pieces by their offsets, then
tensor-parallel shards by the one table of how parameters are cut (model/partition).
Refuses: parameters with holes, sidecars that contradict each other, kinds of state that were not saved.
Costs: the parameter asked for, and the mapped pages of what was read since the files were last let go (at most
RELEASE_BYTES).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bd3_megatron.checkpoint import agree
from bd3_megatron.checkpoint.layout import (
    AVERAGES_KIND,
    STATE_DIR,
    WEIGHTS_DIR,
    WEIGHTS_KIND,
    Manifest,
    bias_name,
    ema_name,
    inside,
    rank_name,
    read_manifest,
)
from bd3_megatron.checkpoint.manifest_fields import check_sidecar, is_parameter_name
from bd3_megatron.checkpoint.restricted_pickle import open_pt
from bd3_megatron.errors import CheckpointError
from bd3_megatron.model.partition import EXPERT_BIAS, Partition, partition_of

RELEASE_BYTES = 2**27
"""Mapped files are closed after this much was read through them, so that their pages do not count as this process's."""
READ_ELEMENTS = 2**24
"""Elements copied at a time."""
KIND_OF = {
    "model": WEIGHTS_KIND,
    WEIGHTS_KIND: WEIGHTS_KIND,
    AVERAGES_KIND: AVERAGES_KIND,
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
}
"""What a caller may ask for, and what it is called in files."""


@dataclass(frozen=True)
class StoredPiece:
    """Where some elements of a parameter's shard are."""

    rank: int
    tp_rank: int
    ep_rank: int
    pp_rank: int
    index: int
    start: int
    numel: int
    offset: int


@dataclass
class _Stored:
    """A parameter over all ranks: the shape of one shard, and its pieces."""

    shape: tuple[int, ...]
    pieces: list[StoredPiece] = field(default_factory=list)


class ShardedReader:
    """Whole tensors from a checkpoint of a run.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        sidecars: what each rank wrote about its files, in rank order; None: read here.
    """

    def __init__(self, folder: Path, manifest: Manifest, sidecars: Sequence[dict[str, Any]] | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        # A gate makes the MLP's first matrix two stacked ones, which tensor parallelism cuts one by one.
        self._gated = manifest.config["model"].get("style", "modern") == "modern"
        self._state_file: dict[int, str] = {}
        self._stage: dict[int, int] = {}
        # A kind can be read only if every rank saved it.
        self._kinds: set[str] = set(KIND_OF.values())
        self._stored: dict[str, _Stored] = {}
        self._bias_file: dict[str, str] = {}
        for rank in range(manifest.world_size):
            self._take_sidecar(rank, read_sidecar(folder, rank) if sidecars is None else sidecars[rank])
        self._open: dict[Path, Any] = {}
        self._read_bytes = 0

    def names(self) -> list[str]:
        """Global parameter names, in order of depth."""
        return sorted(self._stored, key=_depth)

    def bias_names(self) -> list[str]:
        """Global names of expert biases, which are no parameters and have weights alone, in order of depth."""
        return sorted(self._bias_file, key=_depth)

    def kinds(self) -> list[str]:
        """What `tensor` can be asked for: fp32 (the model), exp_avg, exp_avg_sq, ema."""
        return sorted(self._kinds)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter, padding rows of the vocabulary included."""
        if name in self._bias_file:
            return tuple(self._bias(name).shape)
        shape, partition = list(self._find(name).shape), partition_of(name, gated=self._gated)
        if partition.dim is not None:
            # The sidecars hold the shape of one tensor-parallel shard.
            shape[partition.dim] *= self._size_along(partition)
        return tuple(shape)

    def tensor(self, name: str, which: str = "model") -> Tensor:
        """One whole parameter, fp32.

        Args:
            name: global name.
            which: "model", "ema", "exp_avg" or "exp_avg_sq".

        Raises:
            CheckpointError: an unknown name, state that was not saved, or pieces that do not fit together.
        """
        kind = checked_kind(which, self._kinds, self.folder)
        if name in self._bias_file and kind in (WEIGHTS_KIND, AVERAGES_KIND):
            # no average is kept of what the optimizer does not move
            return self._bias(name)
        partition = partition_of(name, gated=self._gated)
        size = 1 if partition.dim is None else self._size_along(partition)
        # before memory is taken: a sidecar from outside may name any shape
        pieces = [self._pieces(name, rank, partition.axis) for rank in range(size)]
        try:
            whole = torch.empty(self.shape(name), dtype=torch.float32)
            for rank, mine in enumerate(pieces):
                targets = views_of_shard(whole, partition, (rank, size))
                if len(targets) == 1 and targets[0].is_contiguous():
                    # cut along rows: straight into place
                    self._fill_shard(targets[0].view(-1), mine, kind)
                    continue
                shard = torch.empty(self._find(name).shape, dtype=torch.float32)
                self._fill_shard(shard.view(-1), mine, kind)
                parts = shard.chunk(partition.strides, dim=partition.dim or 0)
                for target, part in zip(targets, parts, strict=True):
                    target.copy_(part)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder}: the files do not hold '{name}' as their sidecars say ({error!s:.100}); use another checkpoint."
            ) from None
        return whole

    def _bias(self, name: str) -> Tensor:
        with open_safetensors(inside(self.folder, self._bias_file[name])) as opened:
            return opened.get_tensor(name).float()

    def close(self) -> None:
        """Let go of every mapped file."""
        self._open.clear()
        self._read_bytes = 0

    def _size_along(self, partition: Partition) -> int:
        # checkpoints from before there were experts know no ep
        return self.manifest.grid.get(partition.axis, 1)

    def _pieces(self, name: str, rank: int, axis: str) -> list[StoredPiece]:
        """The pieces of the shard of rank `rank` along `axis`, in the order of its elements, without a hole."""
        stored = self._find(name)
        mine = [piece for piece in stored.pieces if (piece.ep_rank if axis == "ep" else piece.tp_rank) == rank]
        # a table tied across the pipeline is on two stages
        # Its copies are equal, for their gradients are summed; the first stage's is read.
        first_stage = min((piece.pp_rank for piece in mine), default=0)
        pieces = sorted((p for p in mine if p.pp_rank == first_stage), key=lambda piece: piece.offset)
        filled, wanted = 0, math.prod(stored.shape)
        for piece in pieces:
            # A hole or an overlap: a missing rank's elements would read as whatever memory held.
            if piece.offset != filled:
                break
            filled += piece.numel
        if filled != wanted:
            raise CheckpointError(
                f"{self.folder}: '{name}' has {filled} of {wanted} elements on {axis} rank {rank}; use another checkpoint."
            )
        return pieces

    def _fill_shard(self, flat: Tensor, pieces: list[StoredPiece], kind: str) -> None:
        for piece in pieces:
            # In parts, so that the pages of a large piece can be let go before its end.
            for start in range(0, piece.numel, READ_ELEMENTS):
                end = min(start + READ_ELEMENTS, piece.numel)
                flat[piece.offset + start : piece.offset + end] = self._elements(piece, kind, (start, end))

    def _elements(self, piece: StoredPiece, kind: str, part: tuple[int, int]) -> Tensor:
        if self._read_bytes > RELEASE_BYTES:
            self.close()
        start, end = piece.start + part[0], piece.start + part[1]
        # Four bytes an element: all state is stored in fp32.
        self._read_bytes += 4 * (end - start)
        if kind == AVERAGES_KIND:
            return self._averages(piece.rank).get_slice(f"shard.{piece.index}")[start:end]
        return flat_groups(self._state(piece.rank), self._stage[piece.rank], kind)[piece.index][start:end]

    def _state(self, rank: int) -> Any:
        path = inside(self.folder, f"{STATE_DIR}/{self._state_file[rank]}")
        if path not in self._open:
            self._open[path] = open_pt(path)["optimizer_state_dict"]
        return self._open[path]

    def _averages(self, rank: int) -> Any:
        path = inside(self.folder, ema_name(rank))
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self.folder} holds no parameter '{name}'; it is of another model.")
        return self._stored[name]

    def _take_sidecar(self, rank: int, tree: dict[str, Any]) -> None:
        self._state_file[rank], self._stage[rank] = tree["state_file"], tree["zero_stage"]
        self._kinds &= set(tree["kinds"])
        self._bias_file |= dict.fromkeys(tree.get("biases", []), bias_name(rank))
        for name, shape in tree["shapes"].items():
            known = self._stored.setdefault(name, _Stored(tuple(shape)))
            dim = partition_of(name, gated=self._gated).dim
            if known.shape != tuple(shape) or (dim is not None and dim >= len(shape)):
                raise CheckpointError(
                    f"{self.folder / rank_name(rank)}: '{name}' has shape {shape}, which is not that of rank 0 or has "
                    "too few dimensions to be cut; use another checkpoint."
                )
        for name, index, start, numel, offset in tree["pieces"]:
            piece = StoredPiece(
                rank, tree["tp_rank"], tree.get("ep_rank", 0), tree["pp_rank"], index, start, numel, offset
            )
            self._stored[name].pieces.append(piece)


class WholeReader:
    """Whole tensors from a checkpoint of kind "whole" (weights/*.safetensors under global names); no moments, no average."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._file_of: dict[str, str] = {}
        for name in manifest.files:
            if name.startswith(f"{WEIGHTS_DIR}/"):
                with open_safetensors(inside(folder, name)) as opened:
                    self._file_of |= dict.fromkeys(opened.keys(), name)
        odd = next((name for name in self._file_of if not is_parameter_name(name)), None)
        if odd is not None:
            raise CheckpointError(f"{folder} holds a tensor '{odd:.80}', which no model has; use another checkpoint.")

    def names(self) -> list[str]:
        """Global parameter names, in order of depth."""
        return sorted((name for name in self._file_of if not name.endswith(EXPERT_BIAS)), key=_depth)

    def bias_names(self) -> list[str]:
        """As ShardedReader's."""
        return sorted((name for name in self._file_of if name.endswith(EXPERT_BIAS)), key=_depth)

    def kinds(self) -> list[str]:
        """Weights only."""
        return [WEIGHTS_KIND]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        with open_safetensors(inside(self.folder, self._find(name))) as opened:
            return tuple(opened.get_slice(name).get_shape())

    def tensor(self, name: str, which: str = "model") -> Tensor:
        """One whole parameter, fp32; as ShardedReader.tensor."""
        checked_kind(which, {WEIGHTS_KIND}, self.folder)
        with open_safetensors(inside(self.folder, self._find(name))) as opened:
            return opened.get_tensor(name).float()

    def close(self) -> None:
        """Nothing stays open."""

    def _find(self, name: str) -> str:
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} holds no parameter '{name}'; it is of another model.")
        return self._file_of[name]


CheckpointReader = ShardedReader | WholeReader


def open_checkpoint(path: Path) -> CheckpointReader:
    """A reader of one checkpoint folder (manifest checked; file checksums are verify.py's business).

    Raises:
        CheckpointError: the folder is none, or is damaged.
    """
    manifest = read_manifest(path)
    return WholeReader(path, manifest) if manifest.is_whole else ShardedReader(path, manifest)


def open_together(path: Path) -> CheckpointReader:
    """`open_checkpoint` by all ranks at once, each of which opens its share of the sidecars only. Collective.

    Raises:
        CheckpointError: on every rank, when one could not read its share.
    """
    manifest = agree.together(CheckpointError, lambda: read_manifest(path))
    if manifest.is_whole:
        return agree.together(CheckpointError, lambda: WholeReader(path, manifest))
    rank, size = agree.rank_and_size()
    # ranks that each opened every sidecar would ask a shared file system for the square of their number of files
    share = range(rank, manifest.world_size, size)
    mine = agree.together(CheckpointError, lambda: {number: read_sidecar(path, number) for number in share})
    known = {number: tree for part in agree.gathered(mine) for number, tree in part.items()}
    return ShardedReader(path, manifest, [known[number] for number in range(manifest.world_size)])


def tensors(reader: CheckpointReader, which: str = "model") -> Iterator[tuple[str, Tensor]]:
    """(global name, whole tensor) of every parameter, one at a time."""
    for name in reader.names():
        yield name, reader.tensor(name, which)


def views_of_shard(whole: Tensor, partition: Partition, rank_of: tuple[int, int]) -> list[Tensor]:
    """Where tensor-parallel rank `rank_of[0]` of `rank_of[1]` belongs in the whole tensor: one view a stacked part."""
    if partition.dim is None:
        return [whole]
    rank, size = rank_of
    parts = whole.chunk(partition.strides, dim=partition.dim)
    return [part.chunk(size, dim=partition.dim)[rank] for part in parts]


def flat_groups(state: Any, stage: int, kind: str) -> list[Tensor]:
    """DeepSpeed's flat tensors of one rank's optimizer file, one an owned partition.

    Args:
        state: the file's optimizer_state_dict.
        stage: ZeRO stage that wrote it.
        kind: fp32, exp_avg or exp_avg_sq.
    """
    if kind == WEIGHTS_KIND:
        # DeepSpeed's master weights are leaves that want gradients; what is read is data
        return [
            flat.detach() for flat in state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
        ]
    # Source: DeepSpeed 0.19.8, the state_dict of stage_1_and_2.py and of stage3.py.
    moments = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"]
    return [moments[index][kind].detach() for index in sorted(moments)]


def read_sidecar(folder: Path, rank: int) -> dict[str, Any]:
    """What rank `rank` wrote about its files.

    Raises:
        CheckpointError: missing, not JSON, or with a field that is not lawful.
    """
    path = folder / rank_name(rank)
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!s:.200}); use another checkpoint.") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is not a sidecar; use another checkpoint.")
    check_sidecar(tree, path)
    # A copied or renamed sidecar would put one rank's elements in another's position.
    if tree["rank"] != rank:
        raise CheckpointError(f"{path} says that it is of rank {tree['rank']}; use another checkpoint.")
    return tree


def open_safetensors(path: Path) -> Any:
    """A safetensors file, memory-mapped.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint.") from None


def checked_kind(which: str, there: set[str], folder: Path) -> str:
    """The name in the files of the kind that is asked for.

    Raises:
        CheckpointError: it was not saved.
    """
    kind = KIND_OF.get(which)
    if kind is None or kind not in there:
        have = ", ".join(sorted(there))
        raise CheckpointError(f"{folder} holds no '{which}'; it has {have}.")
    return kind


def _depth(name: str) -> tuple[int, int, str]:
    parts = name.split(".")
    # Order of depth, so that readers touch files front to back; layer 10 comes after layer 9.
    if parts[0] == "embedding":
        return (0, 0, name)
    if parts[:2] == ["decoder", "layers"]:
        return (1, int(parts[2]), name)
    return (2, 0, name) if parts[0] == "decoder" else (3, 0, name)
