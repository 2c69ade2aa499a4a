"""Gradients that each rank keeps only for the parameters it updates (ZeRO 1), reduced while the last backward still runs.

Contract: gradients of a step's micro-batches add up in fp32, in buckets of neighbouring parameters; a bucket goes to the
one rank that updates it, and what lies there after `finish` is the mean over the group. Refuses a parameter with more
gradients than micro-batches, whose bucket would have left too early (an internal error).
Source: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), stage 1; DeepSpeed's layout of the flat parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class FlatGroup:
    """Parameters of one optimizer group, which lie one behind the other in a flat tensor cut evenly over the ranks."""

    parameters: Sequence[nn.Parameter]
    starts: Sequence[int]
    """Where each begins in the flat tensor."""
    owned: Tensor
    """The part this rank updates, [elements of the flat tensor / ranks] fp32."""
    ranks: dist.ProcessGroup
    """That have copies of the parameters: data and context parallel ones, or those with the same experts."""


@dataclass
class _Bucket:
    """Neighbouring elements of one flat tensor, all updated by one rank."""

    group: int
    start: int
    stop: int
    owner: int
    """Rank within the group of ranks."""
    late: bool
    members: int = 0
    """Parameters with elements in it."""
    waiting: int = 0
    """Members whose last gradient of the step has not come."""
    sum: Tensor | None = None
    """[stop - start] fp32; None before the first gradient of the step."""


@dataclass(frozen=True)
class _Slice:
    """Elements [first, last) of a flattened parameter, from `at` on in their bucket."""

    bucket: _Bucket
    first: int
    last: int
    at: int

    @property
    def sum(self) -> Tensor:
        assert self.bucket.sum is not None
        return self.bucket.sum[self.at : self.at + self.last - self.first]


@dataclass
class ShardedGradients:
    """The gradients of one engine.

    Args:
        groups: of parameters.
        late: parameters whose gradients another sum must complete after the last backward.
        share: factor on every sum: one over the ranks whose losses are averaged. Of experts too, which fewer ranks share:
            their rows come from all of those.
        bucket_elements: a bucket is closed when it holds at least so many.
        overlap: send buckets while the last backward runs; off: all at its end.
        wire: dtype in which sums travel; None: the one they are kept in.
    """

    groups: Sequence[FlatGroup]
    late: Collection[nn.Parameter]
    share: float
    bucket_elements: int
    overlap: bool = True
    wire: torch.dtype | None = None
    owned: list[Tensor] = field(init=False)
    """The mean gradients of this rank's part of every group, after `finish`."""
    buckets: list[_Bucket] = field(init=False, default_factory=list)
    sent_bytes: int = field(init=False, default=0)
    """Bytes this rank handed to reductions in the present step."""
    _slices: dict[nn.Parameter, list[_Slice]] = field(init=False, default_factory=dict)
    _seen: dict[nn.Parameter, int] = field(init=False, default_factory=dict)
    _expected: int = field(init=False, default=0)
    _next: int = field(init=False, default=0)
    _on_the_way: list[tuple[Any, Tensor, _Bucket]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.owned = [torch.zeros_like(group.owned, requires_grad=False) for group in self.groups]
        late = set(self.late)
        for number, group in enumerate(self.groups):
            self._cut(number, group, late)
        # Late ones last, so that none of the early ones waits behind them. One fixed order on every rank, whatever order
        # gradients come in: ranks that started two sums in different orders would add the wrong ones.
        self.buckets.sort(key=lambda bucket: bucket.late)
        for parameter in self._slices:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _cut(self, number: int, group: FlatGroup, late: set[nn.Parameter]) -> None:
        """Append the buckets of one flat tensor, its end first: there the backward begins."""
        size = group.owned.numel()
        last: _Bucket | None = None
        for parameter, start in zip(reversed(group.parameters), reversed(group.starts), strict=True):
            slices: list[_Slice] = []
            for a, b in _pieces(start, start + parameter.numel(), size):
                kind = (number, a // size, parameter in late)
                is_full = last is not None and last.stop - last.start >= self.bucket_elements
                if last is None or is_full or (last.group, last.owner, last.late) != kind:
                    last = _Bucket(number, b, b, owner=a // size, late=parameter in late)
                    self.buckets.append(last)
                last.start, last.members = a, last.members + 1
                slices.append(_Slice(last, a - start, b - start, a))
            self._slices[parameter] = slices
        # Positions count from the bucket's start, which is known only now. In the parameter's own order: two stages that
        # cut their copies of a tied table in different places add them element by element.
        for parameter in group.parameters:
            moved = [
                _Slice(s.bucket, s.first, s.last, s.at - s.bucket.start) for s in reversed(self._slices[parameter])
            ]
            self._slices[parameter] = moved

    def begin(self, num_micro_batches: int) -> None:
        """Before the first forward of a step whose parameters will each see this many gradients."""
        self._expected, self._next, self.sent_bytes = num_micro_batches, 0, 0
        self._on_the_way = []
        self._seen = dict.fromkeys(self._slices, 0)
        for bucket in self.buckets:
            bucket.waiting, bucket.sum = bucket.members, None

    def sums(self, parameter: nn.Parameter) -> list[Tensor]:
        """The accumulated gradient of a late parameter, flat, in the pieces it is kept in, in order; before `finish`."""
        return [part.sum for part in self._slices[parameter]] if self._seen[parameter] else []

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        grad, parameter.grad = parameter.grad.flatten(), None
        seen = self._seen[parameter] = self._seen.get(parameter, 0) + 1
        for part in self._slices[parameter]:
            if part.bucket.sum is None:
                part.bucket.sum = self._memory(part.bucket)
            value = grad[part.first : part.last]
            # bf16 gradients are widened inside these kernels
            if seen == 1:
                part.sum.copy_(value)
            else:
                part.sum.add_(value)
        if seen == self._expected:
            for part in self._slices[parameter]:
                part.bucket.waiting -= 1
            while self.overlap and self._next < len(self.buckets) and self._may_start(self.buckets[self._next]):
                self._start()

    def _memory(self, bucket: _Bucket) -> Tensor:
        """Where a bucket adds up: at its owner in the rank's own part, elsewhere in memory that lives until it is sent."""
        mine = self.owned[bucket.group]
        if bucket.owner == self._rank(bucket):
            start = bucket.start - bucket.owner * mine.numel()
            return mine[start : start + bucket.stop - bucket.start]
        return mine.new_empty(bucket.stop - bucket.start)

    def _rank(self, bucket: _Bucket) -> int:
        """This rank's number among those that the bucket is summed over."""
        return dist.get_rank(self.groups[bucket.group].ranks)

    @staticmethod
    def _may_start(bucket: _Bucket) -> bool:
        return bucket.waiting == 0 and not bucket.late

    def _start(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        if bucket.sum is None:
            # none of its parameters took part in the step
            bucket.sum = self._memory(bucket)
        ranks = self.groups[bucket.group].ranks
        if dist.get_world_size(ranks) == 1:
            return
        sent = bucket.sum if self.wire is None else bucket.sum.to(self.wire)
        root = dist.get_global_rank(ranks, bucket.owner)
        work = dist.reduce(sent, dst=root, group=ranks, async_op=True)
        self.sent_bytes += sent.numel() * sent.element_size()
        self._on_the_way.append((work, sent, bucket))
        self._release()

    def _release(self) -> None:
        """Let go of what has arrived elsewhere; asks, does not wait."""
        while self._on_the_way:
            work, _, bucket = self._on_the_way[0]
            if bucket.owner == self._rank(bucket) or not work.is_completed():
                return
            bucket.sum = None
            self._on_the_way.pop(0)

    @torch.no_grad()
    def finish(self) -> None:
        """After the last backward and after the sums over other axes: `owned` holds the mean over the ranks.

        Raises:
            RuntimeError: a parameter saw more gradients than the step has micro-batches.
        """
        for parameter, slices in self._slices.items():
            if self._seen[parameter] == 0:
                self._fill_with_zeros(slices)
        while self._next < len(self.buckets):
            self._start()
        for work, sent, bucket in self._on_the_way:
            work.wait()
            if bucket.owner == self._rank(bucket) and bucket.sum is not None and sent is not bucket.sum:
                bucket.sum.copy_(sent)
        self._on_the_way = []
        for bucket in self.buckets:
            bucket.sum = None
        most = max(self._seen.values(), default=0)
        if most > self._expected:
            raise RuntimeError(
                f"a parameter saw {most} gradients in a step of {self._expected} micro-batches, so its sum over the "
                "data-parallel ranks may have left too early; set parallel.overlap_grad_reduce=false"
            )
        torch._foreach_mul_(self.owned, self.share)

    def _fill_with_zeros(self, slices: Sequence[_Slice]) -> None:
        for part in slices:
            if part.bucket.sum is None:
                part.bucket.sum = self._memory(part.bucket)
            part.sum.zero_()

    def owned_slices(self, counts: Collection[nn.Parameter]) -> list[Tensor]:
        """This rank's mean gradients of the given parameters, piece by piece; after `finish`."""
        found = []
        for parameter in counts:
            for part in self._slices[parameter]:
                mine = self._rank(part.bucket)
                if part.bucket.owner == mine:
                    start = part.bucket.start + part.at - mine * self.owned[part.bucket.group].numel()
                    found.append(self.owned[part.bucket.group][start : start + part.last - part.first])
        return found


def _pieces(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """The range cut at multiples of `size`, its end first."""
    while start < stop:
        cut = max(start, (stop - 1) // size * size)
        yield cut, stop
        stop = cut
