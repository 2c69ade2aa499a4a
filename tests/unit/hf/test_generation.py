"""The engine's laws: its logits are the training mask's, its cost is T forwards a block, its texts know no batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bd3_megatron.convert.official import fold
from bd3_megatron.hf.cache_bd3 import KeyValueCache, RowPlan
from bd3_megatron.hf.decoding_options_bd3 import RULES
from bd3_megatron.hf.forward_bd3 import EagerForward, ReplayedForward
from bd3_megatron.hf.plain_bd3 import PlainBD3, plain_model, run_layers
from bd3_megatron.hf.window_bd3 import RecomputedWindow, SequenceState
from tests.tolerances import CACHED_FP32, CACHED_FP64, GOLDEN_FP64
from tests.unit.hf.models import MASK, decode, tiny_config, tiny_model, tokens

TOLERANCE = {torch.float64: CACHED_FP64, torch.float32: CACHED_FP32}


class WatchedForward(EagerForward):
    """The real forward, whose logits are kept."""

    def __init__(self, model: PlainBD3) -> None:
        super().__init__(model.model, model.lm_head)
        self.seen: list[Tensor] = []

    def __call__(self, cache: KeyValueCache, ids_BR: Tensor, plan: RowPlan, keep_BQ: Tensor) -> Tensor:
        self.seen.append(super().__call__(cache, ids_BR, plan, keep_BQ).clone())
        return self.seen[-1]


class States:
    """What the observer saw: (request, block, ids) after each forward."""

    def __init__(self) -> None:
        self.forwards: list[dict[int, tuple[int, list[int]]]] = []
        self._open: dict[int, tuple[int, list[int]]] = {}

    def __call__(self, request: int, start: int, ids: list[int]) -> None:
        if request in self._open:
            self.close()
        self._open[request] = (start, ids)

    def close(self) -> None:
        """End of a forward."""
        self.forwards.append(self._open)
        self._open = {}


def training_logits(model: PlainBD3, text: Sequence[int], start: int, block: Sequence[int]) -> Tensor:
    """Logits [S, V] of a block state behind its clean past, by the training-mask forward over the window."""
    shape = model.model.shape
    size, length = shape.block_size, shape.max_position_embeddings
    first = max(0, start + size - length)
    clean = torch.zeros(1, length, dtype=torch.int64)
    past = list(text[first:start])
    clean[0, : len(past)] = torch.tensor(past, dtype=torch.int64)
    noisy = torch.full((1, length), MASK)
    noisy[0, len(past) : len(past) + size] = torch.tensor(block)
    return model(noisy, clean)[0, len(past) : len(past) + size]


@torch.no_grad()
def check_every_forward(model: PlainBD3, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
    """Decode by first-hitting, and hold the logits of every decided position against the training mask."""
    size = model.model.shape.block_size
    watched, states = WatchedForward(model), States()
    texts, _, decoder = decode(
        model, prompts, num_tokens, decoder_options={"observer": states, "forward": watched}, seed=5
    )
    states.close()
    assert decoder.counts.commit_only == 0
    before: dict[tuple[int, int], list[int]] = {}
    checked = 0
    for logits, after in zip(watched.seen, states.forwards, strict=True):
        for row, (request, (start, ids)) in enumerate(after.items()):
            known = list(prompts[request][start : start + size])
            old = before.get((request, start), known + [MASK] * (size - len(known)))
            decided = [i for i in range(size) if old[i] != ids[i]]
            before[request, start] = ids
            assert len(decided) <= 1
            if decided:
                expected = training_logits(model, texts[request], start, old)[decided[0]]
                torch.testing.assert_close(logits[row, 0], expected, rtol=0, atol=TOLERANCE[logits.dtype])
                checked += 1
    assert checked >= num_tokens * len(prompts)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [1, 4, 8, 16, 32])
def test_every_logit_is_the_training_masks(block_size: int, dtype: torch.dtype) -> None:
    model = tiny_model(block_size, dtype=dtype)
    residues = range(1, min(block_size, 8) + 1)
    prompts = [tokens(residue + 3, seed=residue).tolist() for residue in residues]
    check_every_forward(model, prompts[:1], 9)
    check_every_forward(model, (prompts * 5)[:5], 9)
    check_every_forward(model, [tokens(31).tolist(), tokens(9).tolist()], 1)


def test_every_residue_of_a_prompt_is_served_exactly() -> None:
    check_every_forward(tiny_model(8, style="paper"), [tokens(n, seed=n).tolist() for n in range(1, 17)], 4)


def test_beyond_the_trained_length_the_window_is_recomputed() -> None:
    check_every_forward(tiny_model(4), [tokens(n).tolist() for n in (5, 30, 32)], 40)


@pytest.mark.parametrize("block_size", [4, 16])
def test_golden_block_by_block_logits(block_size: int, root: object) -> None:
    folder = f"{root}/tests/golden"
    golden = load_file(f"{folder}/bd3lm_tiny_bs{block_size}.safetensors")
    state = {name: tensor.double() for name, tensor in load_file(f"{folder}/tiny_state.safetensors").items()}
    config = tiny_config(
        block_size, style="paper", vocab_size=50, hidden_size=64, num_hidden_layers=3, mask_token_id=49
    )
    model = plain_model(config, fold(state))
    window = RecomputedWindow(32, block_size, block_size, 32)
    cache = KeyValueCache(model.model, batch_size=4, capacity=32)
    forward = EagerForward(model.model, model.lm_head)
    states = [SequenceState(row, 0) for row in golden["x0"].tolist()]
    logits = []
    for start in range(0, 32, block_size):
        for state in states:
            state.block_start = start
        layout = window.layout(states, [start] * 4, torch.device("cpu"), with_block=True)
        ids = torch.cat([layout.clean_ids_BC, golden["xt"][:, start : start + block_size]], dim=1)
        width = layout.clean_ids_BC.shape[1]
        keep = (width + torch.arange(block_size)).expand(4, -1)
        logits.append(forward(cache, ids, layout.plan, keep))
        for state in states:
            state.committed = start
    for name in ("semiar_cached_logits_f64", "semiar_uncached_logits_f64"):
        torch.testing.assert_close(torch.cat(logits, dim=1), golden[name], rtol=0, atol=GOLDEN_FP64)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_block_costs_as_many_forwards_as_denoising_steps(block_size: int) -> None:
    _, forwards, decoder = decode(tiny_model(block_size), [tokens(block_size).tolist()], 4 * block_size)
    assert (decoder.counts.denoising, decoder.counts.commit_only) == (4 * block_size, 0)
    assert forwards == [4 * block_size]
    _, _, decoder = decode(tiny_model(16), [tokens(16).tolist()], 48, rule="top_k_static", steps=4)
    assert decoder.counts.denoising == 3 * 4


@pytest.mark.parametrize("window", ["recomputed", "evicted"])
@pytest.mark.parametrize("rule", RULES)
def test_a_text_does_not_know_its_batch(rule: str, window: str) -> None:
    prompts = [tokens(n, seed=n).tolist() for n in (1, 3, 8, 21, 31)]
    options = {"rule": rule, "window": window, "steps": 3, "threshold": 0.3, "entropy_bound": 1.0, "seed": 11}
    options |= {"top_p": 0.9, "repetition_penalty": 1.3, "min_p": 0.01, "top_k": 15}
    together = decode(tiny_model(4), prompts, 15, **options)
    alone = decode(tiny_model(4), prompts[::-1], 15, batch_size=1, **options)
    assert together[:2] == (alone[0][::-1], alone[1][::-1])
    assert all(len(text) == len(prompt) + 15 for text, prompt in zip(together[0], prompts, strict=True))
    assert all(MASK not in text for text in together[0])


def test_the_same_prompt_twice_gives_two_texts_and_a_seed_gives_one() -> None:
    prompt = [3, 4, 5]
    first, second = decode(tiny_model(4), [prompt, prompt], 20, seed=1)[0]
    assert first != second
    assert decode(tiny_model(4), [prompt], 20, seed=1)[0] == [first]
    assert decode(tiny_model(4), [prompt], 20, seed=2)[0] != [first]


def test_block_size_one_and_the_autoregressive_model_decode_token_by_token() -> None:
    model = tiny_model(1, objective="ar")
    texts, forwards, _ = decode(model, [[5, 6, 7], [8]], 40, temperature=0)
    assert forwards == [40, 40]
    for text, given in zip(texts, (3, 1), strict=True):
        for known in range(given, len(text)):
            past = text[max(0, known - 32) : known]
            assert model(torch.tensor([past]))[0, -1].argmax().item() == text[known]


@pytest.mark.parametrize("objective", ["block", "ar"])
def test_windows_agree_until_the_trained_length_and_differ_beyond(objective: str) -> None:
    model = tiny_model(4 if objective == "block" else 1, objective=objective)
    recomputed = decode(model, [[7]], 60, window="recomputed")[0][0]
    evicted = decode(model, [[7]], 60, window="evicted")[0][0]
    assert recomputed[:32] == evicted[:32]
    assert recomputed != evicted


def test_evicted_keys_stay_as_they_were_computed() -> None:
    """Against a cache kept as a plain list of blocks, oldest dropped, in fp64."""
    model, size, kept_blocks = tiny_model(4), 4, 7
    text = decode(model, [[7]], 75, window="evicted", temperature=0, rule="left_to_right")[0][0]
    blocks: list[list[tuple[Tensor, Tensor]]] = []
    for start in range(0, 76, size):
        state = [7] + [MASK] * 3 if start == 0 else [MASK] * size
        for i in range(size - state.count(MASK), size):
            logits, _ = list_forward(model, blocks[-kept_blocks:], state, start)
            state[i] = logits[i, :MASK].argmax().item()
        assert state == text[start : start + size]
        # A finished block is committed seeing the newest L - S tokens, itself included.
        blocks.append(list_forward(model, blocks[1 - kept_blocks :], text[start : start + size], start)[1])


@torch.no_grad()
def list_forward(
    model: PlainBD3, past: list[list[tuple[Tensor, Tensor]]], ids: list[int], start: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """(logits [S, V], own keys and values a layer) of a block that sees all of `past`."""
    own: list[tuple[Tensor, Tensor]] = []

    def attend(queries: Tensor, keys: Tensor, values: Tensor, layer: int) -> Tensor:
        own.append((keys, values))
        all_keys = torch.cat([block[layer][0] for block in past] + [keys], dim=1)
        all_values = torch.cat([block[layer][1] for block in past] + [values], dim=1)
        shared = queries.shape[2] // keys.shape[2]
        spread = [t.transpose(1, 2).repeat_interleave(shared, 1) for t in (all_keys, all_values)]
        weights = (queries.transpose(1, 2) @ spread[0].transpose(2, 3) / queries.shape[-1] ** 0.5).softmax(-1)
        return (weights @ spread[1]).transpose(1, 2)

    position = start + torch.arange(len(ids))[None]
    hidden = run_layers(model.model, torch.tensor([ids]), position, attend)
    return model.lm_head(hidden)[0], own


def test_masks_inside_the_last_given_block_are_filled_in_place() -> None:
    given = [1, 2, 3, 4, 5, MASK, 6, MASK]
    check_every_forward(tiny_model(4), [given[:4]], 4)
    text, forwards, _ = decode(tiny_model(4), [given], 4)
    assert [text[0][i] for i in (0, 1, 2, 3, 4, 6)] == [1, 2, 3, 4, 5, 6]
    assert forwards == [2 + 4] and MASK not in text[0]


@pytest.mark.parametrize(
    ("ids", "num_tokens", "sentence"),
    [
        ([], 4, "the prompt is empty"),
        ([21], 4, "token ids 21 to 21 are outside the vocabulary; use 0 to 20"),
        ([1] * 33, 4, "the prompt has 33 tokens and the window 32"),
        ([1], 0, "num_tokens=0 is out of range"),
        ([1, MASK, 2, 3, 4, 5], 4, r"position 1 is masked, and the text given at position 4 .* \(positions 0 to 3\)"),
    ],
)
def test_requests_that_cannot_be_honoured_are_refused(ids: list[int], num_tokens: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        decode(tiny_model(4), [ids], num_tokens)


def test_a_model_without_mask_or_eos_token_is_refused_where_it_needs_one() -> None:
    model = tiny_model(4)
    with pytest.raises(ValueError, match="the model has no EOS token"):
        decode(model, [[1]], 4, stop_at_eos=True, decoder_options={"eos_ids": ()})
    with pytest.raises(ValueError, match="no mask token id"):
        decode(model, [[1]], 4, decoder_options={"mask_id": None})


def test_texts_end_at_eos_and_leave_the_batch_without_changing_the_others() -> None:
    prompts = [tokens(n, seed=n).tolist() for n in range(2, 8)]
    whole = decode(tiny_model(4), prompts, 40, seed=3)[0]
    ended = decode(tiny_model(4), prompts, 40, seed=3, stop_at_eos=True)[0]
    assert any(len(text) < len(full) for text, full in zip(ended, whole, strict=True))
    for text, full, prompt in zip(ended, whole, prompts, strict=True):
        new = full[len(prompt) :]
        keep = new.index(1) + 1 if 1 in new else len(new)
        assert text == full[: len(prompt) + keep]


def test_long_prompts_are_committed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [tokens(n, seed=n).tolist() for n in (30, 3, 17)]
    expected = decode(tiny_model(4), prompts, 20)[0]
    monkeypatch.setattr("bd3_megatron.hf.generation_bd3.MAX_COMMIT_ROWS", 8)
    texts, _, decoder = decode(tiny_model(4), prompts, 20)
    assert texts == expected
    assert decoder.counts.commit_only > 0


def test_replayed_forwards_give_the_eager_texts() -> None:
    """Recording with a stand-in that computes again into the recorded output, as a graph's replay does."""

    recorded = []

    def record(function):  # type: ignore[no-untyped-def]
        output = function().clone()
        recorded.append(output.shape)
        return (lambda: output.copy_(function())), output

    model = tiny_model(4)
    prompts = [tokens(8, seed=n).tolist() for n in range(3)]
    replayed = ReplayedForward(model.model, model.lm_head, record)
    texts, _, _ = decode(model, prompts, 22, decoder_options={"forward": replayed})
    assert texts == decode(model, prompts, 22)[0]
    assert len(recorded) == 2
