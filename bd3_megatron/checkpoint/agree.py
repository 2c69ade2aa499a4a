"""Ranks that must come to one verdict: gather and broadcast of small plain values, also where there is only one process.

Every function is collective over all ranks when a process group exists, and trivial without one. `together` lets all
ranks end with one error, wherever it arose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from bd3_megatron.errors import BD3Error

Made = TypeVar("Made")


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


def together(kind: type[BD3Error], action: Callable[[], Made]) -> Made:
    """What an action gives here; an error of `kind` that any rank met is raised on every rank. Collective.

    Args:
        kind: other errors are programming errors and end their rank alone.
        action: holds no collective that a rank with an error would leave its peers in.

    Raises:
        kind: the sentence of the lowest failing rank.
    """
    made, failure = [], None
    try:
        made.append(action())
    except kind as error:
        failure = str(error)
    # A rank that raised alone would leave the others in the next collective, until its time-out.
    failure = first_failure(failure)
    if failure is not None:
        raise kind(failure)
    return made[0]
