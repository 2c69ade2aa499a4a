"""DeepSpeed 0.19.8: what must be switched off before it is asked for anything.

On CPU, `deepspeed.initialize` would compile a shared-memory collective (`deepspeed_shm_comm`), which is declared
incompatible here.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import nn

from bd3_megatron.compat.device import cuda_is_there

EXPERT_GROUP = "experts"
"""Name of the experts' parameter group and process groups."""
COMPILED_ON_FIRST_USE = ("deepspeed_shm_comm", "shm_comm")
IMPORTED_BY_INITIALIZE = ("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer")


def load_deepspeed() -> ModuleType:
    """Import DeepSpeed with its compile-at-first-use collectives off and its log at warnings.

    Returns:
        The `deepspeed` module.
    """
    if not cuda_is_there():
        # DeepSpeed otherwise guesses the accelerator from the packages that are installed
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    # Compiling takes minutes, and a rank killed meanwhile leaves a lock file on which every later run waits for ever.
    # The collective serves inference only.
    for name in COMPILED_ON_FIRST_USE:
        deepspeed.ops.__compatible_ops__[name] = False
    logger.setLevel(logging.WARNING)
    # `deepspeed.initialize` imports them in every rank; loaded here, ranks that are forked share them
    for name in IMPORTED_BY_INITIALIZE:
        importlib.import_module(name)
    return deepspeed


def mark_experts(root: nn.Module, experts: list[nn.Parameter], *, group: Any, data_group: Any, number: int) -> None:
    """Tell DeepSpeed which parameters are experts and which ranks hold the same ones. Before `deepspeed.initialize`.

    Of its own mixture nothing is used: DeepSpeed looks for a module of its class, asks it to register process groups, and
    finds a parameter's by two attributes. What is not told is silent: experts would be averaged with dense parameters.

    Args:
        root: what DeepSpeed is given.
        experts: parameters of routed experts on this rank.
        group: ranks that together hold every expert.
        data_group: ranks with the same experts.
        number: of experts in a layer.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    # looked for at engine.py:2101, asked at engine.py:2149; the attributes are read at engine.py:2052
    class ExpertMark(MoE):  # type: ignore[misc]
        def __init__(self) -> None:
            # the parent would build experts and a gate
            nn.Module.__init__(self)
            self.num_experts = number

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            groups._EXPERT_PARALLEL_GROUP[EXPERT_GROUP] = group
            groups._EXPERT_DATA_PARALLEL_GROUP[EXPERT_GROUP] = data_group
            groups._EXPERT_PARALLEL_GROUP_RANKS[EXPERT_GROUP] = dist.get_process_group_ranks(group)
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[EXPERT_GROUP] = dist.get_process_group_ranks(data_group)

    for parameter in experts:
        parameter.allreduce, parameter.group_name = False, EXPERT_GROUP  # type: ignore[attr-defined]
    root.add_module("expert_mark", ExpertMark())
