"""Put a checkpoint's state into an engine, on the grid that made it or on any other.

Contract: on the same grid and ZeRO stage every rank copies its own pieces back, bit for bit. Otherwise the checkpoint goes
through DeepSpeed's universal form (universal.py): each rank cuts its shards out of whole tensors. Both ways end in the
owned flat fp32 tensors, their moments and their averages, from which the model's weights are published.
Refuses: a checkpoint of another model, by name and shape, before anything is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bd3_megatron.checkpoint import agree
from bd3_megatron.checkpoint.layout import (
    AVERAGES_KIND,
    STATE_DIR,
    WEIGHTS_KIND,
    Manifest,
    ema_name,
    inside,
)
from bd3_megatron.checkpoint.pieces import (
    MOMENTS,
    Piece,
    adam_step,
    flat_state,
    make_moments,
    owned_pieces,
    set_adam_step,
    shard_shapes,
)
from bd3_megatron.checkpoint.read import (
    CheckpointReader,
    flat_groups,
    open_safetensors,
    open_together,
    read_sidecar,
)
from bd3_megatron.checkpoint.restricted_pickle import open_pt
from bd3_megatron.checkpoint.universal import UniversalReader, universal_form
from bd3_megatron.checkpoint.verify import newest_valid as newest_valid
from bd3_megatron.errors import CheckpointError
from bd3_megatron.model.partition import full_shape, partition_of, shard

if TYPE_CHECKING:
    from bd3_megatron.engine.zero_engine import ZeroEngine


class ElementSource(Protocol):
    """Where elements come from."""

    def elements(self, piece: Piece, kind: str) -> Tensor:
        """The elements of one piece, fp32, on the CPU."""


# DeepSpeed's own loaders are not used: they unpickle anything, take the gradient clip and every hyperparameter from the
# file (a changed one would be silently ignored), give ZeRO-3's second group the first one's weight decay, and know no
# tensor parallelism there.
def load(engine: ZeroEngine, path: Path) -> Manifest:
    """Load weights, moments, averages and counters. Collective over all ranks.

    Args:
        engine: freshly built, of the same model.
        path: a complete checkpoint (newest_valid has checked it).

    Returns:
        Its manifest.

    Raises:
        CheckpointError: on every rank; another model, or a damaged file.
    """
    reader = open_together(path)
    manifest = reader.manifest
    # Before anything is changed: an engine that was half filled would train on without a sign.
    problem = agree.first_failure(_mismatch(engine, reader))
    if problem is not None:
        raise CheckpointError(problem)
    # All or none: the universal form is made collectively, so one rank alone cannot take that way.
    same = agree.gathered(agree.together(CheckpointError, lambda: _is_same_layout(engine, path, manifest)))
    # Weights that are stored whole need no other form.
    form = None if all(same) or manifest.is_whole else universal_form(reader)

    def fill() -> None:
        if all(same):
            source: ElementSource = OwnFiles(path, engine)
        else:
            source = WholeTensors(reader if form is None else UniversalReader(form), engine)
        _fill(engine, manifest, source, reader.kinds())
        with torch.no_grad():
            for name, bias in engine.model.root.named_biases():
                bias.copy_(reader.tensor(name))

    # a rank that could not read must not leave the others in the collectives of publish
    agree.together(CheckpointError, fill)
    # The fp32 partitions are filled; the model's own bf16 or fp32 weights are still those of initialisation.
    engine.publish()
    return manifest


class OwnFiles:
    """This rank's files of a checkpoint made on the same grid."""

    def __init__(self, path: Path, engine: ZeroEngine) -> None:
        rank = engine.model.topology.rank
        sidecar = read_sidecar(path, rank)
        self._stage = engine.stage
        self._state = open_pt(inside(path, f"{STATE_DIR}/{sidecar['state_file']}"))["optimizer_state_dict"]
        self._averages = open_safetensors(inside(path, ema_name(rank))) if AVERAGES_KIND in sidecar["kinds"] else None

    def elements(self, piece: Piece, kind: str) -> Tensor:
        """As ElementSource."""
        end = piece.start + piece.numel
        if kind == AVERAGES_KIND and self._averages is not None:
            return self._averages.get_slice(f"shard.{piece.index}")[piece.start : end]
        return flat_groups(self._state, self._stage, kind)[piece.index][piece.start : end]


class WholeTensors:
    """Whole tensors, of which this rank's tensor-parallel shard is taken."""

    def __init__(self, reader: CheckpointReader | UniversalReader, engine: ZeroEngine) -> None:
        self._reader = reader
        self._gated = engine.model.config.gated_linear_unit
        self._topology = engine.model.topology

    def elements(self, piece: Piece, kind: str) -> Tensor:
        """As ElementSource."""
        # A universal form is whole over dp and tp; this rank's share is cut as at initialisation.
        partition = partition_of(piece.name, gated=self._gated)
        mine = shard(self._reader.tensor(piece.name, kind), partition, *self._topology.along(partition.axis))
        return mine.flatten()[piece.offset : piece.offset + piece.numel]


def _is_same_layout(engine: ZeroEngine, path: Path, manifest: Manifest) -> bool:
    """Whether this rank wrote exactly the pieces that it owns now."""
    topology = engine.model.topology
    if manifest.is_whole or manifest.world_size != topology.world_size or manifest.zero_stage != engine.stage:
        return False
    sidecar = read_sidecar(path, topology.rank)
    # The sidecar holds what this rank wrote; equal lists mean that not one element has to move.
    here = [[p.name, p.index, p.start, p.numel, p.offset] for p in owned_pieces(engine)]
    is_same_rank = (sidecar["tp_rank"], sidecar["pp_rank"]) == (topology.tp_rank, topology.pp_rank)
    # Pieces alone do not tell [2, 3] from [3, 2].
    shapes = {name: list(shape) for name, shape in shard_shapes(engine).items()}
    return is_same_rank and manifest.grid == topology.grid and sidecar["pieces"] == here and sidecar["shapes"] == shapes


def _mismatch(engine: ZeroEngine, reader: CheckpointReader) -> str | None:
    """Why the checkpoint is not this model's; None when it is."""
    gated, topology, there = engine.model.config.gated_linear_unit, engine.model.topology, set(reader.names())
    for name, local in shard_shapes(engine).items():
        # The other direction is allowed: a file may hold parameters that this rank's stage does not own.
        if name not in there:
            return f"{reader.folder} holds no parameter '{name}'; it is of another model: check the model section."
        partition = partition_of(name, gated=gated)
        expected = full_shape(local, partition, topology.along(partition.axis)[1])
        if reader.shape(name) != expected:
            return (
                f"{reader.folder}: '{name}' has shape {list(reader.shape(name))}, this model needs {list(expected)}; "
                "check the model section (vocab_multiple too)."
            )
    for name, bias in engine.model.root.named_biases():
        if name not in reader.bias_names() or reader.shape(name) != tuple(bias.shape):
            return f"{reader.folder} holds no '{name}' of {bias.shape[0]} experts; check model.experts."
    return None


def _fill(engine: ZeroEngine, manifest: Manifest, source: ElementSource, kinds: list[str]) -> None:
    has_moments = MOMENTS[0] in kinds
    # Adam makes its moments at its first step; they must exist before they can be filled.
    if has_moments or adam_step(engine) > 0:
        make_moments(engine)
        set_adam_step(engine, int(manifest.engine.get("adam_step", 0)))
    flats = [flat_state(engine, index) for index in range(len(engine.owned()))]
    with torch.no_grad():
        for flat in flats:
            for target in flat.values():
                # padding stays zero; without an average the weights start one, without moments they start at zero
                target.zero_()
        for piece in owned_pieces(engine):
            for kind, target in flats[piece.index].items():
                # An average that was not saved (whole weights, or EMA switched on later) starts at the weights.
                origin = kind if kind in kinds else (WEIGHTS_KIND if kind == AVERAGES_KIND else None)
                if origin is not None:
                    target[piece.start : piece.start + piece.numel].copy_(source.elements(piece, origin))
    counters = manifest.engine
    engine.engine.skipped_steps = int(counters.get("skipped_steps", 0))
    engine.engine.global_steps = int(counters.get("global_steps", 0))
    if engine.ema is not None:
        engine.ema.num_updates = int(counters.get("ema_updates") or 0)
