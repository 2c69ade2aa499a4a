"""`model.generate(...)` of an exported folder: Hugging Face arguments in, the decoding engine behind.

Decides how the call's arguments become requests: one sample a row of `input_ids`, in order; left or right padding is
taken off by `attention_mask`. Without `seed` the seed of torch's last `manual_seed` is taken, so that
`transformers.set_seed(7); model.generate(ids)` equals `model.generate(ids, seed=7)`. The tokens are those of the
package's own sampler for the same seed and the same given tokens.
Refuses arguments that it does not know, instead of ignoring them: a beam search asked for is not one delivered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_bd3 import BD3Config
from .decoding_options_bd3 import DecodingOptions
from .draws_bd3 import sample_keys
from .generation_bd3 import Decoder, Request
from .philox import MAX_SEED
from .plain_bd3 import Stack

OPTION_NAMES = frozenset(field.name for field in fields(DecodingOptions))


def given_tokens(input_ids: Tensor | None, attention_mask: Tensor | None, config: BD3Config) -> list[list[int]]:
    """Rows of `input_ids` without padding; the BOS token where there are none.

    Raises:
        ValueError: no input and no BOS token, or a mask of another shape.
    """
    if input_ids is None or input_ids.shape[-1] == 0:
        if config.bos_token_id is None:
            raise ValueError("the prompt is empty and the model has no BOS token; give input_ids.")
        count = 1 if input_ids is None else input_ids.shape[0]
        return [[config.bos_token_id] for _ in range(count)]
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)} and input_ids {list(input_ids.shape)}; "
            "give one 0 or 1 a token."
        )
    return [row[kept.bool()].tolist() for row, kept in zip(input_ids, attention_mask, strict=True)]


def check_known(options: dict[str, Any]) -> None:
    """Refuse arguments that nothing here listens to.

    Raises:
        ValueError: names them and the known ones.
    """
    unknown = sorted(set(options) - OPTION_NAMES)
    if unknown:
        raise ValueError(
            f"generate got {', '.join(unknown)}, which it does not know; use max_new_tokens, num_return_sequences, "
            f"do_sample or {', '.join(sorted(OPTION_NAMES))}."
        )


def new_token_count(
    rows: Sequence[Sequence[int]], max_new_tokens: int | None, num_tokens: int | None, max_length: int | None
) -> int:
    """Tokens wanted after the given ones.

    Raises:
        ValueError: none of the three was given, or several.
    """
    given = [value for value in (max_new_tokens, num_tokens, max_length) if value is not None]
    if len(given) != 1:
        raise ValueError("give exactly one of max_new_tokens, num_tokens and max_length.")
    return given[0] if max_length is None else max_length - max(len(row) for row in rows)


def decode_rows(decoder: Decoder, rows: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Given tokens and their continuation, one list a row."""
    keys = sample_keys(rows)
    requests = [Request(tuple(row), num_tokens, key) for row, key in zip(rows, keys, strict=True)]
    texts: list[list[int]] = [[] for _ in rows]
    for event in decoder.run(requests):
        if event.ids is not None:
            texts[event.request] = event.ids
    return texts


def generate_rows(
    stack: Stack,
    lm_head: nn.Module,
    config: BD3Config,
    input_ids: Tensor | None,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    num_tokens: int | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    do_sample: bool | None = None,
    num_return_sequences: int = 1,
    **options: Any,
) -> Tensor:
    """int64 [rows, given + new]: every text, right-padded where texts end early; see `BD3PreTrainedModel.generate`."""
    check_known(options)
    if do_sample is False:
        options = {**options, "temperature": 0.0}
    rows = [row for row in given_tokens(input_ids, attention_mask, config) for _ in range(num_return_sequences)]
    count = new_token_count(rows, max_new_tokens, num_tokens, max_length)
    chosen_seed = torch.initial_seed() % (MAX_SEED + 1) if seed is None else seed
    decoder = Decoder(
        stack,
        lm_head,
        DecodingOptions(seed=chosen_seed, **options),
        mask_id=config.mask_token_id,
        eos_id=config.eos_token_id,
    )
    texts = decode_rows(decoder, rows, count)
    width = max(map(len, texts))
    padding = next((i for i in (config.pad_token_id, config.eos_token_id, config.mask_token_id) if i is not None), 0)
    padded = [text + [padding] * (width - len(text)) for text in texts]
    return torch.tensor(padded, device=stack.embed_tokens.weight.device)
