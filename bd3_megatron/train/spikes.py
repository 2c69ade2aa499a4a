"""The loss-spike guard: a batch whose loss stands far above what the run is used to must not move the weights.

Decides: a spike is a loss above `train.spike_factor` times the median of the last WINDOW steps' losses, once there are
MIN_HISTORY of them; a loss that is not finite always is one. `skip` leaves the batch out; `rollback` returns to the newest
checkpoint and goes on behind the batch, for runs in which a spike is the end of a slow divergence. Either is written to
the record. The history is part of the train state, so a resumed run decides as the undisturbed one would.
Costs: one reduction and one host sync a step while it is on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

# Steps. The median of these follows a falling loss and is not moved by a few spikes.
WINDOW = 64
# Below this the first steps' steep fall would decide what is usual.
MIN_HISTORY = 16


def is_spike(loss: float, history: Sequence[float], factor: float) -> bool:
    """Whether a step's loss is a spike.

    Args:
        loss: nats per token of the step.
        history: losses of the steps before, newest last.
        factor: train.spike_factor, above 1.
    """
    if not math.isfinite(loss):
        return True
    return len(history) >= MIN_HISTORY and loss > factor * median(history[-WINDOW:])


def remember(history: list[float], loss: float) -> None:
    """Add a normal step's loss, dropping what the window no longer needs."""
    history.append(loss)
    del history[:-WINDOW]
