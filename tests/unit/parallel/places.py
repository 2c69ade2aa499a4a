"""A rank's place on a grid without process groups: for laws that need coordinates and no collective."""

from __future__ import annotations

from typing import Any

import torch

from bd3_megatron.parallel.topology import Topology


def place(**coordinates: Any) -> Topology:
    """A topology of one rank on the CPU; `coordinates` sets axes and ranks, e.g. dp=4, dp_rank=3."""
    ones = dict.fromkeys(("tp", "pp", "cp", "dp", "ep", "vpp"), 1)
    zeros = dict.fromkeys(("rank", "tp_rank", "pp_rank", "cp_rank", "dp_rank"), 0)
    absent = dict.fromkeys(
        ("groups", "shard_group", "model_group", "embedding_group", "expert_group", "expert_data_group")
    )
    rest = {"sequence_parallel": False, "device": torch.device("cpu")}
    fields: dict[str, Any] = {**ones, **zeros, **absent, **rest, **coordinates}
    return Topology(**fields)
