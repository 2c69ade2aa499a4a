"""MAUVE: how close the distribution of generated texts is to that of human ones, where the package mauve-text is installed.

Contract: texts are embedded by the scoring model, never by a model from the hub. The number compares settings of one run:
it depends on the embedding model and on how many texts there are. Whether the package is there is the caller's question.
Source: Pillutla et al. 2021 (arXiv 2102.01454); features as there, the last hidden state of a text's last token.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec

from bd3_megatron.errors import DataError
from bd3_megatron.evaluate.scoring_model import ScoringModel

MIN_TEXTS = 2
"""Fewer have no distribution."""


def mauve_is_there() -> bool:
    """Whether the package is installed."""
    return find_spec("mauve") is not None


def mauve_score(scorer: ScoringModel, references: Sequence[str], texts: Sequence[str]) -> float:
    """MAUVE of texts against references, in (0, 1]; needs the package.

    Args:
        scorer: embeds both.
        references: human texts.
        texts: generated ones.

    Raises:
        DataError: fewer than two texts on a side that have a token.
    """
    features = [scorer.features(side) for side in (references, texts)]
    if min(map(len, features)) < MIN_TEXTS:
        raise DataError(
            f"MAUVE compares {len(features[0])} references with {len(features[1])} texts; give {MIN_TEXTS} or more of each "
            "that are not empty."
        )
    # a package that only some have: imported by name, and only here
    package = importlib.import_module("mauve")
    found = package.compute_mauve(p_features=features[0], q_features=features[1], verbose=False)
    return float(found.mauve)
