"""Which elements of which parameter lie where in the flat fp32 tensors a rank owns.

Contract: one description for ZeRO 1, 2 and 3 and for BF16_Optimizer: a piece is `numel` elements, from `start` of owned
tensor `index`, holding elements `offset`, `offset + 1`, ... of the flattened tensor-parallel shard of parameter `name`.
Knows DeepSpeed 0.19.8's names for it (runtime/zero/stage_1_and_2.py, stage3.py, runtime/bf16_optimizer.py) and nothing
of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bd3_megatron.checkpoint.layout import AVERAGES_KIND, WEIGHTS_KIND

if TYPE_CHECKING:
    from bd3_megatron.engine.zero_engine import ZeroEngine


# Adam's moments and averaged weights lie exactly as the weights do, so the same pieces serve all of them.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A run of elements of one parameter's shard inside one owned flat tensor."""

    name: str
    index: int
    start: int
    numel: int
    offset: int


def owned_pieces(engine: ZeroEngine) -> list[Piece]:
    """Every piece this rank owns, by global parameter name."""
    named = list(engine.model.root.named_parameters())
    found = _partitioned_weights(engine, dict(_by_id(named))) if engine.stage == 3 else _partitioned_state(named)
    return sorted(found, key=lambda piece: (piece.index, piece.start))


def shard_shapes(engine: ZeroEngine) -> dict[str, tuple[int, ...]]:
    """Shape of the tensor-parallel shard of every parameter of this rank's stage, by global name."""
    # Under ZeRO 3 a parameter at rest is an empty tensor; ds_shape is its real shape.
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.model.root.named_parameters()}


def _by_id(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[int, str]]:
    for name, parameter in named:
        yield id(parameter), name


def _partitioned_state(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[Piece]:
    """ZeRO 1 and 2: DeepSpeed links each parameter to the fragment this rank owns, or to none."""
    for name, parameter in named:
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        # All of it lies on other data-parallel ranks.
        if mapping is None:
            continue
        # hp: the fp32 partition of this rank. lp: the parameter in the model's dtype.
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        yield Piece(name, int(mapping.param_group_index), int(here.start), int(here.numel), int(there.start))


def _partitioned_weights(engine: ZeroEngine, name_of: dict[int, str]) -> Iterator[Piece]:
    """ZeRO 3: every parameter is cut evenly over the ranks, the last piece padded; a group holds its pieces in order."""
    optimizer: Any = engine.engine.optimizer
    rank = torch.distributed.get_rank(engine.model.topology.shard_group)
    for index, group in enumerate(optimizer.fp16_groups):
        start = 0
        for parameter in group:
            # ds_numel counts the piece with its padding, the same on every rank; only real elements are described.
            width = int(parameter.ds_tensor.ds_numel)
            offset = rank * width
            real = max(0, min(width, int(parameter.ds_numel) - offset))
            if real:
                yield Piece(name_of[id(parameter)], index, start, real, offset)
            start += width


def flat_state(engine: ZeroEngine, index: int) -> dict[str, Tensor]:
    """The flat tensors of owned partition `index`: fp32, the moments once they exist, and the average where one is kept."""
    # The optimizer is stepped on these tensors, so its state is keyed by them and not by the model's parameters.
    owned = engine.owned()[index]
    state = engine.optimizer.state.get(owned, {})
    flats = {WEIGHTS_KIND: owned.detach()}
    flats |= {kind: state[kind] for kind in MOMENTS if kind in state}
    if engine.ema is not None:
        flats[AVERAGES_KIND] = engine.ema.shards[index]
    return flats


def make_moments(engine: ZeroEngine) -> None:
    """Give every owned partition zero moments where the optimizer has none yet (it makes them at its first step)."""
    for owned in engine.owned():
        state = engine.optimizer.state[owned]
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(owned, requires_grad=False)


def adam_step(engine: ZeroEngine) -> int:
    """Updates Adam has counted: in its state (torch) or in its groups (Apex)."""
    for owned in engine.owned():
        state = engine.optimizer.state.get(owned, {})
        if "step" in state:
            return int(state["step"])
    # Apex's fused Adam counts in its groups.
    return int(engine.optimizer.param_groups[0].get("step", 0))


def set_adam_step(engine: ZeroEngine, step: int) -> None:
    """Make Adam go on counting from `step`. Needs moments (make_moments)."""
    for group in engine.optimizer.param_groups:
        if "step" in group or not isinstance(engine.optimizer, torch.optim.AdamW):
            group["step"] = step
    # Apex has no count by tensor.
    if not isinstance(engine.optimizer, torch.optim.AdamW):
        return
    for owned in engine.owned():
        # torch keeps the count beside fused kernels on their device, otherwise on the CPU
        fused = bool(engine.optimizer.param_groups[0].get("fused"))
        device = owned.device if fused else torch.device("cpu")
        engine.optimizer.state[owned]["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
