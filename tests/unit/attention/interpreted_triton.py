"""Runs the Triton kernels in Triton's interpreter against the reference; prints the largest relative difference.

A program of its own because the interpreter is chosen by the environment before Triton is imported.
"""

from __future__ import annotations

import functools
import sys

import torch

from bd3_megatron.attention import dense, triton_pair
from tests.unit.attention.problems import outputs_and_gradients, problem, visibilities, worst_difference


def main(length: int, block_size: int) -> float:
    attend = functools.partial(triton_pair.attend, tiles=triton_pair.Tiles(16, 16))
    worst = 0.0
    for visibility in visibilities(length, block_size):
        p = problem(visibility, heads=(2, 1), head_dim=16, dtype=torch.float32)
        expected, actual = outputs_and_gradients(dense.attend, p), outputs_and_gradients(attend, p)
        worst = max(worst, worst_difference(actual, expected, relative=True))
    return worst


if __name__ == "__main__":
    print(main(int(sys.argv[1]), int(sys.argv[2])))
