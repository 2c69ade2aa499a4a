"""One forward of the engine, from ids and a row plan to the logits of the wanted rows: eager, or recorded and replayed.

Contract: what cannot be replayed runs eagerly; the output of a recorded forward is valid until the next forward.
Not measured: recording has been run through a stand-in recorder on the CPU only.
Source: torch.accelerator.Graph (torch >= 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .cache_bd3 import KeyValueCache, RowPlan, cached_hidden
from .plain_bd3 import LayerStack

# Runs a function once so that it can be run again: (run it again, the tensor it writes its result to).
Recorder = Callable[[Callable[[], Tensor]], "tuple[Callable[[], None], Tensor]"]
# Spans are rounded up to this when forwards are replayed, so that few shapes exist.
REPLAY_SPAN_MULTIPLE = 128
WARM_UP_RUNS = 2


class Forward(Protocol):
    """Runs R rows over the cache."""

    span_multiple: int
    """what spans must be rounded up to"""

    def __call__(self, cache: KeyValueCache, ids_BR: Tensor, plan: RowPlan, keep_BQ: Tensor) -> Tensor:
        """Raw logits [B, Q, V] of the kept rows; valid until the next call."""


class EagerForward:
    """Runs the layers as they are."""

    span_multiple: int = 1

    def __init__(self, stack: LayerStack, lm_head: nn.Module) -> None:
        self._stack, self._lm_head = stack, lm_head

    def __call__(self, cache: KeyValueCache, ids_BR: Tensor, plan: RowPlan, keep_BQ: Tensor) -> Tensor:
        logits_BQV: Tensor = self._lm_head(cached_hidden(self._stack, cache, ids_BR, plan, keep_BQ))
        return logits_BQV


@dataclass(frozen=True)
class Recording:
    """A recorded forward and the tensors it reads."""

    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    logits_BQV: Tensor


# A forward of a small model on an accelerator is bound by launches. Only shapes that occur again are recorded (the first
# forward of a block and the others, at each rounded span), never a prompt's.
class ReplayedForward:
    """Records forwards whose shape occurs a second time, and replays them from then on.

    Args:
        stack, lm_head: the model, on its device.
        recorder: see `Recorder`; `record_graph` on an accelerator.
    """

    span_multiple: int = REPLAY_SPAN_MULTIPLE

    def __init__(self, stack: LayerStack, lm_head: nn.Module, recorder: Recorder) -> None:
        self._eager = EagerForward(stack, lm_head)
        self._recorder = recorder
        self._recordings: dict[tuple[int, ...], Recording | None] = {}
        self._cache_keys: Tensor | None = None

    def __call__(self, cache: KeyValueCache, ids_BR: Tensor, plan: RowPlan, keep_BQ: Tensor) -> Tensor:
        if not isinstance(plan.slots, Tensor):
            return self._eager(cache, ids_BR, plan, keep_BQ)
        # A recording writes to the cache it was made with: another cache starts anew.
        if cache.keys_nBGCH is not self._cache_keys:
            self._recordings, self._cache_keys = {}, cache.keys_nBGCH
        shape = (*ids_BR.shape, keep_BQ.shape[1], plan.span)
        inputs = (ids_BR, plan.position_BR, plan.slots, plan.end_BR, keep_BQ)
        recording = self._recordings.get(shape)
        if recording is None:
            if shape not in self._recordings:
                self._recordings[shape] = None
                return self._eager(cache, ids_BR, plan, keep_BQ)
            recording = self._recordings[shape] = self._record(cache, inputs, plan.span)
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        recording.replay()
        return recording.logits_BQV

    def _record(self, cache: KeyValueCache, inputs: tuple[Tensor, ...], span: int) -> Recording:
        # a graph reads fixed addresses, hence tensors of its own that every call is copied into
        own = tuple(tensor.clone() for tensor in inputs)
        ids_BR, position_BR, slot_BR, end_BR, keep_BQ = own
        plan = RowPlan(position_BR, slot_BR, end_BR, span, is_uniform=False)
        # Running it before and while recording writes the same keys to the same slots: harmless.
        replay, logits_BQV = self._recorder(lambda: self._eager(cache, ids_BR, plan, keep_BQ))
        return Recording(own, replay, logits_BQV)


def record_graph(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record a function as a graph of the current accelerator."""
    stream = torch.Stream()
    with stream:
        for _ in range(WARM_UP_RUNS):
            function()
    torch.accelerator.synchronize()
    graph = torch.accelerator.Graph()
    with stream, graph:
        output = function()
    return graph.replay, output
