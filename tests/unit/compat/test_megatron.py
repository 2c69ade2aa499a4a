"""megatron-core on a machine without CUDA: its modules see a CPU where they ask for a GPU, and torch stays untouched."""

from __future__ import annotations

import sys

import pytest
import torch

from bd3_megatron.compat import megatron
from bd3_megatron.compat.device import cuda_is_there


@pytest.fixture(autouse=True)
def without_cuda() -> None:
    if cuda_is_there():
        pytest.skip("with CUDA nothing is bound")
    megatron.install()


def test_torch_itself_is_not_patched() -> None:
    assert type(torch.cuda).__name__ == "module" and not torch.cuda.is_available()
    assert torch.zeros.__module__ != megatron.__name__
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_installing_twice_binds_once() -> None:
    assert megatron.install() == 0


def test_megatrons_modules_are_answered_on_the_cpu() -> None:
    inside = sys.modules["megatron.core.tensor_parallel.random"].torch  # type: ignore[attr-defined]
    assert inside is not torch and inside.nn is torch.nn and inside.float32 is torch.float32
    assert inside.cuda.current_device() == torch.device("cpu") and inside.cuda.is_available() is False
    for name in megatron.FACTORIES:
        arguments = {"full": ((2,), 1.0), "tensor": ([1],), "arange": (3,)}.get(name, (2,))
        for device in ("cuda", "cuda:0", torch.device("cuda", 0)):
            assert getattr(inside, name)(*arguments, device=device).device.type == "cpu"
    assert inside.zeros(2, device="meta").device.type == "meta"
    assert inside.cuda.synchronize() is None


def test_no_megatron_module_still_holds_torch() -> None:
    held = [
        name
        for name, module in sys.modules.items()
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch
    ]
    assert held == []


def test_the_generators_state_is_the_cpus() -> None:
    inside = sys.modules["megatron.core.tensor_parallel.random"].torch.cuda  # type: ignore[attr-defined]
    before = torch.get_rng_state()
    try:
        inside.manual_seed(5)
        first = torch.rand(3)
        inside.manual_seed(5)
        state = inside.get_rng_state()
        assert torch.equal(torch.rand(3), first)
        inside.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)
    finally:
        torch.set_rng_state(before)
