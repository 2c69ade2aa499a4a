"""The decoding engine: block after block, finished blocks cached, T forwards for T denoising steps.

Contract: a text does not depend on its batch; sequences of one batch may stand anywhere, finished ones leave. Refuses
given tokens that the block rule cannot honour and prompts longer than the trained length. Knows no tokenizers, files or
clocks. Source: BD3-LM (arXiv 2503.09573) algorithm 2; first-hitting as in `decoding_rules_bd3.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .block_state_bd3 import BlockState
from .cache_bd3 import KeyValueCache
from .decoding_options_bd3 import DecodingOptions
from .decoding_rules_bd3 import BlockRule
from .draws_bd3 import SampleDraws, block_draws, candidate_draws
from .forward_bd3 import EagerForward, Forward
from .plain_bd3 import LayerStack, ModelShape, predicts_next
from .window_bd3 import WINDOWS, Layout, SequenceState, Window

# Clean rows of one forward: bounds the memory of a long prompt's attention.
MAX_COMMIT_ROWS = 2048

# (index of the request, its new tokens so far, tokens among them that are new since the last call) -> how many new
# tokens to keep and why, or None to go on.
StopCheck = Callable[[int, Sequence[int], int], "tuple[int, str] | None"]
# (index of the request, position of the block, its ids with mask ids where undecided)
Observer = Callable[[int, int, list[int]], None]


@dataclass(frozen=True)
class Request:
    """One text to complete.

    Args:
        ids: given tokens, at least one. Mask ids may stand in the last block they reach: positions to fill.
        num_tokens: tokens wanted after them, >= 0.
        key: the sample's key (see draws_bd3).
    """

    ids: tuple[int, ...]
    num_tokens: int
    key: int


@dataclass(frozen=True)
class BlockEvent:
    """A block of one text is decided."""

    request: int
    """index of the request"""
    tokens: list[int]
    """new tokens of this block that belong to the text, in order (filled positions excluded)"""
    ids: list[int] | None
    """the whole text, given tokens included, when it is finished; else None"""
    stop_reason: str | None
    """"length", "eos" or what the caller's check said, when it is finished"""
    num_forwards: int
    """forwards this text has taken part in"""


@dataclass
class ForwardCounts:
    """What a run has cost."""

    denoising: int = 0
    """forwards that looked at a block (each serves the whole batch)"""
    commit_only: int = 0
    """forwards for the clean rows of prompts too long for one"""
    cache_bytes: int = 0
    """memory of the largest cache"""


@dataclass
class Row:
    """One sequence of the batch."""

    request: int
    state: SequenceState
    draws: SampleDraws
    num_given: int
    num_total: int
    num_forwards: int = 0
    stop_reason: str | None = None
    tokens: list[int] = field(default_factory=list)


def check_request(request: Request, shape: ModelShape, mask_id: int | None) -> None:
    """Refuse what the block rule cannot honour.

    Raises:
        ValueError: no given token, one outside the table, more than the trained length, nothing to do, or a mask id
            before the last block of the given tokens.
    """
    ids = request.ids
    if not ids:
        raise ValueError("the prompt is empty; give at least one token (a BOS token where the model has one).")
    if min(ids) < 0 or max(ids) >= shape.vocab_size:
        raise ValueError(
            f"token ids {min(ids)} to {max(ids)} are outside the vocabulary; use 0 to {shape.vocab_size - 1}."
        )
    if len(ids) > shape.max_position_embeddings:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and the window {shape.max_position_embeddings}; "
            f"give its last {shape.max_position_embeddings} tokens or fewer."
        )
    if request.num_tokens < 0 or (request.num_tokens == 0 and mask_id not in ids):
        raise ValueError(f"num_tokens={request.num_tokens} is out of range; use 1 or more.")
    if mask_id not in ids:
        return
    first = ids.index(mask_id)
    block = first // shape.block_size
    after = [i for i, token in enumerate(ids) if token != mask_id and i // shape.block_size > block]
    if predicts_next(shape.objective) or after:
        later = after[0] if after else first
        raise ValueError(
            f"position {first} is masked, and the text given at position {later} lies where its block (positions "
            f"{block * shape.block_size} to {(block + 1) * shape.block_size - 1}) cannot see it; mask positions only in "
            "the last block of the given text, or cut the text after that block."
        )


class Decoder:
    """Runs requests through a model. One decoder may run many batches, one at a time.

    Args:
        stack: layers of the plain model, in eval mode, on their device.
        lm_head: output table.
        options: checked options.
        mask_id: the mask token; None for autoregressive models.
        eos_ids: tokens that end a text with options.stop_at_eos.
        stop_check: asked after every block of every text.
        observer: shown every block after every forward (this waits for the device).
        forward: how forwards run; None = eagerly.
        device: where forwards run; None = where the token table lies (which is nowhere when weights are offloaded).
    """

    counts: ForwardCounts

    def __init__(
        self,
        stack: LayerStack,
        lm_head: nn.Module,
        options: DecodingOptions,
        *,
        mask_id: int | None,
        eos_ids: Collection[int] = (),
        stop_check: StopCheck | None = None,
        observer: Observer | None = None,
        forward: Forward | None = None,
        device: torch.device | None = None,
    ) -> None:
        shape = stack.shape
        self._is_ar = predicts_next(shape.objective)
        if mask_id is None and not self._is_ar:
            raise ValueError("the model has no mask token id; write mask_token_id into its config.json.")
        if options.stop_at_eos and not eos_ids:
            raise ValueError("stop_at_eos was asked for, but the model has no EOS token; leave it out.")
        self._stack, self._options, self._shape = stack, options, shape
        self._forward = EagerForward(stack, lm_head) if forward is None else forward
        self._mask_id, self._eos_ids = mask_id, frozenset(eos_ids)
        self._stop_check, self._observer = stop_check, observer
        self._device = stack.embed_tokens.weight.device if device is None else device
        self._block_size = 1 if self._is_ar else shape.block_size
        self._rule = options.new_rule(self._block_size)
        self._filters = options.new_filters(mask_id)
        self.counts = ForwardCounts()

    def run(self, requests: Sequence[Request]) -> Iterator[BlockEvent]:
        """Decode one batch; yields every text's blocks as they are decided.

        Args:
            requests: the batch, 1 or more.

        Raises:
            ValueError: see `check_request`.
        """
        for request in requests:
            check_request(request, self._shape, self._mask_id)
        window = self._window(max(len(request.ids) + request.num_tokens for request in requests))
        rows = [self._new_row(index, request) for index, request in enumerate(requests)]
        cache = KeyValueCache(self._stack, batch_size=len(rows), capacity=window.capacity, device=self._device)
        self.counts.cache_bytes = max(self.counts.cache_bytes, cache.num_bytes)
        while rows:
            self._fill_block(rows, cache, window)
            yield from [self._close_block(row) for row in rows]
            remaining = [b for b, row in enumerate(rows) if row.stop_reason is None]
            # finished texts leave the batch, so that the others do not pay for them
            if remaining and len(remaining) < len(rows):
                cache.keep_sequences(torch.tensor(remaining, device=self._device))
            rows = [rows[b] for b in remaining]

    def _window(self, longest: int) -> Window:
        size = self._block_size
        length = self._shape.max_position_embeddings
        return WINDOWS[self._options.window](
            length=length,
            block_size=size,
            block_rows=0 if self._is_ar else size,
            capacity=min(length, -(-longest // size) * size),
            span_multiple=self._forward.span_multiple,
        )

    def _new_row(self, index: int, request: Request) -> Row:
        ids = list(request.ids)
        # the grid is absolute: a prompt's tail and the first new tokens share a block
        known = ids.index(self._mask_id) if self._mask_id in ids else len(ids)
        return Row(
            request=index,
            state=SequenceState(ids, known // self._block_size * self._block_size),
            draws=SampleDraws(request.key, self._block_size, len(ids) + request.num_tokens),
            num_given=len(ids),
            num_total=len(ids) + request.num_tokens,
        )

    @torch.inference_mode()
    def _fill_block(self, rows: list[Row], cache: KeyValueCache, window: Window) -> None:
        """Decide the current block of every sequence; afterwards `state.ids` holds it."""
        states = [row.state for row in rows]
        # The block's first forward carries the clean rows of the block before (or of the whole prompt) together with its
        # own rows: the training mask restricted to the rows that matter, so no forward is spent on committing alone.
        layout = self._commit(states, cache, window)
        block = BlockState.new(states, self._block_size, self._mask_id, self._device)
        if self._options.repetition_penalty != 1:
            block.track_seen(states, self._shape.vocab_size, window.length, self._mask_id)
        starts = [state.block_start for state in states]
        uniform_2BS = block_draws(self._options.seed, [row.draws for row in rows], starts, self._block_size)
        rule = self._rule.begin(block.is_masked_BS, uniform_2BS[0])
        forward = 0
        while forward != rule.num_forwards:
            wanted = rule.wanted(forward)
            logits_BRV = self._logits(cache, block, layout, wanted.rows_BR, is_first=forward == 0)
            self._decide(rows, block, rule, forward, logits_BRV, uniform_2BS[1])
            forward += 1
            # rules that choose their own number of forwards are the only ones that wait for the device here
            if rule.num_forwards is None and not block.refresh_active():
                break
        # one host read for a whole block of B sequences
        for state, ids in zip(states, block.ids_BS.tolist(), strict=True):
            state.ids[state.block_start :] = ids

    def _commit(self, states: list[SequenceState], cache: KeyValueCache, window: Window) -> Layout:
        """Enter the blocks; returns the layout of their first forward, which carries the clean rows still due."""
        for state in states:
            window.enter_block(state)
        while True:
            stop_B = [window.commit_stop(state, MAX_COMMIT_ROWS) for state in states]
            is_rest = all(stop == state.block_start for stop, state in zip(stop_B, states, strict=True))
            layout = window.layout(states, stop_B, self._device, with_block=is_rest and not self._is_ar)
            for state, stop in zip(states, stop_B, strict=True):
                state.committed = stop
            if is_rest:
                return layout
            keep_B1 = torch.zeros(len(states), 1, dtype=torch.int64, device=self._device)
            self._forward(cache, layout.clean_ids_BC, layout.plan, keep_B1)
            self.counts.commit_only += 1

    def _logits(
        self, cache: KeyValueCache, block: BlockState, layout: Layout, rows_BR: Tensor, *, is_first: bool
    ) -> Tensor:
        """One forward: raw logits [B, R, V] of some positions of the blocks."""
        self.counts.denoising += 1
        plan, ids_BR, keep_BR = layout.plan, layout.clean_ids_BC, rows_BR
        if self._is_ar:
            # The newest known token's row predicts the position being decided.
            keep_BR = torch.tensor(layout.num_clean_B)[:, None] - 1
        elif is_first:
            keep_BR = rows_BR + layout.clean_ids_BC.shape[1]
            ids_BR = torch.cat([layout.clean_ids_BC, block.ids_BS], dim=1)
        elif layout.block_plan is not None:
            plan, ids_BR = layout.block_plan, block.ids_BS
        return self._forward(cache, ids_BR, plan, keep_BR.to(self._device))

    def _decide(
        self,
        rows: list[Row],
        block: BlockState,
        rule: BlockRule,
        forward: int,
        logits_BRV: Tensor,
        uniform_BS: Tensor,
    ) -> None:
        """Turn logits into decided positions, and count the forward for the sequences it served."""
        wanted = rule.wanted(forward)
        active_B = block.active_B if wanted.is_active_B is None else wanted.is_active_B.tolist()
        for row, is_active in zip(rows, active_B, strict=True):
            row.num_forwards += is_active
        rows_BR = wanted.rows_BR.to(self._device)
        with_scores = wanted.decides_BR is None
        uniform_BR = None
        if self._options.temperature > 0:
            if with_scores:
                # a scored rule looks at every candidate at every forward, so each look has draws of its own
                key_B = torch.tensor([row.draws.key for row in rows])
                seed = self._options.seed
                uniform_BS = candidate_draws(seed, key_B, block.start_B, self._block_size, forward)
            uniform_BR = uniform_BS.gather(1, wanted.rows_BR).to(self._device)
        choice = self._filters.choose(logits_BRV, uniform_BR, block.seen_BV, with_scores=with_scores)
        if wanted.decides_BR is not None:
            decides_BR = wanted.decides_BR.to(self._device)
        else:
            decides_BR = rule.reveal(forward, choice, block.is_undecided_BT.gather(1, rows_BR))
        block.write(rows_BR, decides_BR, choice.token_BR)
        if self._observer is not None:
            for row, ids in zip(rows, block.ids_BS.tolist(), strict=True):
                self._observer(row.request, row.state.block_start, ids)

    def _close_block(self, row: Row) -> BlockEvent:
        """Take a full block into the text, see whether the text ends, and move on."""
        state = row.state
        known = min(state.block_start + self._block_size, row.num_total)
        before = len(row.tokens)
        row.tokens += state.ids[max(state.block_start, row.num_given) : known]
        state.block_start += self._block_size
        # whatever stops a text first wins: EOS, the caller's check, then the length
        keep, row.stop_reason = self._stop(row, before)
        if keep is not None:
            del row.tokens[keep:]
        elif known == row.num_total:
            row.stop_reason = "length"
        return BlockEvent(
            request=row.request,
            tokens=row.tokens[before:],
            ids=state.ids[: row.num_given] + row.tokens if row.stop_reason else None,
            stop_reason=row.stop_reason,
            num_forwards=row.num_forwards,
        )

    def _stop(self, row: Row, before: int) -> tuple[int | None, str | None]:
        """(tokens to keep, reason) when the text ends early, else (None, None)."""
        ends: list[tuple[int, str]] = []
        fresh = row.tokens[before:]
        first_end = next((i for i, token in enumerate(fresh) if token in self._eos_ids), None)
        if self._options.stop_at_eos and first_end is not None:
            ends.append((before + first_end + 1, "eos"))
        found = self._stop_check(row.request, row.tokens, len(fresh)) if self._stop_check is not None else None
        if found is not None:
            ends.append(found)
        return min(ends) if ends else (None, None)
