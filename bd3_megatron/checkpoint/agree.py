"""Ranks that must come to one verdict: gather and broadcast of small plain values, also where there is only one process.

Decides nothing; every function is collective over all ranks when a process group exists, and trivial without one.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def is_alone() -> bool:
    """True without a process group, or with one rank in it."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def rank_and_size() -> tuple[int, int]:
    """This rank and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    if is_alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    # Pickled and sent through the default group: these calls happen at saves and restarts, never inside a step.
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if is_alone():
        return value
    # Only what rank 0 put into the box counts; the others receive into theirs.
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_failure(error: str | None) -> str | None:
    """The failure of the lowest failing rank, on every rank; None when none failed."""
    # The lowest rank's text, not each rank's own: every rank must raise the same sentence.
    return next((text for text in gathered(error) if text is not None), None)
