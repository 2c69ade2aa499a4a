"""Without CUDA a rank is the CPU, meets the others over gloo, and keeps to its threads."""

from __future__ import annotations

import os

import pytest
import torch

from bd3_megatron.compat import deepspeed, device

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_cuda() -> None:
    if device.cuda_is_there():
        pytest.skip("with CUDA a rank has a GPU")


def test_a_rank_is_the_cpu() -> None:
    assert device.rank_device(3) == CPU
    assert (device.collective_backend(CPU), device.device_name(CPU)) == ("gloo", "cpu")
    assert device.collective_backend(torch.device("cuda", 0)) == "nccl"


def test_a_rank_takes_one_thread_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        device.limit_cpu_threads()
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        device.limit_cpu_threads()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_deepspeed_compiles_nothing_on_first_use() -> None:
    loaded = deepspeed.load()
    assert not any(loaded.ops.__compatible_ops__[name] for name in deepspeed.COMPILED_ON_FIRST_USE)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
