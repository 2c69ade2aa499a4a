"""Noise levels: one t per block, stratified over the global batch, inside a clipped interval.

Contract: t is uniform on [beta, omega]; the interval clips t, before the noise schedule makes it a mask probability. A
level depends on (seed, index of the sample in the order of consumption, block) and on nothing else.
Costs: 2 ms for 2,000 blocks on one CPU core; on a GPU index the dealing waits for the device, so keep indices on CPU.
Source: BD3-LM (arXiv 2503.09573), clipped schedules; diffusion.py of kuleshov-group/bd3lms, _sample_t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron import rng
from bd3_megatron.diffusion.constants import MIN_T
from bd3_megatron.errors import RangeError, ShapeError
from bd3_megatron.rng import Purpose


@dataclass(frozen=True, order=True)
class Interval:
    """The clipped interval [beta, omega] of noise levels; beta = omega = 1 masks everything.

    Raises:
        RangeError: empty, or not inside [MIN_T, 1].
    """

    beta: float = MIN_T
    """Smallest t, in [MIN_T, 1]."""
    omega: float = 1.0
    """Largest t, in [beta, 1]."""

    def __post_init__(self) -> None:
        if not MIN_T <= self.beta <= 1.0 or not self.omega <= 1.0:
            raise RangeError(
                f"interval [{self.beta:g}, {self.omega:g}] leaves [{MIN_T:g}, 1]; use "
                f"{MIN_T:g} <= beta <= omega <= 1 (every loss weight diverges at t = 0)."
            )
        if not self.beta <= self.omega:
            raise RangeError(f"interval [{self.beta:g}, {self.omega:g}] is empty; use beta <= omega.")

    @property
    def width(self) -> float:
        return self.omega - self.beta

    def holds(self, t: Tensor) -> Tensor:
        """Whether each noise level lies inside, ends included: bool of t's shape."""
        return (t >= self.beta) & (t <= self.omega)


def noise_levels(
    seed: int,
    index_B: Tensor,
    *,
    num_blocks: int,
    interval: Interval,
    group_size: int,
    stratified: bool = True,
    blocks_per_level: int = 1,
) -> Tensor:
    """The noise level of every block of some samples.

    Args:
        seed: of the run, in [0, 2^48).
        index_B: int64 [B], sample indices in the order of consumption, >= 0; any subset of a group in any order.
        num_blocks: K = L / S.
        interval: t is drawn from it.
        group_size: consecutive samples that share strata: the global batch size. The group is index // group_size.
        stratified: False draws every level independently (for comparison).
        blocks_per_level: consecutive blocks that share a level; the last ones of a sample may be fewer.

    Returns:
        t_BK: float64 [B, K] in [beta, omega], on index_B's device.

    Raises:
        ShapeError: index_B is not int64 [B].
        RangeError: a negative index, num_blocks or group_size below 1.
    """
    if index_B.dim() != 1 or index_B.dtype != torch.int64:
        raise ShapeError(f"index_B is {index_B.dtype} {list(index_B.shape)}; expected torch.int64 [any].")
    if num_blocks < 1 or group_size < 1:
        raise RangeError(f"num_blocks={num_blocks} and group_size={group_size} must both be 1 or more.")
    if index_B.numel() and int(index_B.min()) < 0:
        raise RangeError(f"index {int(index_B.min())} is negative; count samples from 0 in the order of consumption.")
    index_B1 = index_B[:, None]
    # shared levels are those of as many wider blocks, so that strata are over what is drawn
    num_levels = -(-num_blocks // blocks_per_level)
    block_K = torch.arange(num_levels, device=index_B.device)
    u_BK = rng.uniform(seed, Purpose.NOISE_LEVEL, index_B1, block_K)
    if stratified:
        # A group, the global batch, shares one set of equal strata, each used once; it may be cut among ranks and
        # micro-batches at will, and its last part may be missing.
        num_strata = group_size * num_levels
        place_BK = (index_B1 % group_size) * num_levels + block_K
        # Dealt by a permutation, so that no stratum is tied to a block index or a rank. The official code deals in
        # order: with one sequence a device, block b always gets t in [b/K, (b+1)/K].
        stratum_BK = rng.permutation_index(seed, Purpose.STRATA, index_B1 // group_size, num_strata, place_BK)
        u_BK = (stratum_BK + u_BK) / num_strata
    u_BK = u_BK.repeat_interleave(blocks_per_level, dim=1)[:, :num_blocks]
    # The sum may round past omega by its last bit.
    return (interval.beta + interval.width * u_BK).clamp(interval.beta, interval.omega)
