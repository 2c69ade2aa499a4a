"""A mixture of experts made of a dense model's MLPs, which computes what the dense model computes.

Contract: an MLP of inner width F is cut into the shared expert and g = (F - shared) / width slices; experts are copies of the
slices, copy after copy. The router's rows of one copy are equal, so that a row's choice is whole copies, and their weights, which
sum to 1, are made up for in the down matrix by g / scaling factor. Noise, where it is asked for, sets copies apart.
Source: copies, arXiv 2212.05055; slices chosen together, arXiv 2410.07524.
"""

from __future__ import annotations

import copy
import math
import re

import torch
from torch import Tensor

from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.plain_config import MIXTURE_FIELDS, mixture_fields
from bd3_megatron.convert.plain_source import PlainSource
from bd3_megatron.convert.to_hf import expected_shapes
from bd3_megatron.errors import ConversionError, RangeError
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.rng import Purpose, generator_seed

_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.)(?:experts\.(\d+)|shared_experts)\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(r"model\.layers\.\d+\.mlp\.gate\.(weight|expert_bias)")
MOST_NOISE = 1.0
"""More would leave nothing of the copied weights."""


def upcycled(
    described: BD3Config, source: PlainSource, config: Config, *, noise: float
) -> tuple[BD3Config, PlainSource]:
    """Description and tensors of the mixture.

    Args:
        described: of the dense model.
        source: its tensors.
        config: of the run, whose experts are made.
        noise: on every copied weight, times the standard deviation of its matrix.

    Raises:
        ConversionError: the run has no experts, the folder has some, or no copies of its MLPs are such a mixture.
        RangeError: `noise` outside its range.
    """
    experts = config.model.experts
    if experts is None or described.num_experts:
        raise ConversionError(
            f"--upcycle makes experts of a dense folder for a run with model.experts; this folder has {described.num_experts} "
            f"experts and the run {0 if experts is None else experts.number}: leave --upcycle out."
        )
    if not 0 <= noise <= MOST_NOISE:
        raise RangeError(f"--upcycle {noise:g} is outside [0, {MOST_NOISE:g}]; 0.01 sets copies apart a little.")
    slices = _slices(experts, described.intermediate_size)
    # The folder's own description stays: the proof compares the two.
    target = copy.copy(described)
    fields = mixture_fields(config.model)
    for field in MIXTURE_FIELDS:
        setattr(target, field, fields[field])
    return target, _Upcycled(source, target, slices, noise=noise, seed=config.run.seed, std=config.model.init_std)


def _slices(experts: ExpertsConfig, width: int) -> int:
    """g, the experts that one copy of an MLP is cut into."""
    routed = width - (experts.shared_width or 0)
    if routed <= 0 or routed % experts.width:
        raise ConversionError(
            f"experts of width={experts.width} and shared_width={experts.shared_width or 0} do not make up the folder's MLP of "
            f"{width}; use a width that divides {width} less shared_width."
        )
    slices = routed // experts.width
    # a group of experts is admitted or left out as a whole
    for name, value in (
        ("number", experts.number),
        ("top_k", experts.top_k),
        ("number / groups", experts.number // experts.groups),
    ):
        if value % slices:
            raise ConversionError(
                f"{name}={value} is no multiple of the {slices} experts that a copy of the folder's MLP is cut into; use one."
            )
    # their sum would be what the router gives to the chosen ones, which differs from row to row
    if not experts.normalize_top_k:
        raise ConversionError(
            "normalize_top_k=false leaves the sum of the weights to the router, so that no copies compute what the folder "
            "does; set it to true."
        )
    return slices


class _Upcycled:
    """As PlainSource."""

    def __init__(
        self, dense: PlainSource, target: BD3Config, slices: int, *, noise: float, seed: int, std: float
    ) -> None:
        self._dense, self._target, self._slices = dense, target, slices
        self._noise, self._seed, self._std = noise, seed, std
        # without memory: a mixture may be many times as large as the folder
        self._shapes = expected_shapes(target)

    def names(self) -> list[str]:
        """As PlainSource."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """As PlainSource."""
        return self._shapes[name]

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """As PlainSource, of a table."""
        return self._dense.rows(name, start, end)

    def tensor(self, name: str) -> Tensor:
        """As PlainSource."""
        router, expert = _ROUTER.fullmatch(name), _EXPERT.fullmatch(name)
        if router is not None:
            return self._router(name) if router[1] == "weight" else torch.zeros(self._shapes[name])
        if expert is None:
            return self._dense.tensor(name)
        prefix, number, part = expert.groups()
        # Read again for every expert: copies of all layers would not fit where one matrix does.
        whole = self._dense.tensor(f"{prefix}{part}_proj.weight").float()
        return self._cut(whole, number, part, name)

    def _cut(self, whole: Tensor, number: str | None, part: str, name: str) -> Tensor:
        # the inner width is the columns of the down matrix and the rows of the others
        axis, shared = int(part == "down"), self._target.shared_expert_intermediate_size
        if number is None:
            return whole.narrow(axis, 0, shared).contiguous()
        width = self._target.moe_intermediate_size
        cut = whole.narrow(axis, shared + int(number) % self._slices * width, width).contiguous()
        if self._noise:
            cut = cut + self._noise * whole.std() * self._drawn(name, tuple(cut.shape))
        # the weights of a copy's slices are equal, and those of all chosen experts sum to the scaling factor
        return cut * (self._slices / self._target.routed_scaling_factor) if part == "down" else cut

    def _router(self, name: str) -> Tensor:
        number, hidden = self._shapes[name]
        # Drawn, not zero: at equal scores every row would choose the same copies, and others would never learn.
        rows = self._drawn(name, (number // self._slices, hidden)) * self._std
        return rows.repeat_interleave(self._slices, dim=0)

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # keyed by the tensor's name, so that the draw does not depend on the order of reading
        generator = torch.Generator().manual_seed(generator_seed(self._seed, Purpose.INIT, f"upcycled {name}"))
        return torch.randn(math.prod(shape), generator=generator).view(shape)
