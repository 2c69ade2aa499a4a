"""Statistics of generated text that need no other model: entropy, distinct n-grams, lengths.

Pure: lists of token ids in, numbers out.
Source: unigram entropy per sample as in the official metrics.py; distinct-n, Li et al. 2016 (arXiv 1510.03055).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import mean, median

# Perplexity under a scoring model falls when a text repeats itself, entropy rises when it is drawn at random: read both.
MAX_NGRAM = 4


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy in nats of the tokens of one sample; 0 for none."""
    # Of one sample at a time: over all samples together, different texts would look diverse though each repeats itself.
    total = len(tokens)
    return -sum(n / total * math.log(n / total) for n in Counter(tokens).values()) if total else 0.0


def distinct_ngrams(samples: Sequence[Sequence[int]], size: int) -> float | None:
    """Different n-grams over all n-grams of all samples, in (0, 1]; None where no sample is that long."""
    grams = [tuple(tokens[i : i + size]) for tokens in samples for i in range(len(tokens) - size + 1)]
    return len(set(grams)) / len(grams) if grams else None


def text_statistics(samples: Sequence[Sequence[int]]) -> dict[str, float | int | None]:
    """Entropy, distinct-n and the distribution of lengths of some samples.

    Args:
        samples: new tokens of each; at least one sample.

    Returns:
        entropy_nats (mean over samples), distinct_1 .. distinct_4, length_{min,median,mean,max}_tokens.
    """
    lengths = [len(tokens) for tokens in samples]
    return {
        "entropy_nats": mean(unigram_entropy(tokens) for tokens in samples),
        **{f"distinct_{n}": distinct_ngrams(samples, n) for n in range(1, MAX_NGRAM + 1)},
        "length_min_tokens": min(lengths),
        "length_median_tokens": float(median(lengths)),
        "length_mean_tokens": mean(lengths),
        "length_max_tokens": max(lengths),
    }
