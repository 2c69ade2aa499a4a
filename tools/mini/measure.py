"""What is measured of the trained models: likelihood on the same held-out text, variance by interval, frontier.

Decides: the first token of a sequence is given to all models, since the AR model cannot predict it; blocks of up to
MAX_EXACT tokens are scored by enumeration, larger ones by draws. The variance of an interval is that of one block's loss
in nats per token over held-out blocks and noise: what the search minimises.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.diffusion.corrupt import corrupt
from bd3_megatron.diffusion.noise_level import Interval, noise_levels
from bd3_megatron.diffusion.noise_schedule import noise_schedule
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.diffusion.token_nll import block_losses, masked_token_nll
from bd3_megatron.evaluate.generative import GenerationRequest, frontier, grid_of
from bd3_megatron.evaluate.offline import Work, load_model, score_plain
from bd3_megatron.evaluate.perplexity import Estimate, ScoreSettings, SequenceScores, estimate, sequence_scores
from bd3_megatron.evaluate.scoring_model import ScoringModel
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.sampling.generate import Sampler
from bd3_megatron.sampling.text import folder_tokenizer
from tools.mini.runs import MiniRun
from tools.mini.variants import MINI_SEQ_LEN, MiniSize

# 2^4 masks a block can be enumerated; 2^8 would cost 256 forwards a block.
MAX_EXACT = 4
INTERVALS = ((1e-3, 0.5), (0.3, 0.8), (0.5, 1.0), (1e-3, 1.0))
"""Of the paper's variance table."""
# Noise of its own: not that of training, nor of the search.
VARIANCE_SEED = 7
HOST = torch.device("cpu")


@dataclass(frozen=True)
class ModelMeasurement:
    """What one model showed."""

    estimate: Estimate
    scores: SequenceScores
    interval_variances: tuple[float, ...]
    """Empty where they were not asked for."""


def measure_all(
    jobs: Sequence[MiniRun], held_out: Path, size: MiniSize, *, at_once: int, with_variances: Collection[str]
) -> Iterator[ModelMeasurement]:
    """Measure every job's model, in the order of the jobs, a core each.

    Args:
        jobs: trained runs.
        held_out: prepared split.
        size: how much is scored.
        at_once: processes.
        with_variances: variants whose first seed is measured by interval too.
    """
    wanted = [job.variant.name in with_variances and job.seed == size.seeds[0] for job in jobs]
    # torch's threads do not survive a fork.
    context = get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_measure, jobs, [held_out] * len(jobs), [size] * len(jobs), wanted)


def _measure(job: MiniRun, held_out: Path, size: MiniSize, with_variances: bool) -> ModelMeasurement:
    dataset = TokenDataset.open(held_out, seq_len=MINI_SEQ_LEN, shuffle=False)
    variances = interval_variances(job, dataset, size.num_sequences) if with_variances else []
    return ModelMeasurement(*likelihood(job, dataset, size), tuple(variances))


def likelihood(job: MiniRun, dataset: TokenDataset, size: MiniSize) -> tuple[Estimate, SequenceScores]:
    """Perplexity of one model, and the scores of each sequence."""
    model, config = load_model(job.folder, device=HOST)
    is_small = objective_named(config.objective).has_noise and config.block_size <= MAX_EXACT
    # AR predicts no first token, so no model is asked for it
    convention = EvaluationConvention(first_token_given=True)
    settings = ScoreSettings(convention=convention, num_sequences=size.num_sequences, draws=size.draws, exact=is_small)
    scored = score_plain(model, dataset, settings, Work(batch_size=32), mask_id=config.mask_token_id)
    return estimate(*scored), sequence_scores(*scored)


def interval_variances(job: MiniRun, dataset: TokenDataset, num_sequences: int) -> list[float]:
    """Variance of one block's loss under each of INTERVALS, nats squared."""
    model, config = load_model(job.folder, device=HOST)
    index_B = torch.arange(min(num_sequences, dataset.num_rows))
    found = []
    for beta, omega in INTERVALS:
        # Every interval with the same rows and uniform numbers: differences are not those of luck.
        losses = [
            _block_losses(model, dataset, part, Interval(beta, omega), config.mask_token_id)
            for part in index_B.split(32)
        ]
        found.append(float(torch.cat(losses).var()))
    return found


@torch.inference_mode()
def _block_losses(
    model: PlainBD3, dataset: TokenDataset, index_B: Tensor, interval: Interval, mask_id: int | None
) -> Tensor:
    """One draw's loss of every block: [blocks], nats per token."""
    assert mask_id is not None  # block-diffusion models have one
    clean = dataset.batch_for(index_B)
    blocks = MINI_SEQ_LEN // model.model.shape.block_size
    t_BK = noise_levels(VARIANCE_SEED, index_B, num_blocks=blocks, interval=interval, group_size=len(index_B))
    noisy = corrupt(
        clean.tokens_BL,
        t_BK,
        index_B=index_B,
        seed=VARIANCE_SEED,
        mask_id=mask_id,
        schedule=noise_schedule("loglinear"),
    )
    nll_BL = masked_token_nll(model(noisy.noisy_BL, clean.tokens_BL), clean.tokens_BL, mask_id=mask_id)
    return block_losses(nll_BL, noisy).flatten()


def frontiers(
    jobs: Sequence[MiniRun],
    scorer_folder: Path,
    tokenizer_folder: Path,
    *,
    num_samples: int,
    temperatures: Sequence[float],
) -> dict[str, list[dict[str, Any]]]:
    """Points of every model's frontier, by label.

    Args:
        jobs: models to sample from.
        scorer_folder: an exported autoregressive model.
        tokenizer_folder: of the data.
        num_samples: texts a point.
        temperatures: of the points.
    """
    scorer, tokenizer = ScoringModel.load(scorer_folder), folder_tokenizer(tokenizer_folder)
    request = GenerationRequest(num_samples=num_samples, num_tokens=MINI_SEQ_LEN - 1, batch_size=num_samples)
    points = {}
    for job in jobs:
        model, config = load_model(job.folder, device=HOST)
        # The miniature's checkpoints know no BOS; texts begin with the tokenizer's.
        special = None if tokenizer is None else tokenizer.bos_token_id
        config.bos_token_id = special if config.bos_token_id is None else config.bos_token_id
        points[job.variant.label] = frontier(
            Sampler(model, config, tokenizer), scorer, request, grid_of(["first_hitting"], temperatures)
        )
    return points
