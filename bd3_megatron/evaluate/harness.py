"""A block-diffusion model for EleutherAI's lm-evaluation-harness, registered there as `bd3`.

Contract: texts begin, end and fill their last block as the model's evaluation convention says; scores come from
`documents.py`, texts from the package's own sampler; nothing is cut off, and what a window leaves unseen is said. A score
depends on its text alone. Refuses generation arguments that block decoding does not have. Needs the extra `eval`.
    python -m bd3_megatron.evaluate.harness run --model bd3 --model_args path=FOLDER --tasks lambada_openai
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from bd3_megatron.data.tokenizer import META_FILE
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import RangeError, SamplingError, TokenizerError
from bd3_megatron.evaluate.documents import ScoredText, score_texts
from bd3_megatron.evaluate.noise_plan import EVALUATION_SEED
from bd3_megatron.evaluate.offline import model_convention, open_model
from bd3_megatron.evaluate.perplexity import ScoreSettings
from bd3_megatron.sampling.generate import DTYPES, Sampler
from bd3_megatron.sampling.text import folder_tokenizer

NUM_ENUMERATED = 8
"""Blocks with at most so many scored tokens have no noise unless something else is asked for: 255 mask patterns."""
DRAWS = 128
"""Noise draws of the other blocks, as in LLaDA's evaluation (arXiv 2502.09992)."""
MAX_NEW_TOKENS = 256
"""New tokens where a task names no number: the harness's own default."""
# The names under which tasks and back ends of the harness ask for a number of tokens.
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens")
FILTER_NAMES = ("top_p", "top_k", "min_p", "repetition_penalty")

TokenRequest = tuple[tuple[str, str], list[int], list[int]]
"""((context, continuation), ids of the context, ids of the continuation), as `TemplateLM` makes them."""


@register_model("bd3")
class HarnessModel(TemplateLM):
    """An exported folder behind the harness's interface.

    Args:
        path: exported folder with its tokenizer.
        device: cpu, or what torch calls an accelerator; None: the accelerator that torch sees, else the CPU.
        dtype: of weights and arithmetic, by name; None: as stored.
        batch_size: sequences of one forward; no result depends on it.
        max_batch_size: taken for the harness's sake and not used.
        draws: noise draws of every block; None: every mask pattern of blocks with at most NUM_ENUMERATED scored tokens,
            DRAWS draws of the others.
        exact: every mask pattern of every block.
        seed: of the noise and of sampling.
        rule: decoding rule of generated text; left to right agrees with what `loglikelihood` calls greedy.
        steps: forwards a block, for rules that take them.
        packing, append_eos, wrap_special, first_token_given, min_t: the evaluation convention; None: the model's own.

    Raises:
        CheckpointError: no model there, or a damaged one.
        TokenizerError: no tokenizer there, or one without an end token.
        RangeError: numbers out of range.
        ConfigError: a convention that no evaluation can have.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        draws: int | None = None,
        exact: bool = False,
        seed: int = EVALUATION_SEED,
        rule: str = "left_to_right",
        steps: int | None = None,
        packing: str | None = None,
        append_eos: bool | None = None,
        wrap_special: bool | None = None,
        first_token_given: bool | None = None,
        min_t: float | None = None,
    ) -> None:
        super().__init__()
        folder = Path(path)
        # Configuration only; the weights come last.
        opened = open_model(folder)
        self.config, self.batch_size = opened.config, _whole_number("batch_size", batch_size)
        hub = folder_tokenizer(folder)
        # Tasks stop at an end token, and unconditional scoring starts behind one.
        if hub is None or self.config.eos_token_id is None:
            raise TokenizerError(
                f"{folder} has no tokenizer with an end token; export the run again with its tokenizer, or copy its files."
            )
        # the package's own reading takes a text that spells "<s>" letter by letter, as the training text was read
        self._own_tokenizer = load_tokenizer(folder) if (folder / META_FILE).is_file() else None
        self._hub_tokenizer, self._folder = hub, folder
        self.convention, self.overridden = model_convention(self.config).changed(
            packing=packing,
            append_eos=append_eos,
            wrap_special=wrap_special,
            first_token_given=first_token_given,
            min_t=min_t,
        )
        self._seed, self._decoding = int(seed), {"rule": rule} | ({} if steps is None else {"steps": steps})
        self._settings = ScoreSettings(
            convention=self.convention, draws=DRAWS if draws is None else draws, exact=exact, seed=self._seed
        )
        # Draws that were asked for are drawn, except where one pattern is all there is.
        self._num_enumerated = NUM_ENUMERATED if draws is None else 1
        # what cannot be scored is refused before the weights are read
        self._settings.plan(
            objective=self.config.objective,
            block_size=self.config.block_size,
            mask_id=self.config.mask_token_id,
        )
        self._device = (
            torch.device(device) if device else torch.accelerator.current_accelerator() or torch.device("cpu")
        )
        self.model = opened.load(device=self._device, dtype=None if dtype is None else DTYPES[dtype])
        self._num_beyond: dict[str, int] = {}
        self._num_drawn = 0

    @property
    def is_next_token(self) -> bool:
        """The model is autoregressive."""
        return not objective_named(self.config.objective).has_noise

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        assert self.config.eos_token_id is not None  # __init__
        return self.config.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness's caches know the tokenizer by."""
        return str(self._folder)

    @property
    def row_start(self) -> list[int]:
        """Tokens before every text."""
        bos_id = self.config.bos_token_id
        return [bos_id] if self.convention.wrap_special and bos_id is not None else []

    @property
    def text_start(self) -> list[int]:
        """Given tokens before a text that nothing else comes before."""
        # Wrapped text begins behind the end token of another; isolated and padded documents begin with nothing before
        # them, as in training. An autoregressive model needs a token to predict the first one from.
        is_after_end = self.is_next_token or (self.convention.packing == "wrap" and self.convention.append_eos)
        return self.row_start or ([self.eot_token_id] if is_after_end else [])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, without special tokens."""
        if self._own_tokenizer is not None:
            return [int(token) for token in self._own_tokenizer.encode(string)]
        return list(self._hub_tokenizer.encode(string, add_special_tokens=False))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats or the bound on it, whether greedy decoding writes it) of continuations of contexts."""
        encoded: list[TokenRequest] = []
        for context, continuation in (request.args for request in requests):
            given, scored = (
                ([], self.tok_encode(continuation)) if context == "" else self._encode_pair(context, continuation)
            )
            given = [*self.row_start, *given] if given else self.text_start
            encoded.append(((context, continuation), given, scored))
        return self._loglikelihood_tokens(encoded)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # Every request is scored by itself: no result depends on what else was asked for.
        texts = [self._text(given, scored) for _, given, scored in requests]
        results = self._scored("loglikelihood", texts)
        for (request, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats, or the bound on it, of whole documents, their end included where the convention has one."""
        texts = [self._document(string) for (string,) in (request.args for request in requests)]
        results = [value for value, _ in self._scored("loglikelihood_rolling", texts)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations by the sampler, up to a stop string, the end token or the number of tokens asked for.

        Raises:
            SamplingError: generation arguments that block decoding does not have.
        """
        sampler = Sampler(self.model, self.config, self._hub_tokenizer)
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, (_, arguments) in enumerate(request.args for request in requests):
            # Requests of one task share their arguments, and one call of the sampler serves them all.
            groups.setdefault(json.dumps(arguments, sort_keys=True), []).append(number)
        for numbers in groups.values():
            length, until, options = _generation(requests[numbers[0]].args[1])
            encoded = [[*self.row_start, *self.tok_encode(requests[n].args[0])] for n in numbers]
            # A text must begin with something, also where the task gives an empty prompt.
            prompts = [prompt or self.text_start or [self.eot_token_id] for prompt in encoded]
            self._say_beyond("generate_until", [len(prompt) + length for prompt in prompts])
            found = sampler.generate(
                prompts,
                num_tokens=length,
                seed=self._seed,
                batch_size=self.batch_size,
                stop_strings=until,
                stop_at_eos=True,
                # A task's own arguments win over the model's.
                **self._decoding | options,
            )
            texts |= {n: result.text or "" for n, result in zip(numbers, found, strict=True)}
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def get_model_info(self) -> dict[str, Any]:
        """What stands beside the harness's results: what the likelihoods are, and under which convention."""
        return {
            "bd3_likelihood": self.likelihood,
            "bd3_convention": self.convention.sentence(),
            "bd3_overridden": list(self.overridden),
            "bd3_longer_than_trained": dict(self._num_beyond),
            "bd3_scored_with_noise": self._num_drawn,
        }

    @property
    def likelihood(self) -> str:
        """What is scored, for people."""
        if self.is_next_token or self.config.block_size == 1:
            return "likelihood of each token given those before it (exact)"
        if self._num_drawn == 0:
            return "bound on the likelihood, without noise: every mask pattern of the scored tokens of a block"
        return f"bound on the likelihood, of {self._num_drawn:,} texts from {self._settings.draws} draws of noise"

    def _text(self, given: Sequence[int], scored: Sequence[int], num_fill: int = 0) -> ScoredText:
        """The text of a request."""
        # Noise keyed by the context: continuations of one context are compared under the same noise, and no score depends
        # on which others were asked for.
        number = zlib.crc32(json.dumps(list(given or scored)).encode())
        return ScoredText([*given, *scored], len(given), num_fill, number)

    def _document(self, string: str) -> ScoredText:
        """A whole document under the convention."""
        ids = [*self.tok_encode(string), *([self.eot_token_id] if self.convention.append_eos else [])]
        rule = self.convention.packing_rule(self.config.max_position_embeddings)
        start = self.text_start
        # Filled up as training rows are: the end tokens behind a text are part of its bound.
        num_fill = -(len(start) + len(ids)) % rule.fill
        return self._text(start, [*ids, *[self.eot_token_id] * num_fill], num_fill)

    def _scored(self, what: str, texts: Sequence[ScoredText]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy text); of nothing: 0."""
        self._say_beyond(what, [len(text.ids) for text in texts])
        # An empty continuation has probability 1, and the empty text is what greedy decoding writes.
        asked = [number for number, text in enumerate(texts) if len(text.ids) > text.given]
        found = score_texts(
            self.model,
            self._settings,
            [texts[number] for number in asked],
            mask_id=self.config.mask_token_id,
            num_enumerated=self._num_enumerated,
            batch_size=self.batch_size,
        )
        self._num_drawn += sum(not score.is_exact for score in found)
        results = [(0.0, True)] * len(texts)
        for number, score in zip(asked, found, strict=True):
            results[number] = (-score.nll_nats, score.is_greedy)
        return results

    def _say_beyond(self, what: str, lengths: Iterable[int]) -> None:
        """Tell people of texts longer than the model was trained on, once a call."""
        length, size = self.config.max_position_embeddings, self.config.block_size
        counted = list(lengths)
        beyond = sum(one > length for one in counted)
        if beyond:
            self._num_beyond[what] = self._num_beyond.get(what, 0) + beyond
            seen = f"at least the newest {length // 2}" if self.is_next_token else f"the newest {length - size}"
            print(
                f"note: {what}: {beyond} of {len(counted)} texts are longer than the trained length of {length} tokens; "
                f"what is written beyond it sees {seen} tokens before it, no more",
                file=sys.stderr,
            )


def _generation(arguments: Mapping[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
    """(number of tokens, stop strings, decoding options) of a task's generation arguments.

    Raises:
        SamplingError: an argument that block decoding does not have.
    """
    # None means not asked for.
    given = {name: value for name, value in arguments.items() if value is not None}
    until = given.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    lengths = [given.pop(name) for name in LENGTH_NAMES if name in given]
    is_sampled = given.pop("do_sample", False)
    temperature = given.pop("temperature", 1.0)
    options = {name: given.pop(name) for name in FILTER_NAMES if name in given}
    # one beam is no beam search
    if given.pop("num_beams", 1) != 1 or given:
        known = ", ".join(("until", *LENGTH_NAMES, "do_sample", "temperature", *FILTER_NAMES))
        unknown = ", ".join(sorted(given)) or "num_beams"
        raise SamplingError(f"block decoding has no {unknown}; leave it out of generation_kwargs, or use {known}.")
    # the harness asks for greedy text unless a task says do_sample
    options["temperature"] = float(temperature) if is_sampled else 0.0
    return int(lengths[0]) if lengths else MAX_NEW_TOKENS, [one for one in until if one], options


def _whole_number(name: str, value: int | str) -> int:
    """A number that the harness may have read as text.

    Raises:
        RangeError: no whole number from 1 on.
    """
    # The harness reads model_args as text, and offers batch_size=auto.
    if not str(value).isdecimal() or int(value) < 1:
        raise RangeError(f"{name}={value} is no whole number from 1 on; give one, such as 8 (auto is not offered).")
    return int(value)


def main() -> None:
    """The harness's own command line, which knows the model `bd3` because this file is loaded."""
    # the harness has no plug-ins: a model must be registered by whoever starts it
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
