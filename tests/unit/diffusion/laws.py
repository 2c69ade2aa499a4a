"""Exact laws of one block's mask, by enumeration of all 2^S masks and quadrature over t: the truth in these tests."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.noise_schedule import NoiseSchedule


def all_masks(block_size: int) -> Tensor:
    """bool [2^S, S], the mask of row r being the binary digits of r, first position most significant."""
    return torch.tensor(list(itertools.product([False, True], repeat=block_size)))


def quadrature(interval: Interval, num_nodes: int = 400) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes of t on the interval, and weights that sum to 1."""
    node, weight = np.polynomial.legendre.leggauss(num_nodes)
    return torch.from_numpy(interval.beta + interval.width * (node + 1) / 2), torch.from_numpy(weight / 2)


def mask_law(probability: Tensor, masks: Tensor, interval: Interval | None = None) -> Tensor:
    """P(mask | p): [nodes, 2^S]; with an interval, conditioned on a masked fraction inside (ends included)."""
    count = masks.sum(dim=1)
    p = probability[:, None]
    law = p**count * (1 - p) ** (masks.shape[1] - count)
    if interval is None:
        return law
    fraction = count / masks.shape[1]
    law = law * ((fraction >= interval.beta - 1e-6) & (fraction <= interval.omega + 1e-6))
    return law / law.sum(dim=1, keepdim=True)


def estimator_moment(
    loss_of_mask: Tensor,
    schedule: NoiseSchedule,
    interval: Interval,
    *,
    power: int = 1,
    resample: bool = False,
    num_nodes: int = 400,
) -> float:
    """E of (weight(t) * loss_of_mask[mask]) ** power, loss_of_mask float64 [2^S], t uniform on the interval; exact."""
    t, dt = quadrature(interval, num_nodes)
    masks = all_masks(len(loss_of_mask).bit_length() - 1)
    law = mask_law(schedule.mask_probability(t), masks, interval if resample else None)
    return (dt * schedule.loss_weight(t) ** power * (law @ loss_of_mask**power)).sum().item()


def estimator_variance(
    loss_of_mask: Tensor, schedule: NoiseSchedule, interval: Interval, *, resample: bool = False
) -> float:
    """Exact variance of weight(t) * loss_of_mask[mask] with t uniform on the interval."""
    mean, square = (estimator_moment(loss_of_mask, schedule, interval, power=p, resample=resample) for p in (1, 2))
    return square - mean**2
