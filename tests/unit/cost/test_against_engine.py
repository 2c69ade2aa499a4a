"""The closed forms against the engine itself: bytes of every axis counted on gloo ranks, activations counted by hooks."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bd3_megatron.attention.select import named
from bd3_megatron.config.load import replace_field
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.assumptions import EngineAssumptions
from bd3_megatron.cost.memory import memory_of_stage
from bd3_megatron.cost.parameters import parameters_per_rank
from bd3_megatron.cost.traffic import bytes_by_axis
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.batches import make_micro_batch
from tests.ranks.harness import run_ranks
from tests.ranks.parity import BATCH, LENGTH, MASK_ID, VOCAB, clean_batch, job_config, noise_of

CPU = EngineAssumptions(precision="fp32", fused=False)
SMALL_BYTES = 8
"""Token counts and norms are one or two numbers; everything larger is a transfer."""


class _Collectives(TorchDispatchMode):
    """Counts the bytes of every collective this rank calls, by axis: the larger tensor, as the closed forms do."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        groups = topology.groups
        by_axis = [("dp", topology.shard_group), ("cp", groups.cp), ("tp", groups.tp), ("pp", topology.embedding_group)]
        if topology.ep > 1:
            by_axis += [("ep", topology.expert_group), ("dp", topology.expert_data_group)]
        self.axis = {g.group_name: axis for axis, g in by_axis if g is not None and dist.get_world_size(g) > 1}
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.send"):
            self.bytes["pp"] += max(_size(a) for a in args)
        elif name.startswith("c10d.") and not name.startswith("c10d.recv"):
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            size = max(_size(a) for a in args)
            # what comes depends on the load, what goes does not
            size = _size(args[1]) if "alltoall_base" in name else size
            if size > SMALL_BYTES and group.group_name in self.axis:
                self.bytes[self.axis[group.group_name]] += size
        return func(*args, **(kwargs or {}))


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _batches(config: Config, topology: Topology, model: ParallelModel, micro: int) -> list[Any]:
    size, made = config.train.micro_batch_size, []
    for number in range(micro):
        first = (number * topology.dp + topology.dp_rank) * size
        clean = clean_batch(torch.arange(first, first + size), documents=False)
        made.append(make_micro_batch(clean, noise_of(config), config.diffusion, model.layout).pair)
    return made


def _parallel_model(config: Config, topology: Topology, dtype: torch.dtype = torch.float32) -> ParallelModel:
    vocabulary = vocabulary_of(config, size=VOCAB, mask_id=MASK_ID)
    return ParallelModel(
        config, vocabulary, topology, backends=dict.fromkeys(block_sizes(config), named("structured")), dtype=dtype
    )


def _counted_step(config: Config) -> Any:
    def run(topology: Topology) -> tuple[int, int, dict[str, int], int]:
        model = _parallel_model(config, topology)
        micro = BATCH // (topology.dp * config.train.micro_batch_size)
        engine = ZeroEngine(model, config, num_micro_batches=micro, dtype=torch.float32)
        batches = _batches(config, topology, model, micro)
        # the first step also builds what later ones keep
        engine.train_step(batches, loss_scale=1e-3, lr=1e-3)
        with _Collectives(topology) as seen:
            engine.train_step(batches, loss_scale=1e-3, lr=1e-3)
        held = sum(p.numel() for p in model.root.parameters())
        return topology.pp_rank, held, dict(seen.bytes), sum(b.loss_row_R.numel() for b in batches)

    return run


def _recompute(text: str) -> dict[str, Any]:
    """`full of 2`: of the first two layers of every chunk."""
    kind, _, layers = text.partition(" of ")
    return {"recompute": kind, "recompute_layers": int(layers) if layers else None}


GRIDS: list[tuple[str, dict[str, Any], str]] = [
    ("paper", {"tp": 2}, "none"),
    ("modern", {"tp": 2}, "full of 2"),
    ("modern_tied", {"tp": 2, "dp": 2}, "none"),
    ("paper", {"tp": 2, "sequence_parallel": True}, "none"),
    ("modern_tied", {"tp": 2, "sequence_parallel": True, "pp": 2}, "none"),
    ("modern_tied", {"pp": 2}, "none"),
    ("modern", {"pp": 2, "vpp": 2}, "none"),
    ("modern", {"cp": 2}, "selective of 1"),
    ("modern", {"dp": 2, "zero_stage": 2}, "none"),
]


@pytest.mark.parametrize(("style", "parallel", "recompute"), GRIDS, ids=str)
def test_bytes_by_axis_are_those_of_the_collectives(style: str, parallel: dict[str, Any], recompute: str) -> None:
    tied = style == "modern_tied"
    train = _recompute(recompute)
    config = job_config(style.removesuffix("_tied"), tied=tied, parallel=parallel, train=train)
    counted = replace_field(config, "model.vocab_size", VOCAB)
    micro = BATCH // ((config.parallel.dp or 1) * config.train.micro_batch_size)
    for stage, held, seen, scored in run_ranks(_counted_step(config), config.parallel):
        share = scored / (micro * config.train.micro_batch_size * LENGTH / config.parallel.cp)
        expected = bytes_by_axis(counted, stage, CPU, masked_fraction=share)
        assert {axis: seen.get(axis, 0) for axis in expected} == expected
        assert held == parameters_per_rank(counted, stage)


EXPERTS = {"number": 4, "top_k": 2, "width": 24, "leading_dense_layers": 1}
EXPERT_GRIDS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"ep": 4, "tp": 2, "sequence_parallel": True, "dp": 2}, {}, "none"),
    ({"ep": 4, "tp": 2, "sequence_parallel": True, "dp": 2}, {"shared_width": 16}, "full"),
    ({"ep": 2, "dp": 4}, {}, "full of 2"),
]
"""Grids on which the expert-parallel ranks are those of no other axis."""


@pytest.mark.parametrize(("parallel", "experts", "recompute"), EXPERT_GRIDS, ids=str)
def test_bytes_of_experts_are_those_of_the_collectives(
    parallel: dict[str, Any], experts: dict[str, Any], recompute: str
) -> None:
    train = _recompute(recompute)
    config = job_config("modern", layers=3, parallel=parallel, train=train, model={"experts": EXPERTS | experts})
    counted = replace_field(config, "model.vocab_size", VOCAB)
    micro = BATCH // ((config.parallel.dp or 1) * config.train.micro_batch_size)
    totals: Counter[str] = Counter()
    for stage, held, seen, scored in run_ranks(_counted_step(config), config.parallel):
        expected = bytes_by_axis(
            counted, stage, CPU, masked_fraction=scored / (micro * config.train.micro_batch_size * LENGTH)
        )
        assert held == parameters_per_rank(counted, stage)
        assert {axis: seen.get(axis, 0) for axis in ("tp", "dp")} == {axis: expected[axis] for axis in ("tp", "dp")}
        # a rank sends back what it was sent: as much as it sent itself over all ranks, and not on each
        totals.update(expected=expected["ep"], seen=seen["ep"])
    assert totals["seen"] == totals["expected"] > 0


class _Kept:
    """Holds a saved tensor; gone when the graph lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _saved_bytes(config: Config, dtype: torch.dtype) -> Any:
    def run(topology: Topology) -> tuple[int, int]:
        model = _parallel_model(config, topology, dtype)
        batch = _batches(config, topology, model, 1)[0]
        weights = {p.untyped_storage().data_ptr() for p in model.root.parameters()}
        alive: weakref.WeakSet[_Kept] = weakref.WeakSet()

        def pack(tensor: Tensor) -> _Kept:
            kept = _Kept(tensor)
            alive.add(kept)
            return kept

        model.root.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            loss = model.chunks[0](batch)
        storages = {s.data_ptr(): s.nbytes() for s in (k.tensor.untyped_storage() for k in alive)}
        assert loss is not None
        return sum(size for at, size in storages.items() if at not in weights), batch.loss_row_R.numel()

    return run


KEPT: list[tuple[str, str, dict[str, Any], str]] = [
    ("paper", "fp32", {}, "none"),
    ("paper", "bf16", {"tp": 2, "sequence_parallel": True}, "none"),
    ("modern", "bf16", {}, "none"),
    ("modern_tied", "fp32", {"tp": 2}, "none"),
    ("modern_tied", "bf16", {}, "selective"),
    ("paper", "bf16", {}, "selective of 4"),
    ("modern", "fp32", {}, "full of 3"),
    ("modern", "fp32", {"cp": 2}, "none"),
]


@pytest.mark.parametrize(("style", "precision", "parallel", "recompute"), KEPT, ids=str)
def test_activations_are_what_autograd_keeps(
    style: str, precision: str, parallel: dict[str, Any], recompute: str
) -> None:
    model = {"hidden_size": 128, "ffn_hidden_size": 320}
    train = {**_recompute(recompute), "micro_batch_size": 4}
    config = job_config(
        style.removesuffix("_tied"), tied=style == "modern_tied", layers=6, parallel=parallel, train=train, model=model
    )
    counted = replace_field(config, "model.vocab_size", VOCAB)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kept, _ = run_ranks(_saved_bytes(config, dtype), config.parallel)[0]
    memory = memory_of_stage(counted, 0, EngineAssumptions(precision=precision, fused=False))
    # the head keeps its gradients and the final norm, and no chunk: that is gone after the forward
    assert kept == pytest.approx(memory.activations, rel=0.10)
