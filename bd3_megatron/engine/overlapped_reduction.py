"""Data-parallel gradients that leave in buckets while the last backward of a step still runs (ZeRO 1, bf16 weights).

Contract: DeepSpeed's BF16_Optimizer keeps one flat fp32 buffer of gradients a parameter group. Here it is cut into
buckets, last parameters first; a bucket's all-reduce starts, in place, when the last of its parameters has seen as many
gradients as the step has micro-batches. `finish` starts what is left, waits, and divides.
Refuses: a parameter with more gradients than micro-batches, whose bucket would have left too early (an internal error).
Not there: fp32 weights and offloaded optimizers, where DeepSpeed's own reduction at the end stays in place.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class _Bucket:
    """Neighbouring parameters of one flat buffer."""

    flat: Tensor
    """Their gradients, a view [n] fp32."""
    members: int
    late: bool
    waiting: int = 0
    """Members whose last gradient of the step has not come."""


@dataclass
class OverlappedReduction:
    """The data-parallel sum of one engine.

    Args:
        optimizer: DeepSpeed's BF16_Optimizer with immediate_grad_update, whose hooks fill the buffers before ours run.
        late: parameters whose gradients another sum must complete after the last backward.
        group: ranks to sum over (data and context parallel).
        bucket_elements: a bucket is closed when it holds at least so many.
    """

    optimizer: Any
    late: Collection[nn.Parameter]
    group: Any
    bucket_elements: int
    buckets: list[_Bucket] = field(init=False)
    _bucket_of: dict[nn.Parameter, _Bucket] = field(init=False, default_factory=dict)
    _seen: dict[nn.Parameter, int] = field(init=False, default_factory=dict)
    _expected: int = field(init=False, default=0)
    _next: int = field(init=False, default=0)
    _works: list[Any] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.buckets = []
        # Late: gradients that are first summed over another axis (norms under sequence parallelism, q and k norms, a
        # tied table in a pipeline); their buckets start in finish.
        late, held = set(self.late), self.optimizer
        groups = zip(held.bf16_groups, held.fp32_groups_gradients, held.fp32_groups_gradients_flat, strict=True)
        for parameters, grads, flat in groups:
            self._cut(parameters, grads, flat, late)
        # late ones last, so that none of the early ones waits behind them
        self.buckets.sort(key=lambda bucket: bucket.late)
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def _cut(self, parameters: list[nn.Parameter], grads: list[Tensor], flat: Tensor, late: set[nn.Parameter]) -> None:
        """Append the buckets of one flat buffer, its end first: there the backward begins."""
        stop = None
        members: list[nn.Parameter] = []
        for number in reversed(range(len(parameters))):
            parameter = parameters[number]
            # DeepSpeed aligns parameters in the flat buffer: offsets are read, not added up.
            start = grads[number].storage_offset() - flat.storage_offset()
            stop = stop if stop is not None else start + grads[number].numel()
            members.append(parameter)
            is_late = parameter in late
            same_kind_follows = number > 0 and (parameters[number - 1] in late) == is_late
            if same_kind_follows and stop - start < self.bucket_elements:
                continue
            self.buckets.append(_Bucket(flat[start:stop], len(members), is_late))
            self._bucket_of |= dict.fromkeys(members, self.buckets[-1])
            stop, members = None, []

    def begin(self, num_micro_batches: int) -> None:
        """Before the first forward of a step whose parameters will each see this many gradients."""
        self._expected, self._next, self._works = num_micro_batches, 0, []
        self._seen = dict.fromkeys(self._bucket_of, 0)
        for bucket in self.buckets:
            bucket.waiting = bucket.members

    def _arrived(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        seen = self._seen[parameter] = self._seen.get(parameter, 0) + 1
        if seen != self._expected:
            return
        self._bucket_of[parameter].waiting -= 1
        # In one fixed order on every rank, whatever order gradients come in: ranks that started two sums in different
        # orders would add the wrong ones.
        while self._next < len(self.buckets) and self._may_start(self.buckets[self._next]):
            self._start()

    @staticmethod
    def _may_start(bucket: _Bucket) -> bool:
        return bucket.waiting == 0 and not bucket.late

    def _start(self) -> None:
        flat = self.buckets[self._next].flat
        # In place and without waiting: no memory, no copy, the same bytes as DeepSpeed's own sum. On two ranks the
        # result is equal bit for bit; with more, differently cut buckets may be added in another order.
        self._works.append(dist.all_reduce(flat, group=self.group, async_op=True))
        self._next += 1

    @property
    def num_started(self) -> int:
        """Buckets under way or done in this step."""
        return self._next

    def finish(self) -> None:
        """After the last backward and after the sums over other axes: every gradient is the mean over the group.

        Raises:
            RuntimeError: a parameter saw more gradients than the step has micro-batches.
        """
        while self._next < len(self.buckets):
            self._start()
        # The time in here is the part of the communication that nothing hid.
        for work in self._works:
            work.wait()
        self._works = []
        most = max(self._seen.values(), default=0)
        if most > self._expected:
            raise RuntimeError(
                f"a parameter saw {most} gradients in a step of {self._expected} micro-batches, so its sum over the "
                "data-parallel ranks may have left too early; set parallel.overlap_grad_reduce=false"
            )
        # The mean over the group, as DeepSpeed takes it; the loss scale counts on it.
        share = 1.0 / dist.get_world_size(self.group)
        for bucket in self.buckets:
            bucket.flat.mul_(share)
