"""Which attention backend serves each phase of a run: chosen on the phase's own rows, the same on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.select import Backend, choose, named
from bd3_megatron.config.objective import block_sizes, objective_of
from bd3_megatron.config.schema import Config
from bd3_megatron.model.attention_context import layout_function
from bd3_megatron.parallel.pair_split import PairLayout
from bd3_megatron.parallel.topology import Topology


def phase_layout(config: Config, block_size: int, *, views: int, cp_rank: int) -> PairLayout:
    """The rows that a context-parallel rank holds in a phase of a run."""
    layout_of = layout_function(
        objective_of(config),
        length=config.data.seq_len,
        parallel=config.parallel,
        cp_rank=cp_rank,
        skip_dead_rows=config.train.skip_dead_rows,
    )
    return layout_of(block_size, views, None)


def attention_request(
    config: Config, layout: PairLayout, *, dtype: torch.dtype, device: torch.device
) -> AttentionRequest:
    """What a layer will ask of attention in one phase of a run, per rank."""
    # Tensor parallelism deals heads to ranks, so a kernel sees 1/tp of them.
    tp = config.parallel.tp
    return AttentionRequest(
        device_type=device.type,
        dtype=dtype,
        batch=config.train.micro_batch_size,
        rows=layout.visibility(),
        num_heads=config.model.num_heads // tp,
        num_kv_heads=config.model.kv_heads // tp,
        head_dim=config.model.head_width,
        # Structured attention refuses packed documents on CUDA.
        documents=config.data.packing == "isolated",
    )


def choose_backends(config: Config, *, dtype: torch.dtype, device: torch.device) -> dict[int, Backend]:
    """The attention backend of every block size of a run.

    Args:
        config: the run.
        dtype, device: of the run.

    Raises:
        BackendError: the backend asked for cannot serve.
    """
    chosen = {}
    # One choice a block size, in the curriculum's order: phases of one size share it.
    for size in dict.fromkeys(block_sizes(config)):
        # Every cp rank has as much to compute, so the rows of rank 0 stand for all.
        layout = phase_layout(config, size, views=config.diffusion.views, cp_rank=0)
        chosen[size] = choose(config.attention.backend, attention_request(config, layout, dtype=dtype, device=device))
    return chosen


def agreed_backends(config: Config, topology: Topology, dtype: torch.dtype) -> tuple[dict[int, Backend], str]:
    """The backends that rank 0 chooses, on every rank, and why. Collective.

    Raises:
        BackendError: the backend asked for cannot serve.
    """
    # what is fastest is a measurement: ranks that each took their own would run different kernels
    mine = choose_backends(config, dtype=dtype, device=topology.device) if topology.rank == 0 else {}
    box = [{size: (backend.label, backend.why) for size, backend in mine.items()}]
    dist.broadcast_object_list(box, src=0, device=topology.device)
    labels = {label for label, _ in box[0].values()}
    why = ", ".join(
        f"{label} ({reason})" if len(labels) == 1 else f"{label} at block_size={size} ({reason})"
        for size, (label, reason) in list(box[0].items())[: 1 if len(labels) == 1 else None]
    )
    return {size: named(label) for size, (label, _) in box[0].items()}, why
