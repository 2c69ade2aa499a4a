"""What one rank has to write for one checkpoint, as copies that a background thread may take its time over.

Decides: DeepSpeed's own save_checkpoint makes the state and names the files; a stand-in for its checkpoint engine keeps
the state in place of writing it. Synchronous saving keeps references instead and copies nothing.
Costs: one copy of this rank's state in host memory while an asynchronous save is in flight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bd3_megatron.checkpoint.files import tensor_bytes, write_safetensors, write_torch
from bd3_megatron.checkpoint.layout import AVERAGES_KIND, STATE_DIR, WEIGHTS_KIND, FileRecord, bias_name, ema_name
from bd3_megatron.checkpoint.pieces import MOMENTS, owned_pieces, shard_shapes
from bd3_megatron.checkpoint.universal_info import universal_info

if TYPE_CHECKING:
    from bd3_megatron.engine.zero_engine import ZeroEngine


class KeepingEngine:
    """Stands for DeepSpeed's checkpoint engine (runtime/checkpoint_engine/checkpoint_engine.py); writes nothing."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - DeepSpeed's signature
        """Nothing to make yet."""

    def create(self, info: Any) -> None:
        """DeepSpeed announces a checkpoint."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a file's content under the file's name."""
        # DeepSpeed names one flat folder of files; where they go is decided here.
        self.kept[Path(path).name] = state_dict

    def commit(self, info: Any) -> bool:
        """DeepSpeed says that it has handed over everything."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Who of the replicas writes the model's own file."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether DeepSpeed should leave committing to us; it has nothing to commit."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """torch.save writes a storage shared by several tensors once."""
        return True


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """All this rank writes: DeepSpeed's files, the averages, and the description of both."""

    rank: int
    states: dict[str, Any]
    averages: dict[str, Tensor]
    biases: dict[str, Tensor]
    """Of experts, by global name; from one rank a stage."""
    description: dict[str, Any]

    def num_bytes(self) -> int:
        """Of the tensors."""
        return tensor_bytes([self.states, self.averages, self.biases])

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Write everything below `folder`; returns what was written, by name relative to it."""
        written = {}
        for name, state in self.states.items():
            written[f"{STATE_DIR}/{name}"] = write_torch(folder / STATE_DIR / name, state)
        if self.averages:
            name = ema_name(self.rank)
            written[name] = write_safetensors(folder / name, self.averages, {})
        if self.biases:
            name = bias_name(self.rank)
            written[name] = write_safetensors(folder / name, self.biases, {})
        return written

    def sidecar(self, written: Mapping[str, FileRecord]) -> bytes:
        """This rank's own file: what it wrote and which pieces of which parameters are in it."""
        tree = {**self.description, "files": {name: asdict(record) for name, record in written.items()}}
        return (json.dumps(tree, separators=(",", ":")) + "\n").encode()

    def failed_sidecar(self, error: Exception) -> bytes:
        """What this rank leaves when it could not write."""
        return json.dumps({"rank": self.rank, "error": f"{type(error).__name__}: {error}"}).encode()


def record_rank(engine: ZeroEngine, folder: Path, *, copied: bool) -> RankRecord:
    """Collect this rank's state. Collective: DeepSpeed's save_checkpoint has barriers of its own.

    Args:
        engine: between two steps.
        folder: where the files will go.
        copied: copy every tensor to the host, so that training may go on.
    """
    # Only for this call: whatever it raises, the engine gets its own back.
    keeping, real = KeepingEngine(), engine.engine.checkpoint_engine
    has_experts = engine.engine.has_moe_layers
    engine.engine.checkpoint_engine = keeping
    # deepspeed/runtime/engine.py _copy_recovery_script (0.19) writes a script beside the state, which a full disk makes a
    # traceback, and which loads pickles without care
    engine.engine._copy_recovery_script = lambda path: None
    try:
        info = universal_info(gated=engine.model.config.gated_linear_unit)
        # DeepSpeed's own layout of experts (engine.py:5089) asks modules that are not there; pieces hold them here
        engine.engine.has_moe_layers = False
        engine.engine.save_checkpoint(str(folder), tag=STATE_DIR, client_state=info, save_latest=False)
    finally:
        engine.engine.checkpoint_engine, engine.engine.has_moe_layers = real, has_experts
        del engine.engine._copy_recovery_script
    shards = [] if engine.ema is None else engine.ema.shards
    averages: dict[str, Tensor] = {f"shard.{index}": shard.detach() for index, shard in enumerate(shards)}
    states = keeping.kept
    if copied:
        # Copies are complete when this function returns, so the next step may change the originals at once.
        copies: dict[int, Tensor] = {}
        states, averages = _copy(states, copies), _copy(averages, copies)
        if engine.model.topology.device.type != "cpu":
            # Copies to pinned memory are queued; the device must have done them before the next step's kernels.
            torch.accelerator.synchronize(engine.model.topology.device)
    else:
        # The safetensors writer takes host memory; torch.save moves device tensors itself.
        averages = {name: tensor.cpu() for name, tensor in averages.items()}
    rank = engine.model.topology.rank
    biases = _stage_biases(engine)
    description = _description(engine, list(states)) | {"biases": sorted(biases)}
    return RankRecord(rank=rank, states=states, averages=averages, biases=biases, description=description)


def _stage_biases(engine: ZeroEngine) -> dict[str, Tensor]:
    """Copies of the expert biases on the first rank of a pipeline stage: they are equal on all of its ranks."""
    topology = engine.model.topology
    if (topology.tp_rank, topology.cp_rank, topology.dp_rank) != (0, 0, 0):
        return {}
    return {name: bias.detach().cpu().clone() for name, bias in engine.model.root.named_biases()}


def _description(engine: ZeroEngine, files: list[str]) -> dict[str, Any]:
    topology = engine.model.topology
    return {
        "rank": topology.rank,
        "tp_rank": topology.tp_rank,
        "ep_rank": topology.ep_rank,
        "pp_rank": topology.pp_rank,
        # DeepSpeed also writes a model file; elements are read from the optimizer's alone.
        "state_file": next(name for name in files if name.endswith("optim_states.pt")),
        "zero_stage": engine.stage,
        "kinds": [WEIGHTS_KIND, *_moments_there(engine), *([AVERAGES_KIND] if engine.ema is not None else [])],
        "shapes": shard_shapes(engine),
        "pieces": [[p.name, p.index, p.start, p.numel, p.offset] for p in owned_pieces(engine)],
    }


def _moments_there(engine: ZeroEngine) -> list[str]:
    state = engine.optimizer.state.get(engine.owned()[0], {})
    return [kind for kind in MOMENTS if kind in state]


def _copy(value: Any, copies: dict[int, Tensor]) -> Any:
    """Nested containers with every tensor copied to the host; a storage that several tensors share is copied once."""
    if isinstance(value, Tensor):
        return _copy_tensor(value, copies)
    if isinstance(value, dict):
        # The class is kept: DeepSpeed's state holds ordered dictionaries.
        return type(value)((key, _copy(inner, copies)) for key, inner in value.items())
    if type(value) in (list, tuple):
        return type(value)(_copy(inner, copies) for inner in value)
    return value


def _copy_tensor(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    storage = tensor.untyped_storage()
    if tensor.numel() == 0 or storage.nbytes() == 0:
        return tensor.detach().cpu().clone()
    key = storage.data_ptr()
    if key not in copies:
        # The whole storage as one flat tensor: parameters that are views of it keep their sharing in the copy.
        flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
        pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.device.type != "cpu")
        copies[key] = pinned.copy_(flat, non_blocking=True)
    host = copies[key]
    # One storage read as two dtypes; rare and small, so it is copied again.
    if host.dtype != tensor.dtype:
        return tensor.detach().cpu().clone()
    return host.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
