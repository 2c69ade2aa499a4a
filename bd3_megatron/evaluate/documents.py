"""Likelihood of texts of any length: the chain rule over blocks, each scored from the clean text before it.

Contract: up to the trained length L the result is that of one pass over the pair; beyond it every block sees the newest
L - S tokens, encoded anew. Given tokens are seen and not scored. Blocks with few scored tokens have no noise; that of the
others is drawn by `noise_plan.py`. Refuses texts without a token to score.
Costs one pass over the clean text and S rows for every different mask pattern of a scored block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import DataError
from bd3_megatron.evaluate.noise_plan import NoisePlan, pattern_weights
from bd3_megatron.evaluate.perplexity import ScoreSettings
from bd3_megatron.evaluate.plain_forward import blocks_hidden, clean_keys, next_token_hidden, token_scores
from bd3_megatron.hf.plain_bd3 import PlainBD3

MAX_NOISY_ROWS = 1024
"""Noisy rows of one sequence in one forward: more mask patterns are scored in turns."""
TEXTS_AT_ONCE = 256
"""Texts whose noise is in memory together."""


@dataclass(frozen=True)
class ScoredText:
    """Tokens of which the first are given and the others are scored."""

    ids: Sequence[int]
    given: int = 0
    """First tokens that are seen and not scored."""
    num_fill: int = 0
    """Last tokens that are scored and no tokens of the text: end tokens up to the end of a block."""
    noise_number: int = 0
    """What the noise is drawn from, in place of a sequence number; texts of one number share their noise."""


@dataclass(frozen=True)
class ChainScore:
    """What a model says of one text."""

    sum_D: Tensor
    """float64: weighted negative log-likelihood of the scored tokens under each draw, nats; one number without noise."""
    num_tokens: int
    """Scored tokens of the text."""
    is_greedy: bool
    """Each scored token is the likeliest, given those before it and nothing behind it."""

    @property
    def nll_nats(self) -> float:
        """Negative log-likelihood: the mean over draws."""
        return float(self.sum_D.mean())

    @property
    def is_exact(self) -> bool:
        """Every mask pattern was scored, so another seed gives the same number."""
        return len(self.sum_D) == 1


@torch.inference_mode()
def score_texts(
    model: PlainBD3,
    settings: ScoreSettings,
    texts: Sequence[ScoredText],
    *,
    mask_id: int | None,
    num_enumerated: int = 1,
    batch_size: int = 8,
) -> list[ChainScore]:
    """The scores of texts, in their order.

    Args:
        model: plain, in eval mode.
        settings: draws, seed, smallest noise level; whether the first token is given; `exact` enumerates every block.
        texts: of any length; an autoregressive model is always given the first token.
        mask_id: the model's mask token; None only for autoregressive models.
        num_enumerated: of blocks with at most so many scored tokens every mask pattern is scored, 2^n - 1 for n tokens.
        batch_size: sequences of one forward; the result does not depend on it.

    Raises:
        DataError: a text without a token to score.
        RangeError: a block too large to enumerate, draws out of range, or no mask token.
    """
    shape = model.model.shape
    plan = settings.plan(objective=shape.objective, block_size=shape.block_size, mask_id=mask_id)
    is_next_token = not objective_named(shape.objective).has_noise
    least = int(is_next_token or settings.convention.first_token_given)
    asked = [replace(text, given=max(text.given, least)) for text in texts]
    for number, text in enumerate(asked):
        if len(text.ids) <= text.given:
            raise DataError(
                f"text {number} has {len(text.ids)} tokens, of which {text.given} are given; "
                f"give one with {text.given + 1} or more."
            )
    patterns = _Patterns(plan, settings.convention.min_t, shape.block_size if plan.is_exact else num_enumerated)
    # neighbours in length run together, so that little of a batch is filling
    order = sorted(range(len(asked)), key=lambda number: len(asked[number].ids))
    scores: dict[int, ChainScore] = {}
    for low in range(0, len(order), TEXTS_AT_ONCE):
        numbers = order[low : low + TEXTS_AT_ONCE]
        some = [asked[number] for number in numbers]
        if is_next_token or mask_id is None:
            found = _next_token_scores(model, some, batch_size)
        else:
            found = _block_scores(model, patterns, some, mask_id, batch_size)
        scores |= dict(zip(numbers, found, strict=True))
    return [scores[number] for number in range(len(asked))]


@dataclass(frozen=True)
class _Patterns:
    """Which mask patterns of a block are scored."""

    plan: NoisePlan
    min_t: float
    num_enumerated: int
    """Blocks with at most so many scored tokens have no noise."""

    def enumerated(self, is_free_S: Tensor) -> tuple[Tensor, Tensor]:
        """(every non-empty pattern of the scored tokens, bool [2^n - 1, S]; the weight of its masked tokens [2^n - 1])."""
        free = is_free_S.nonzero()[:, 0]
        bits_DF = (torch.arange(1, 2 ** len(free))[:, None] >> torch.arange(len(free))) & 1 == 1
        pattern_DS = torch.zeros(len(bits_DF), len(is_free_S), dtype=torch.bool)
        pattern_DS[:, free] = bits_DF
        # Tokens without loss are seen or masked whatever is drawn, so the law of the others is that of a block of their
        # number.
        weights = torch.tensor(pattern_weights(len(free), self.min_t), dtype=torch.float64)
        return pattern_DS, weights[bits_DF.sum(dim=1) - 1]


@dataclass(frozen=True)
class _Block:
    """One scored block: its different noisy forms, and how draws and places refer to them."""

    text: int
    window_start: int
    """Position of the text at which the model's view begins."""
    past: Sequence[int]
    """Clean tokens of that view before the block."""
    clean_S: Tensor
    noisy_US: Tensor
    """int64: the different noisy forms."""
    is_masked_US: Tensor
    form_D: Tensor
    """int64: the form of each draw, or of each pattern."""
    weight_DS: Tensor
    is_enumerated: bool
    form_T: Tensor
    """int64: of each scored token of the text, the form in which it and everything behind it is masked."""
    place_T: Tensor
    """int64: where these tokens stand in the block."""

    def sum_D(self, nll_US: Tensor) -> Tensor:
        """Weighted negative log-likelihood under each draw, or [1] without noise, in nats."""
        sum_D = (nll_US[self.form_D] * self.weight_DS).sum(dim=1)
        return sum_D.sum(dim=0, keepdim=True) if self.is_enumerated else sum_D

    def is_greedy(self, is_best_US: Tensor) -> bool:
        """Each of its tokens is the likeliest, given those before it."""
        return bool(is_best_US[self.form_T, self.place_T].all())


def _block_scores(
    model: PlainBD3, patterns: _Patterns, texts: Sequence[ScoredText], mask_id: int, batch_size: int
) -> list[ChainScore]:
    """Scores under block diffusion."""
    blocks = [
        block for number, text in enumerate(texts) for block in _blocks_of(model, patterns, text, number, mask_id)
    ]
    # blocks whose view begins at the same token look back on one sequence of clean keys
    views = [list(group) for _, group in groupby(blocks, key=lambda block: (block.text, block.window_start))]
    views.sort(key=lambda view: len(view[-1].past))
    sums, is_greedy = [torch.zeros(1, dtype=torch.float64)] * len(texts), [True] * len(texts)
    for low in range(0, len(views), batch_size):
        for block, nll_US, is_best_US in _forms_of(model, views[low : low + batch_size], mask_id):
            sums[block.text] = sums[block.text] + block.sum_D(nll_US)
            is_greedy[block.text] &= block.is_greedy(is_best_US)
    num_tokens = [len(text.ids) - text.given - text.num_fill for text in texts]
    return [ChainScore(*one) for one in zip(sums, num_tokens, is_greedy, strict=True)]


def _blocks_of(model: PlainBD3, patterns: _Patterns, text: ScoredText, number: int, mask_id: int) -> Iterator[_Block]:
    """The blocks of a text that hold a token to score."""
    shape = model.model.shape
    size, length, end = shape.block_size, shape.max_position_embeddings, len(text.ids)
    place_S, noisy = torch.arange(size), None
    for start in range(text.given // size * size, end, size):
        is_unwritten_S, is_free_S = start + place_S >= end, (start + place_S >= text.given) & (start + place_S < end)
        written = torch.tensor(list(text.ids[start : start + size]))
        clean_S = torch.cat([written, written.new_zeros(size - len(written))])
        known_S = clean_S.masked_fill(is_unwritten_S, mask_id)
        is_enumerated = int(is_free_S.sum()) <= patterns.num_enumerated
        if is_enumerated:
            pattern_DS, weight_D = patterns.enumerated(is_free_S)
            noisy_DS, weight_DS = known_S.masked_fill(pattern_DS, mask_id), weight_D[:, None] * pattern_DS
        else:
            noisy = _noisy_text(patterns.plan, text, (size, length), mask_id) if noisy is None else noisy
            noisy_DS, weight_DS = (t[:, start : start + size] for t in (noisy.noisy_BL, noisy.weight_BL))
        # left to right: from each place on masked; where the patterns hold such a form, it costs nothing
        left_to_right_SS = known_S.masked_fill((place_S >= place_S[:, None]) & is_free_S, mask_id)
        noisy_US, form = torch.cat([noisy_DS, left_to_right_SS]).unique(dim=0, return_inverse=True)
        is_text_S = is_free_S & (start + place_S < end - text.num_fill)
        # beyond L the view ends with this block, as in the sampler's recomputed window
        window_start = max(0, start + size - length)
        yield _Block(
            text=number,
            window_start=window_start,
            past=text.ids[window_start:start],
            clean_S=clean_S,
            noisy_US=noisy_US,
            is_masked_US=(noisy_US == mask_id) & is_free_S,
            form_D=form[: len(noisy_DS)],
            weight_DS=weight_DS.double(),
            is_enumerated=is_enumerated,
            form_T=form[len(noisy_DS) :][is_text_S],
            place_T=place_S[is_text_S],
        )


def _noisy_text(plan: NoisePlan, text: ScoredText, sizes: tuple[int, int], mask_id: int) -> NoisyBatch:
    """All draws of a text, filled up with positions that are always masked and never counted: [D, max(L, n)]."""
    block_size, length = sizes
    # noise is stratified over a row, so a text shorter than L takes that of its row of L tokens
    size = max(length, -(-len(text.ids) // block_size) * block_size)
    position_L = torch.arange(size)
    is_text_L = position_L < len(text.ids)
    tokens_L = torch.zeros(size, dtype=torch.int64)
    tokens_L[is_text_L] = torch.tensor(list(text.ids), dtype=torch.int64)
    clean = CleanBatch(
        tokens_BL=tokens_L.expand(plan.draws, -1),
        index_B=torch.full((plan.draws,), text.noise_number),
        is_padding_BL=((position_L < text.given) | ~is_text_L).expand(plan.draws, -1),
    )
    noisy = plan.noisy(clean, torch.arange(plan.draws))
    assert noisy is not None  # only the autoregressive plan has none
    # What carries no loss is noised as padding is; here the given part is seen, and the tail of a last, incomplete block
    # stays masked, as text that is not written yet.
    seen_BL = torch.where(position_L < text.given, clean.tokens_BL, noisy.noisy_BL)
    return replace(noisy, noisy_BL=seen_BL.masked_fill(~is_text_L, mask_id))


def _forms_of(
    model: PlainBD3, views: Sequence[Sequence[_Block]], mask_id: int
) -> Iterator[tuple[_Block, Tensor, Tensor]]:
    """(block, NLL of each masked token of each form [U, S], whether it is the likeliest [U, S]) of all blocks."""
    device, size = model.lm_head.weight.device, model.model.shape.block_size
    # the last block of a view sees all that its others see; behind a shorter past stand tokens that nobody sees
    past_BC = pad_sequence([torch.tensor(list(view[-1].past), dtype=torch.int64) for view in views], batch_first=True)
    # few lengths, since a GPU's backends are compared anew for each: an eighth of L apart
    step = 1 if device.type == "cpu" else max(size, model.model.shape.max_position_embeddings // 8 // size * size)
    past = clean_keys(model, pad(past_BC, (0, -past_BC.shape[1] % step)).to(device))

    def stacked(of: Callable[[_Block], Tensor]) -> Tensor:
        return pad_sequence([torch.cat([of(block) for block in view]) for view in views], batch_first=True).to(device)

    noisy_BGS = stacked(lambda block: block.noisy_US)
    is_masked_BGS = stacked(lambda block: block.is_masked_US)
    clean_BGS = stacked(lambda block: block.clean_S.expand(block.noisy_US.shape))
    start_BG = stacked(lambda block: torch.full((len(block.noisy_US),), len(block.past)))
    nll_BGS = torch.zeros(noisy_BGS.shape, dtype=torch.float64, device=device)
    is_best_BGS = torch.zeros_like(is_masked_BGS)
    for forms in torch.arange(noisy_BGS.shape[1], device=device).split(max(1, MAX_NOISY_ROWS // size)):
        hidden_BGSD = blocks_hidden(model, past, noisy_BGS[:, forms], start_BG[:, forms])
        masked_BGS = is_masked_BGS[:, forms]
        scores = token_scores(model, hidden_BGSD[masked_BGS], clean_BGS[:, forms][masked_BGS], mask_id=mask_id)
        for table_BGS, score_R in zip((nll_BGS, is_best_BGS), scores, strict=True):
            table_BGS[:, forms] = table_BGS[:, forms].masked_scatter(masked_BGS, score_R.to(table_BGS.dtype))
    for view, nll_GS, is_best_GS in zip(views, nll_BGS.cpu(), is_best_BGS.cpu(), strict=True):
        counts = [len(block.noisy_US) for block in view]
        padding = [len(nll_GS) - sum(counts)]
        parts = (table.split(counts + padding)[: len(counts)] for table in (nll_GS, is_best_GS))
        yield from zip(view, *parts, strict=True)


@dataclass(frozen=True)
class _Reach:
    """Tokens [first, stop) of a text, scored in the view that begins at `window_start`."""

    text: int
    window_start: int
    first: int
    stop: int


def _next_token_scores(model: PlainBD3, texts: Sequence[ScoredText], batch_size: int) -> list[ChainScore]:
    """Scores of an autoregressive model: each token given those before it in its view."""
    device, length = model.lm_head.weight.device, model.model.shape.max_position_embeddings
    reaches = [reach for number, text in enumerate(texts) for reach in _reaches_of(text, number, length)]
    reaches.sort(key=lambda reach: reach.stop - reach.window_start)
    sums, is_greedy = [torch.zeros(1, dtype=torch.float64) for _ in texts], [True] * len(texts)
    for low in range(0, len(reaches), batch_size):
        some = reaches[low : low + batch_size]
        # causal: what fills the end of a shorter view is seen by nobody before it
        ids = [torch.tensor(list(texts[r.text].ids[r.window_start : r.stop]), dtype=torch.int64) for r in some]
        hidden_BLD = next_token_hidden(model, pad_sequence(ids, batch_first=True).to(device))
        for reach, hidden_LD in zip(some, hidden_BLD, strict=True):
            rows = slice(reach.first - 1 - reach.window_start, reach.stop - 1 - reach.window_start)
            target_R = torch.tensor(list(texts[reach.text].ids[reach.first : reach.stop]), device=device)
            nll_R, is_best_R = token_scores(model, hidden_LD[rows], target_R, mask_id=None)
            sums[reach.text] += nll_R.double().sum().cpu()
            is_greedy[reach.text] &= bool(is_best_R.all())
    num_tokens = [len(text.ids) - max(text.given, 1) - text.num_fill for text in texts]
    return [ChainScore(*one) for one in zip(sums, num_tokens, is_greedy, strict=True)]


def _reaches_of(text: ScoredText, number: int, length: int) -> Iterator[_Reach]:
    """The views of a text: of L tokens, moved by half of it, so every token beyond the first sees at least L / 2."""
    first, window_start = max(text.given, 1), 0
    while first < len(text.ids):
        stop = min(window_start + length, len(text.ids))
        if stop > first:
            yield _Reach(number, window_start, first, stop)
            first = stop
        window_start += max(1, length // 2)
