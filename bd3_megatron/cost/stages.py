"""How layers are dealt to pipeline stages, embedding and head counted as work.

Decides: contiguous stages that minimise the largest load, where the last stage also carries the head (in units of one
layer's work) and the first the embedding. Interleaved chunks are of equal size, as megatron's interleaved schedule
wants. Costs nothing; torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence

from bd3_megatron.config.validate import check_layer_split
from bd3_megatron.errors import GridError


def split_layers(
    num_layers: int,
    num_stages: int,
    *,
    embedding_layers: float = 0.0,
    head_layers: float = 0.0,
    given: Sequence[int] = (),
    interleaved: bool = False,
) -> tuple[int, ...]:
    """Layers of each stage, in order of depth.

    Args:
        num_layers: of the model.
        num_stages: pipeline stages x virtual stages.
        embedding_layers, head_layers: their work in units of one layer's.
        given: an explicit split, taken as it is.
        interleaved: all chunks equal.

    Raises:
        GridError: the split does not add up, or does not exist.
    """
    if given:
        check_layer_split(given, num_layers, num_stages)
        return tuple(given)
    if num_stages > num_layers:
        raise GridError(f"{num_stages} pipeline stages exceed num_layers={num_layers}; use at most {num_layers}.")
    # megatron's interleaved schedule wants equal chunks, so the head's load cannot be evened out
    if interleaved:
        if num_layers % num_stages:
            raise GridError(
                f"pp x vpp = {num_stages} does not divide num_layers={num_layers}; interleaved chunks are of equal size."
            )
        return (num_layers // num_stages,) * num_stages
    split = [num_layers // num_stages + (i < num_layers % num_stages) for i in range(num_stages)]
    # embedding and head are load that cannot move
    extra = [0.0] * num_stages
    extra[0] += embedding_layers
    extra[-1] += head_layers
    return tuple(_even_out(split, extra))


def _even_out(split: list[int], extra: list[float]) -> list[int]:
    """Move single layers from the most to the least loaded stage while that lowers the largest load."""
    while True:
        load = [n + e for n, e in zip(split, extra, strict=True)]
        # a stage's last layer never moves: an empty stage could not run
        most = max((i for i in range(len(split)) if split[i] > 1), key=lambda i: load[i], default=None)
        least = min(range(len(split)), key=lambda i: load[i])
        if most is None or load[most] < max(load) or load[least] + 1 >= load[most]:
            return split
        split[most] -= 1
        split[least] += 1
