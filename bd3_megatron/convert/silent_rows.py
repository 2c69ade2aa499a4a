"""A row of the output table that no engine ever samples: for ids of no token, and for the mask.

Engines that serve SDAR's layout sample from every row; a row of zeros has logit 0 and, a hundred thousand times over,
most of the probability. The row made here points against the mean final state, and its logit is -SILENCE or less at
every position of a probe, on which the written folder is checked. A model for which no such row exists is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bd3_megatron.convert.layerwise import TABLE_ROWS, final_states, head_logits
from bd3_megatron.convert.plain_source import PlainSource
from bd3_megatron.errors import ConversionError
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.rng import Purpose, uniform

SILENCE = 60.0
"""Logits of tokens lie within some tens of 0: exp(-60) times 10**5 rows is nothing beside them."""
MAX_MASS = 1e-6
"""Largest probability that all silent rows together may have at any position of the probe."""
_SEED = 11
_NUM_SEQUENCES = 8
NUM_TOKENS = 64
"""Length of a probed sequence, or two blocks where that is more."""
_ROUNDS = 3
LEAST_SHARE = 0.02
"""Of the mean's length: with less, the row would grow beyond what the norms of stored weights are like."""


@dataclass(frozen=True)
class Probe:
    """Sequences that the model itself wrote, partly masked, and the final states at their masked positions."""

    noisy_BL: Tensor
    clean_BL: Tensor
    states_ND: Tensor


def probe(source: PlainSource, config: BD3Config) -> Probe:
    """Let the model write from nothing, block after block at once, and keep what its head sees.

    Args:
        source: its tensors, plain names.
        config: of a block model.
    """
    assert config.mask_token_id is not None
    span, mask_id = config.block_size, config.mask_token_id
    length = max(NUM_TOKENS, 2 * span) // span * span
    place_BL = torch.arange(_NUM_SEQUENCES * length).view(_NUM_SEQUENCES, length)
    ids = torch.tensor([i for i in range(config.vocab_size) if i != mask_id])
    # Beginning from random ids; after each round the model's own samples take their places.
    clean_BL = ids[(uniform(_SEED, Purpose.EVALUATE, place_BL) * len(ids)).long()]
    states, noisy_BL = [], clean_BL
    for number in range(_ROUNDS):
        # half of the blocks wholly masked, as when a block begins; the others to some part
        level_BK = 2 * uniform(_SEED, Purpose.NOISE_LEVEL, place_BL[:, ::span], number)
        is_masked_BL = uniform(_SEED, Purpose.CORRUPT, place_BL, number) < level_BK.repeat_interleave(span, dim=1)
        noisy_BL = torch.where(is_masked_BL, mask_id, clean_BL)
        x_BLD = final_states(source, config, noisy_BL, clean_BL, span=span)
        states.append(x_BLD[is_masked_BL])
        if number < _ROUNDS - 1:
            logits_NV = head_logits(source, config, states[-1][None])[0]
            # The mask is never sampled (SUBS).
            logits_NV[:, mask_id] = -math.inf
            chance_N = uniform(_SEED, Purpose.SAMPLE, place_BL[is_masked_BL], number)
            clean_BL = clean_BL.masked_scatter(is_masked_BL, _sampled(logits_NV, chance_N))
    return Probe(noisy_BL, clean_BL, torch.cat(states))


def _sampled(logits_NV: Tensor, chance_N: Tensor) -> Tensor:
    """One id a position: where the cumulative probability passes `chance_N`."""
    cumulated_NV = logits_NV.softmax(-1).cumsum(-1)
    # a chance of 1 - 2**-24 may lie beyond a sum that was rounded down
    wanted_N1 = (chance_N * cumulated_NV[:, -1])[:, None]
    return torch.searchsorted(cumulated_NV, wanted_N1, right=True).squeeze(1).clamp_max(logits_NV.shape[1] - 1)


def silent_row(states_ND: Tensor) -> Tensor:
    """A row [D], fp32, along the mean state, whose product with every state is -SILENCE or less.

    Args:
        states_ND: final states, after the last norm.

    Raises:
        ConversionError: a state has no part along the mean.
    """
    mean_D = states_ND.mean(0)
    # The mean of a thousand states is known however wide they are; a direction fitted to the weakest of them is not.
    # Trained for 600 steps, on text it never saw: at worst -44 with this row, -7 with the best one for the probe.
    weakest = float((states_ND @ mean_D).min())
    share = weakest / float(mean_D.square().sum())
    if not share >= LEAST_SHARE:
        raise ConversionError(
            "no row of the output table keeps unused ids silent: a final state of the probe has "
            f"{share:.3g} of the mean's length along the mean, {LEAST_SHARE} is needed; is the model trained?"
        )
    # Scaled so that the weakest state of the probe still gives -SILENCE.
    return -SILENCE / weakest * mean_D


def check_silent(source: PlainSource, config: BD3Config, probed: Probe, silent_ids: Sequence[int]) -> float:
    """The largest probability of all silent ids together at a masked position of the probe, on written weights.

    Args:
        source: the written tensors, with an output table of its own.
        config: what they are a model of.
        probed: what the model wrote; its mask may have had another id.
        silent_ids: rows that must not be sampled.

    Raises:
        ConversionError: it exceeds MAX_MASS.
    """
    mask_id = config.mask_token_id
    assert mask_id is not None
    # a token the model wrote is never the mask, so these are exactly the masked positions
    is_masked_BL = probed.noisy_BL != probed.clean_BL
    noisy_BL = torch.where(is_masked_BL, mask_id, probed.clean_BL)
    x_ND = final_states(source, config, noisy_BL, probed.clean_BL, span=config.block_size)[is_masked_BL]
    silent_V = torch.zeros(config.vocab_size, dtype=torch.bool)
    silent_V[torch.tensor(list(silent_ids))] = True
    sums = {True: torch.full((len(x_ND),), -math.inf), False: torch.full((len(x_ND),), -math.inf)}
    for start in range(0, config.vocab_size, TABLE_ROWS):
        end = min(start + TABLE_ROWS, config.vocab_size)
        logits = x_ND @ source.rows("lm_head.weight", start, end).float().T
        for is_silent, total in sums.items():
            chosen = logits[:, silent_V[start:end] == is_silent]
            # Log sums, part by part of the table: exp of the logits themselves may overflow.
            sums[is_silent] = torch.logaddexp(total, chosen.logsumexp(-1)) if chosen.shape[1] else total
    mass_N = (sums[True] - torch.logaddexp(sums[True], sums[False])).exp()
    largest = float(mass_N.max())
    if not largest <= MAX_MASS:
        raise ConversionError(
            f"ids that are no token have probability {largest:.3g} at a position of the probe, more than {MAX_MASS:g}; "
            "the folder was not written."
        )
    return largest
