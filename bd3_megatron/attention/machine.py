"""What this machine has for fast kernels, asked in this one file; nothing is remembered, nothing imported."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def has(package: str) -> bool:
    """Whether a package is installed.

    Args:
        package: such as "triton"; of a module inside a package, the package must be there.
    """
    return find_spec(package) is not None


def capability() -> tuple[int, int]:
    """Compute capability of the current CUDA device."""
    return torch.cuda.get_device_capability()
