"""What tests of tools share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from bd3_megatron.parallel.topology import leave


@pytest.fixture
def alone() -> Iterator[None]:
    """For benchmarks that build a model in this process: threads and process groups are as before when the test ends."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    leave()
    assert not dist.is_initialized()
