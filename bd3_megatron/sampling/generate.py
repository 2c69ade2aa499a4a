"""The Sampler: prompts in, continuations out, from an exported folder on one device.

Contract: the texts are those of `model.generate` in the exported folder for the same seed. A text depends on the
weights, the seed, its own given tokens and how often the same ones came before in the request; never on the batch.
Refuses bad requests in one sentence before any forward. Needs torch, transformers and safetensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bd3_megatron.compat.device import named_device
from bd3_megatron.errors import CheckpointError, SamplingError, shown
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.draws_bd3 import sample_keys
from bd3_megatron.hf.forward_bd3 import EagerForward, Forward, ReplayedForward, record_graph
from bd3_megatron.hf.generation_bd3 import BlockEvent, Decoder, Observer, Request, check_request
from bd3_megatron.hf.plain_bd3 import PlainBD3, plain_model
from bd3_megatron.hf.text_bd3 import StopStrings, continuation_text
from bd3_megatron.sampling.figures import RunFigures, weight_bytes
from bd3_megatron.sampling.folder import check_model_tokenizer, read_config, read_weights
from bd3_megatron.sampling.packed_linear import pack_linear_layers
from bd3_megatron.sampling.request import (
    Prompt,
    SampleResult,
    StreamedBlock,
    as_prompts,
    as_sampling_errors,
    check_count,
    new_options,
)
from bd3_megatron.sampling.text import (
    HubTokenizer,
    TextStream,
    cut_at_stop,
    encode_prompt,
    folder_tokenizer,
)

DEFAULT_BATCH_SIZE = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Sampler:
    """A model, its tokenizer and its device, ready to generate.

    Args:
        model: plain model in eval mode, on its device.
        config: its configuration.
        tokenizer: None = prompts are token ids and results have no text.
        with_graphs: record forwards of fixed shape and replay them (accelerators only).
    """

    model: PlainBD3
    config: BD3Config
    tokenizer: HubTokenizer | None
    figures: RunFigures | None
    """costs of the last `generate` or `infill`"""

    def __init__(
        self, model: PlainBD3, config: BD3Config, tokenizer: HubTokenizer | None, *, with_graphs: bool = False
    ) -> None:
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.figures = None
        self.forward: Forward = EagerForward(model.model, model.lm_head)
        _check_graphs(model.model.embed_tokens.weight.device, with_graphs=with_graphs)
        if with_graphs:
            self.forward = ReplayedForward(model.model, model.lm_head, record_graph)

    @staticmethod
    def from_pretrained(
        folder: Path | str,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        with_graphs: bool = False,
    ) -> Sampler:
        """Load an exported folder.

        Args:
            folder: written by the converter or by tools/import_official.py.
            device: None = the accelerator that torch sees, else the CPU.
            dtype: of weights and arithmetic, by name or as torch.dtype; None = as stored.
            with_graphs: record and replay forwards (accelerators only).

        Raises:
            CheckpointError: the folder is missing, damaged, or its weights are not its configuration's.
            TokenizerError: its tokenizer cannot be loaded, or is another one than the model's run had.
            SamplingError: an unknown dtype, or graphs on the CPU.
            BackendError: a device that is not there.
        """
        path = Path(folder)
        # what can be refused is refused before the weights are read
        chosen = named_device(None if device is None else str(device))
        _check_graphs(chosen, with_graphs=with_graphs)
        config = read_config(path)
        check_model_tokenizer(path, config)
        wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if dtype is not None and wanted not in DTYPES.values():
            raise SamplingError(f"dtype={shown(dtype)} is unknown; use one of {', '.join(DTYPES)}.")
        try:
            model = plain_model(config, read_weights(path))
        except ValueError as error:
            raise CheckpointError(
                f"{path} holds weights of another model ({error}); export the folder again."
            ) from None
        # the weights are read before the device is touched: a damaged folder must not wake an accelerator
        model = model.to(device=chosen, dtype=wanted)
        pack_linear_layers(model, is_tied=config.tie_word_embeddings)
        return Sampler(model, config, folder_tokenizer(path), with_graphs=with_graphs)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        num_tokens: int,
        seed: int = 0,
        num_samples: int = 1,
        batch_size: int = DEFAULT_BATCH_SIZE,
        stop_strings: Sequence[str] = (),
        observer: Observer | None = None,
        on_finished: Callable[[SampleResult], None] | None = None,
        **options: Any,
    ) -> list[SampleResult]:
        """Continue prompts.

        Args:
            prompts: one text or list of token ids, or several; an empty one is the BOS token.
            num_tokens: new tokens of every sample, >= 1; fewer only when a stop condition holds.
            seed: in [0, 2^48).
            num_samples: samples of every prompt.
            batch_size: samples decoded together; never changes their tokens.
            stop_strings: a text ends where one of them is complete (needs a tokenizer).
            observer: shown (sample, position, ids) of every block after every forward.
            on_finished: told every result as soon as it is there, in the order of finishing.
            options: fields of `DecodingOptions`: rule, steps, threshold, entropy_bound, temperature, top_p, top_k,
                min_p, repetition_penalty, window, stop_at_eos (default: where the model has an EOS token).

        Returns:
            num_samples results of the first prompt, then of the second, and so on.

        Raises:
            SamplingError: a prompt, option or number that cannot be served exactly as asked.
        """
        check_count("num_tokens", num_tokens)
        check_count("num_samples", num_samples)
        given = [
            encode_prompt(prompt, self.tokenizer, self.config.bos_token_id)
            for prompt in as_prompts(prompts)
            # Each sample has its own key by the number of its repetition, see draws_bd3.
            for _ in range(num_samples)
        ]
        # A mask in a prompt would be decoded with the block, in a request to continue text.
        if any(self.config.mask_token_id in ids for ids in given):
            raise SamplingError("a prompt holds the mask token; use infill to fill masks, or leave it out.")
        numbers = [(index // num_samples, index % num_samples) for index in range(len(given))]
        work = _Work(self, seed, batch_size, tuple(stop_strings), observer, on_finished, self._ending(options))
        return work.run(given, numbers, num_tokens)

    def _ending(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a continuation: behind the end of a document comes another, which nobody asked for."""
        return {"stop_at_eos": self.config.eos_token_id is not None, **options}

    def infill(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        observer: Observer | None = None,
        **options: Any,
    ) -> list[SampleResult]:
        """Fill the mask tokens inside texts, within the block rule.

        A masked position may look at given text to its right only inside its own block, so every given token must lie
        in or before the first masked block; masks behind the given text are filled too. `SampleResult.tokens` is the
        whole filled text.

        Args:
            texts: texts with mask tokens: token ids, or strings with the tokenizer's mask token.
            seed, batch_size, observer, options: as in `generate`, but an EOS token ends nothing unless asked to.

        Raises:
            SamplingError: as `generate`; a text without a mask token; given text that a masked block cannot see.
        """
        mask_id = self.config.mask_token_id
        given, wanted = [], []
        for text in as_prompts(texts):
            ids = encode_prompt(text, self.tokenizer, None)
            if mask_id not in ids:
                raise SamplingError(
                    "the text holds no mask token, so there is nothing to fill; use generate to continue it."
                )
            # masks behind the last given token are filled as new tokens are
            known = next((len(ids) - i for i, token in enumerate(reversed(ids)) if token != mask_id), 0)
            given.append(ids[:known])
            wanted.append(len(ids) - known)
        work = _Work(self, seed, batch_size, (), observer, None, options)
        results = work.run(given, [(index, 0) for index in range(len(given))], wanted)
        return [self._whole(result, ids) for result, ids in zip(results, work.texts, strict=True)]

    def stream(
        self,
        prompt: Prompt,
        *,
        num_tokens: int,
        seed: int = 0,
        stop_strings: Sequence[str] = (),
        observer: Observer | None = None,
        **options: Any,
    ) -> Iterator[StreamedBlock]:
        """Continue one prompt, block by block; arguments as in `generate`. The tokens are the same.

        A stop string is found when it is complete: a part of it may have been streamed with an earlier block.
        """
        check_count("num_tokens", num_tokens)
        given = encode_prompt(prompt, self.tokenizer, self.config.bos_token_id)
        work = _Work(self, seed, 1, tuple(stop_strings), observer, None, self._ending(options))
        text = TextStream(self.tokenizer, given) if self.tokenizer is not None else None
        for event in work.events([given], num_tokens):
            shown = None if text is None else text.push(event.tokens)
            if text is not None and event.stop_reason is not None:
                shown = (shown or "") + text.finish()
            yield StreamedBlock(event.tokens, shown, event.stop_reason)

    def _whole(self, result: SampleResult, ids: list[int]) -> SampleResult:
        text = self.tokenizer.decode(ids, skip_special_tokens=True) if self.tokenizer is not None else None
        return SampleResult(
            ids,
            text,
            result.prompt_tokens,
            result.prompt_index,
            0,
            result.num_forwards,
            result.seconds,
            result.stop_reason,
        )


def _check_graphs(device: torch.device, *, with_graphs: bool) -> None:
    if with_graphs and device.type == "cpu":
        raise SamplingError("graphs were asked for on the CPU, which has none; leave them out.")


class _Work:
    """One request on its way through the engine."""

    texts: list[list[int]]
    """whole texts of the finished run, given tokens included, in the order of the request"""

    def __init__(
        self,
        sampler: Sampler,
        seed: int,
        batch_size: int,
        stop_strings: tuple[str, ...],
        observer: Observer | None,
        on_finished: Callable[[SampleResult], None] | None,
        options: dict[str, Any],
    ) -> None:
        check_count("batch_size", batch_size)
        if stop_strings and sampler.tokenizer is None:
            raise SamplingError("stop strings were given, but the folder has no tokenizer; stop at length or EOS.")
        if not all(stop_strings):
            raise SamplingError("a stop string is empty; give at least one character.")
        self._sampler, self._batch_size, self._stop_strings = sampler, batch_size, stop_strings
        self._observer, self._on_finished = observer, on_finished
        self._options = new_options(seed, options)
        self.texts = []

    def run(
        self, given: list[list[int]], numbers: list[tuple[int, int]], num_tokens: int | list[int]
    ) -> list[SampleResult]:
        """Decode everything, batch by batch; results in the order of the request."""
        requests = self._requests(given, num_tokens)
        results: dict[int, SampleResult] = {}
        self.texts = [[] for _ in requests]
        # Batches of similar length: padding rows cost time, and never change a text.
        order = sorted(range(len(requests)), key=lambda i: (len(given[i]) + requests[i].num_tokens, len(given[i])))
        start, first_block_seconds, forwards, cache_bytes = time.perf_counter(), 0.0, 0, 0
        for low in range(0, len(order), self._batch_size):
            batch = order[low : low + self._batch_size]
            batch_start = time.perf_counter()
            # A decoder a batch: its cache has the size of this batch's longest text.
            decoder = self._decoder([given[i] for i in batch], batch)
            for event in decoder.run([requests[i] for i in batch]):
                now = time.perf_counter()
                # what a reader waits for: the first block of the first batch
                first_block_seconds = first_block_seconds or now - start
                if event.ids is not None:
                    index = batch[event.request]
                    self.texts[index] = event.ids
                    results[index] = self._result(event, given[index], numbers[index], now - batch_start)
            # Forwards that only commit finished blocks read the weights too.
            forwards += decoder.counts.denoising + decoder.counts.commit_only
            cache_bytes = max(cache_bytes, decoder.counts.cache_bytes)
        model = self._sampler.model
        self._sampler.figures = RunFigures(
            num_samples=len(requests),
            num_tokens=sum(len(result.tokens) for result in results.values()),
            seconds=time.perf_counter() - start,
            seconds_to_first_block=first_block_seconds,
            num_forwards=forwards,
            cache_bytes=cache_bytes,
            weight_bytes=weight_bytes(model.model, model.lm_head, model.model.embed_tokens.weight),
        )
        return [results[index] for index in range(len(requests))]

    def events(self, given: list[list[int]], num_tokens: int) -> Iterator[BlockEvent]:
        """The engine's events of one batch."""
        requests = self._requests(given, num_tokens)
        yield from self._decoder(given, list(range(len(given)))).run(requests)

    def _requests(self, given: list[list[int]], num_tokens: int | list[int]) -> list[Request]:
        counts = [num_tokens] * len(given) if isinstance(num_tokens, int) else num_tokens
        requests = [
            Request(tuple(ids), count, key) for ids, count, key in zip(given, counts, sample_keys(given), strict=True)
        ]
        config = self._sampler.config
        with as_sampling_errors():
            for request in requests:
                # All of them before the first forward: a bad last prompt must not cost the others' time.
                check_request(request, config, config.mask_token_id)
        return requests

    def _decoder(self, given: list[list[int]], indices: list[int]) -> Decoder:
        sampler = self._sampler
        stop_check = None
        if self._stop_strings and sampler.tokenizer is not None:
            stop_check = StopStrings(sampler.tokenizer, self._stop_strings, given)
        observer = self._observer
        with as_sampling_errors():
            return Decoder(
                sampler.model.model,
                sampler.model.lm_head,
                self._options,
                mask_id=sampler.config.mask_token_id,
                # Always told to the engine; whether a text ends there is the option stop_at_eos.
                eos_ids=() if sampler.config.eos_token_id is None else (sampler.config.eos_token_id,),
                stop_check=stop_check,
                observer=None if observer is None else lambda i, start, ids: observer(indices[i], start, ids),
                forward=sampler.forward,
            )

    def _result(self, event: BlockEvent, given: list[int], numbers: tuple[int, int], seconds: float) -> SampleResult:
        tokens = (event.ids or [])[len(given) :]
        text = None
        if self._sampler.tokenizer is not None:
            # With the prompt's last tokens before it, so that the first space is kept.
            text = cut_at_stop(continuation_text(self._sampler.tokenizer, given, tokens), self._stop_strings)
        reason = event.stop_reason or "length"
        result = SampleResult(tokens, text, given, *numbers, event.num_forwards, seconds, reason)
        if self._on_finished is not None:
            self._on_finished(result)
        return result
