"""Forward and backward of one step's micro-batches through megatron's schedules.

Decides: p2p tensors have the rows of the pair (2L / cp, less a dropped block), not L. The schedule sees the raw chunks;
losses are sums scaled by one number, so nothing is divided by micro-batches. Interleaved stages each walk the same list
of micro-batches. Without a pipeline this is a plain loop in megatron's no-pipelining schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from bd3_megatron.model.bd3_model import LossOutput, ModelChunk
from bd3_megatron.model.build import ParallelModel
from bd3_megatron.model.loss_sums import LossSums, loss_sums
from bd3_megatron.model.pair_batch import PairBatch

Span = Callable[[str], AbstractContextManager[None]]
"""Opens a named stretch of time: "forward", "backward", "optimizer"."""


def no_span(kind: str) -> AbstractContextManager[None]:
    """Measures nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Pipeline:
    """Runs micro-batches through the chunks of this rank."""

    model: ParallelModel

    def run(
        self,
        batches: Sequence[PairBatch],
        *,
        loss_scale: float | Tensor,
        forward_only: bool = False,
        span: Span = no_span,
    ) -> list[LossSums]:
        """One pass over the micro-batches; gradients accumulate in the parameters.

        Args:
            batches: this rank's micro-batches in order.
            loss_scale: factor on every micro-batch's loss sum.
            forward_only: evaluate without gradients.
            span: forwards are opened inside; what the schedule does between them is its own (backward and waiting).

        Returns:
            The sums of each micro-batch on the last stage, nothing elsewhere.
        """
        cp = self.model.topology.cp

        def forward_step(iterator: Iterator[PairBatch], chunk: ModelChunk) -> tuple[Any, Callable[..., Any]]:
            batch = next(iterator)
            with span("forward"):
                # Interleaved stages walk the same list of micro-batches, each chunk with an iterator of its own.
                return chunk(batch), lambda output: self._loss(batch, output, loss_scale)

        iterators = [iter(batches) for _ in self.model.chunks]
        # Waiting for a neighbour stage is inside, too: what the schedule does between forwards is its own.
        with span("backward"):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.model.chunks if len(iterators) > 1 else self.model.chunks[0],
                num_microbatches=len(batches),
                # the schedule divides by cp itself
                seq_length=self.model.layout.num_rows * cp,
                micro_batch_size=batches[0].batch_size,
                forward_only=forward_only,
            )

    def _loss(
        self, batch: PairBatch, output: LossOutput, loss_scale: float | Tensor
    ) -> tuple[Tensor, Tensor, LossSums]:
        # megatron counts tokens in int; ours are counted once for the whole step, so it is given none
        weighted_sum, nll_R, entropy_R = output
        no_tokens = torch.zeros((), dtype=torch.int, device=nll_R.device)
        return scaled_loss(weighted_sum, loss_scale), no_tokens, loss_sums(batch, nll_R, entropy_R)


def scaled_loss(weighted_sum: Tensor, loss_scale: float | Tensor) -> Tensor:
    """A micro-batch's loss for the backward: the sum times the scale, with no finite gradient where it is not finite.

    Args:
        weighted_sum: sum of weight x NLL, nats.
        loss_scale: factor on it.
    """
    # A finite gradient of a loss that is not would move the weights. This way the optimizer's own check of the gradient
    # norm, which spans all ranks, finds it, and no rank has to ask another one or wait for its device.
    return weighted_sum * (loss_scale + 0.0 * weighted_sum.detach())
