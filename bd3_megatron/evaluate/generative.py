"""Generated text measured: perplexity under a scoring model against entropy, over decoding rules and temperatures.

Contract: all settings start from the same prompts and seed, and the samples of a setting do not depend on the others.
Refuses what the sampler refuses. Costs num_samples x num_tokens tokens of the sampler and of the scoring model a
setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bd3_megatron.errors import TokenizerError
from bd3_megatron.evaluate.mauve_score import mauve_score
from bd3_megatron.evaluate.scoring_model import ScoringModel
from bd3_megatron.evaluate.tables import Column
from bd3_megatron.evaluate.text_statistics import text_statistics
from bd3_megatron.sampling.generate import Sampler

GENERATION_COLUMNS = (
    Column("rule", "rule"),
    Column("temperature", "temperature", "g"),
    Column("perplexity", "scored ppl", ".2f"),
    Column("perplexity_stderr", "+-", ".2f"),
    Column("entropy_nats", "entropy", ".3f"),
    Column("forwards_per_token", "forwards/token", ".3f"),
    Column("distinct_2", "distinct-2", ".3f"),
    Column("length_median_tokens", "median length", ".0f"),
    Column("mauve", "MAUVE", ".3f"),
)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What every setting is asked for."""

    num_samples: int = 32
    num_tokens: int = 128
    seed: int = 0
    batch_size: int = 16
    prompts: Sequence[str] = ("",)
    """Texts to continue, in turn; an empty one starts from BOS."""
    references: Sequence[str] = ()
    """Human texts for MAUVE, whose package must be there; none: it is left out."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Decoding options that all settings share."""


def measure_samples(
    sampler: Sampler, scorer: ScoringModel | None, request: GenerationRequest, **options: Any
) -> dict[str, Any]:
    """One point: sample under some decoding options and measure.

    Args:
        sampler: with a tokenizer, where there is a scoring model.
        scorer: scores the texts; None leaves its columns out.
        request: see there.
        options: fields of DecodingOptions that make this setting.

    Returns:
        rule, temperature and the other options; perplexity, perplexity_stderr, corpus_perplexity;
        mauve, where there are references; forwards_per_token; everything of `text_statistics`; texts (a few, for reading).

    Raises:
        TokenizerError: a scoring model was given, but the folder has no tokenizer to make texts with.
        SamplingError: options or prompts that cannot be served.
        DataError: no text is long enough to score.
    """
    if scorer is not None and sampler.tokenizer is None:
        raise TokenizerError(
            "the model's folder has no tokenizer, so its samples are no text to score; copy its files there."
        )
    asked = {**request.options, **options}
    # In turn, so that every setting continues the same prompts with the same seed.
    prompts = [request.prompts[i % len(request.prompts)] for i in range(request.num_samples)]
    # texts of one length: entropy and perplexity of shorter ones are no less, but other numbers
    decoding = {"stop_at_eos": False, **asked}
    results = sampler.generate(
        prompts, num_tokens=request.num_tokens, seed=request.seed, batch_size=request.batch_size, **decoding
    )
    num_tokens = sum(len(result.tokens) for result in results)
    point: dict[str, Any] = {"rule": asked.get("rule", "first_hitting"), "temperature": asked.get("temperature", 1.0)}
    point |= asked
    texts = [result.text or "" for result in results]
    if scorer is not None:
        found = scorer.score_all(texts)
        # never one of them alone: perplexity falls when a text repeats itself, entropy rises when it is drawn at random
        point |= {
            "perplexity": found.perplexity,
            "perplexity_stderr": found.stderr,
            "corpus_perplexity": found.corpus_perplexity,
        }
        if request.references:
            point["mauve"] = mauve_score(scorer, request.references, texts)
    # forwards that served each sample: a batch's own count would depend on the batch size
    point["forwards_per_token"] = sum(result.num_forwards for result in results) / max(1, num_tokens)
    return point | text_statistics([result.tokens for result in results]) | {"texts": texts[:3]}


def frontier(
    sampler: Sampler, scorer: ScoringModel | None, request: GenerationRequest, settings: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """`measure` for every setting, in order."""
    return [measure_samples(sampler, scorer, request, **setting) for setting in settings]


def shared_options(top_p: float, steps: int | None) -> dict[str, Any]:
    """Decoding options that all settings share; None: the engine's own."""
    return {"top_p": top_p} | ({} if steps is None else {"steps": steps})


def grid_of(rules: Sequence[str], temperatures: Sequence[float]) -> list[dict[str, Any]]:
    """Every rule at every temperature."""
    return [{"rule": rule, "temperature": temperature} for rule in rules for temperature in temperatures]
