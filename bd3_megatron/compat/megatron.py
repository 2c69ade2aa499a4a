"""megatron-core 0.16.1 on a machine without CUDA.

Decides: the *name* `torch` inside every loaded megatron.core module is bound to a proxy that answers calls to CUDA on
the CPU and hands everything else to torch. torch itself is untouched, and with CUDA at hand nothing is bound at all.
Does not cover `Tensor.cuda()`: no code path this package uses calls it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from bd3_megatron.compat.device import cuda_is_there

MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.pipeline_parallel",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.mlp",
    # layers import these three when they are built: loaded here, once for all ranks that are forked from this process
    "megatron.core.transformer.dot_product_attention",
    "megatron.core.transformer.moe.experts",
    "megatron.core.models.backends",
)
FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn")


class _CudaOnCpu(types.ModuleType):
    """Stands for torch.cuda inside megatron: the calls a CPU run reaches, answered on the CPU.

    Source: some 20 lines of megatron/core name `torch.cuda` or `device="cuda"` and are reached without a GPU:
    tensor_parallel/random.py:72-111, 235-277, 422 (RNG tracker; `_set_cuda_rng_state` is silently a no-op on CPU builds),
    tensor_parallel/layers.py:552 and tensor_parallel/mappings.py:91-442 (buffers), utils.py:631 (GlobalMemoryBuffer),
    pipeline_parallel/schedules.py:596, 983, 2138 (token counter), p2p_communication.py:190-398 (receive buffers).
    """

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def is_available(self) -> bool:
        return False

    def synchronize(self, device: Any = None) -> None:
        return None

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)


class _TorchOnCpu(types.ModuleType):
    """Stands for the name `torch` inside megatron modules."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu()
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        # only an explicit CUDA device is replaced; every other argument is megatron's business
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return make


def install() -> int:
    """Load the megatron modules this package uses and, without CUDA, bind the proxy in all of them.

    Returns:
        Number of modules bound by this call (0 with CUDA, and 0 when called again).
    """
    for name in MODULES:
        importlib.import_module(name)
    # the tracker forks the one CPU generator, which it mistakes for a leak out of the GPU's
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    _rebuild_norms_without_transformer_engine()
    if cuda_is_there():
        return 0
    proxy = _TorchOnCpu()
    bound = 0
    for name, module in list(sys.modules.items()):
        # bound module by module, so that nothing outside of megatron sees the proxy
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = proxy  # type: ignore[attr-defined]
            bound += 1
    random = sys.modules["megatron.core.tensor_parallel.random"]
    # on CPU builds megatron's own setter silently does nothing (tensor_parallel/random.py:72-111)
    random._get_cuda_rng_state = _get_cpu_state  # type: ignore[attr-defined]
    random._set_cuda_rng_state = _set_cpu_state  # type: ignore[attr-defined]
    return bound


def publish_groups(groups: ProcessGroupCollection, *, vpp: int | None) -> None:
    """Answer megatron's questions about groups with ours, instead of `initialize_model_parallel`.

    That function (parallel_state.py:548) makes every group of every axis on every rank, twins on gloo and groups for
    experts among them: 11,273 calls on 1,024 ranks. Of its names these are the ones that schedules, layers and the random
    tracker read; experts here are never cut over tp, so a group of one rank stands for that.

    Args:
        groups: tp, pp, cp, dp, dp_cp, mp, embd (None away from the ends of a pipeline), ep, expt_dp, and expt_tp, which
            is this rank alone.
        vpp: model chunks a stage holds, or None.
    """
    state: Any = sys.modules["megatron.core.parallel_state"]
    state._TENSOR_MODEL_PARALLEL_GROUP, state._PIPELINE_MODEL_PARALLEL_GROUP = groups.tp, groups.pp
    state._PIPELINE_GLOBAL_RANKS = dist.get_process_group_ranks(groups.pp)
    state._MODEL_PARALLEL_GROUP, state._EMBEDDING_GROUP = groups.mp, groups.embd
    state._CONTEXT_PARALLEL_GROUP = groups.cp
    state._DATA_PARALLEL_GROUP, state._DATA_PARALLEL_GROUP_WITH_CP = groups.dp, groups.dp_cp
    # the random tracker folds expert ranks into its seeds (tensor_parallel/random.py:408)
    state._EXPERT_MODEL_PARALLEL_GROUP, state._EXPERT_TENSOR_PARALLEL_GROUP = groups.ep, groups.expt_tp
    state._EXPERT_DATA_PARALLEL_GROUP = groups.expt_dp
    if vpp is not None:
        state._VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK, state._VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE = 0, vpp
    # destroy_model_parallel leaves the buffer of an earlier grid
    if state._GLOBAL_MEMORY_BUFFER is None:
        state._set_global_memory_buffer()


def published_groups() -> ProcessGroupCollection | None:
    """What `publish_groups` was given in this process, or None."""
    if not sys.modules["megatron.core.parallel_state"].model_parallel_is_initialized():
        return None
    return ProcessGroupCollection.use_mpu_process_groups(
        ["tp", "pp", "cp", "dp", "dp_cp", "mp", "embd", "ep", "expt_tp", "expt_dp"]
    )


def forget_groups() -> None:
    """Take the answers back; the groups themselves are their maker's to end."""
    sys.modules["megatron.core.parallel_state"].destroy_model_parallel()


def _rebuild_norms_without_transformer_engine() -> None:
    """Bind the package's name `CheckpointWithoutOutput` to fp8=None, on every machine.

    Source: transformer_layer.py:577 and 672 make it with fp8=False, which tensor_parallel/random.py:634
    (`fp8 is not None`) reads as fp8 wanted, and that needs TransformerEngine.
    """
    package = sys.modules["megatron.core.tensor_parallel"]
    whole = sys.modules["megatron.core.tensor_parallel.random"].CheckpointWithoutOutput
    package.CheckpointWithoutOutput = functools.partial(whole, fp8=None)  # type: ignore[attr-defined]


def _get_cpu_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)
