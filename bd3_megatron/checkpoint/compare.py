"""Two checkpoints side by side, and one in numbers: what inspection tools print.

Costs: one parameter (of each checkpoint) at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bd3_megatron.checkpoint.layout import Manifest
from bd3_megatron.checkpoint.read import CheckpointReader


@dataclass(frozen=True)
class TensorFacts:
    """A parameter in numbers."""

    name: str
    shape: tuple[int, ...]
    norm: float
    largest: float
    num_not_finite: int


@dataclass(frozen=True)
class TensorDifference:
    """How far two versions of a parameter are apart."""

    name: str
    largest: float
    relative: float
    """Norm of the difference over the norm of the first."""


def facts(reader: CheckpointReader, which: str) -> Iterator[TensorFacts]:
    """Norms of every parameter, padding rows included."""
    for name in reader.names():
        tensor = reader.tensor(name, which)
        # One NaN would make both numbers NaN; what is not finite is counted instead.
        finite = tensor.isfinite()
        kept = tensor[finite]
        largest = kept.abs().max().item() if kept.numel() else math.nan
        yield TensorFacts(name, tuple(tensor.shape), kept.double().norm().item(), largest, int((~finite).sum()))


def differences(first: CheckpointReader, second: CheckpointReader, which: str) -> Iterator[TensorDifference]:
    """Every parameter that both have, with equal shapes, also where they are equal to the bit (largest 0)."""
    both = set(first.names()) & set(second.names())
    for name in first.names():
        if name not in both or first.shape(name) != second.shape(name):
            continue
        one, other = first.tensor(name, which).double(), second.tensor(name, which).double()
        # In float64: the difference of two nearly equal fp32 tensors is mostly rounding otherwise.
        gap = one - other
        norm = one.norm().item()
        # A parameter that is all zeros has no scale to compare with: equal is 0, anything else is infinitely far.
        relative = gap.norm().item() / norm if norm else (0.0 if not gap.any() else math.inf)
        yield TensorDifference(name, gap.abs().max().item(), relative)


def only_in_one(first: CheckpointReader, second: CheckpointReader) -> list[str]:
    """Names of parameters that only one has, or that have other shapes."""
    one, other = ({n: reader.shape(n) for n in reader.names()} for reader in (first, second))
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def manifest_differences(first: Manifest, second: Manifest) -> list[str]:
    """`field: a -> b` of what the manifests say differently, files aside, the configuration key by key."""
    lines = []
    for name in (
        "step",
        "samples_consumed",
        "grid",
        "zero_stage",
        "world_size",
        "vocab_size",
        "mask_id",
        "git_commit",
        "kind",
    ):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            lines.append(f"{name}: {one} -> {other}")
    for section in sorted({*first.config, *second.config}):
        one, other = first.config.get(section) or {}, second.config.get(section) or {}
        keys = sorted({*one, *other})
        lines += [f"config {section}.{k}: {one.get(k)} -> {other.get(k)}" for k in keys if one.get(k) != other.get(k)]
    return lines
