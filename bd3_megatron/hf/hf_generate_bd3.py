"""`model.generate(...)` of an exported folder: Hugging Face arguments in, the decoding engine behind.

Contract: the result holds the given columns as they were given, padding included, then the new tokens. Every argument and
every field of a generation configuration is honoured, or refused in a sentence: a beam search asked for is not one
delivered. The tokens are those of the package's own sampler for the same seed, options and given tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from .configuration_bd3 import BD3Config
from .decoding_options_bd3 import DecodingOptions
from .draws_bd3 import sample_keys
from .generation_bd3 import Decoder, Request
from .philox import MAX_SEED
from .plain_bd3 import LayerStack
from .text_bd3 import Decodes, StopStrings

OWN_OPTIONS = frozenset(field.name for field in fields(DecodingOptions)) - {"seed"}
FILTERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options of decoding that transformers' generation configurations hold too, under the same names and meanings."""
HONOURED = frozenset(
    {
        *FILTERS,
        *("max_new_tokens", "max_length", "do_sample", "num_return_sequences", "stop_strings", "use_cache"),
        *("eos_token_id", "pad_token_id", "bos_token_id"),
    }
)
SILENT = frozenset({"transformers_version", "_from_model_config", "return_dict_in_generate"})
"""Fields of a generation configuration that ask for nothing (the last one is refused where it is true)."""
NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "min_length": 0, "min_new_tokens": 0, "length_penalty": 1.0}
"""Values that ask for nothing, where transformers' own default is None."""
UNSET_LENGTHS = (None, 20)
"""What transformers' own default says where nobody asked for a length."""


class Streamer(Protocol):
    """What transformers' streamers are."""

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class GenerateCall:
    """One call of `generate`, checked."""

    options: DecodingOptions
    num_new: int
    num_return_sequences: int
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_id: int | None
    stop_strings: tuple[str, ...]


def generate_rows(
    stack: LayerStack,
    lm_head: nn.Module,
    config: BD3Config,
    input_ids: Tensor | None,
    *,
    generation_config: GenerationConfig,
    asked: Mapping[str, Any],
    attention_mask: Tensor | None = None,
    seed: int | None = None,
    streamer: Streamer | None = None,
    tokenizer: Decodes | None = None,
) -> Tensor:
    """int64 [rows, given columns + new]: every text; arguments as in `BD3LanguageModel.generate`.

    Raises:
        ValueError: what cannot be honoured, in one sentence.
    """
    # everything is checked before the first forward
    call = read_call(config, generation_config, asked, width=_width(input_ids), seed=seed)
    columns_BP, is_given_BP = _given(input_ids, attention_mask, call, stack.embed_tokens.weight.device)
    columns_BP, is_given_BP = (x.repeat_interleave(call.num_return_sequences, 0) for x in (columns_BP, is_given_BP))
    rows = [ids_P[kept_P].tolist() for ids_P, kept_P in zip(columns_BP, is_given_BP, strict=True)]
    if call.stop_strings and tokenizer is None:
        raise ValueError("stop_strings were given without a tokenizer to find them with; give tokenizer=...")
    if streamer is not None and len(rows) != 1:
        raise ValueError(f"a streamer shows one text and {len(rows)} were asked for; give one row of input_ids.")
    decoder = Decoder(
        stack,
        lm_head,
        call.options,
        mask_id=config.mask_token_id,
        eos_ids=call.eos_ids,
        stop_check=StopStrings(tokenizer, call.stop_strings, rows) if call.stop_strings and tokenizer else None,
        device=columns_BP.device,
    )
    texts = _decode(decoder, rows, call.num_new, streamer)
    return _with_columns(columns_BP, is_given_BP, texts, call.pad_id)


def read_call(
    config: BD3Config, base: GenerationConfig, asked: Mapping[str, Any], *, width: int, seed: int | None
) -> GenerateCall:
    """What a generation configuration and keyword arguments ask for together; the arguments win.

    Args:
        config: of the model.
        base: the call's generation configuration, or the model's.
        asked: keyword arguments that are not None.
        width: given columns, which max_length counts.
        seed: of the draws; None: that of torch's last `manual_seed`.

    Raises:
        ValueError: an unknown name, a value outside its range, or something that block decoding does not do.
    """
    _refuse_foreign(base, asked)
    _refuse_tensors(asked)
    # fields of the generation configuration that are None leave the engine's own defaults in force
    own = {name: value for name, value in asked.items() if name in OWN_OPTIONS}
    for name in FILTERS:
        value = getattr(base, name, None)
        if name not in own and value is not None:
            own[name] = value
    # as everywhere in transformers a configuration that does not sample is greedy, unless the call says how to draw
    is_drawn = bool(base.do_sample) or any(name in asked for name in FILTERS)
    samples = asked["do_sample"] if "do_sample" in asked else is_drawn
    if not samples:
        own["temperature"] = 0.0

    def wanted(name: str) -> Any:
        return asked[name] if name in asked else getattr(base, name, None)

    if wanted("use_cache") is False:
        raise ValueError("use_cache=False was asked for; block decoding always caches, and the texts are the same.")
    eos_ids = _as_ids(wanted("eos_token_id"))
    own.setdefault("stop_at_eos", bool(eos_ids))
    # some id must stand behind texts that end early; the end token is what transformers takes, too
    pads = (wanted("pad_token_id"), *eos_ids, config.mask_token_id, 0)
    strings = wanted("stop_strings") or ()
    return GenerateCall(
        # the same seed as set_seed gave: set_seed(7) and generate() equal generate(seed=7)
        options=DecodingOptions(seed=torch.initial_seed() % (MAX_SEED + 1) if seed is None else seed, **own),
        num_new=_num_new(base, asked, width),
        num_return_sequences=_at_least_one("num_return_sequences", wanted("num_return_sequences") or 1),
        eos_ids=eos_ids,
        pad_id=next(int(i) for i in pads if i is not None),
        bos_id=wanted("bos_token_id"),
        stop_strings=(strings,) if isinstance(strings, str) else tuple(strings),
    )


def _refuse_foreign(base: GenerationConfig, asked: Mapping[str, Any]) -> None:
    """Refuse what nobody here listens to; a value that transformers' own defaults have asks for nothing."""
    default = vars(GenerationConfig())
    foreign = {name: value for name, value in base.to_diff_dict().items() if name not in HONOURED | SILENT}
    foreign |= {name: value for name, value in asked.items() if name not in HONOURED | OWN_OPTIONS}
    if base.return_dict_in_generate:
        foreign["return_dict_in_generate"] = True
    # A tensor asks for something, and its comparison with a value has no single answer.
    found = sorted(
        n for n, v in foreign.items() if isinstance(v, Tensor) or v not in (None, False, default.get(n), NEUTRAL.get(n))
    )
    if found:
        named = ", ".join(f"{name}={_shown(foreign[name])}" for name in found)
        raise ValueError(
            f"generate got {named}, which block decoding does not do; use {', '.join(sorted(HONOURED))}, seed, streamer "
            f"or {', '.join(sorted(OWN_OPTIONS - HONOURED))}."
        )


def _shown(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else str(value)[:40]


def _refuse_tensors(asked: Mapping[str, Any]) -> None:
    """Every option but the ids of end tokens is one value; a tensor of several would be compared as if it were."""
    for name, value in asked.items():
        if isinstance(value, Tensor) and value.numel() != 1 and name != "eos_token_id":
            raise ValueError(f"{name}={_shown(value)} is not one value; give a number.")


def _num_new(base: GenerationConfig, asked: Mapping[str, Any], width: int) -> int:
    """Tokens wanted after the given columns."""
    # an argument beats both fields of the configuration, whichever of the two it is
    named = [name for name in ("max_new_tokens", "max_length") if name in asked]
    if len(named) == 2:
        raise ValueError("max_new_tokens and max_length were both given; give one of them.")
    if not named:
        named = [name for name in ("max_new_tokens", "max_length") if getattr(base, name) not in UNSET_LENGTHS][:1]
    if not named:
        raise ValueError("no length was asked for; give max_new_tokens=N.")
    name = named[0]
    value = asked[name] if name in asked else getattr(base, name)
    return _at_least_one(name, int(value) - (width if name == "max_length" else 0), shown=value)


def _at_least_one(name: str, count: int, *, shown: object = None) -> int:
    if count < 1:
        raise ValueError(f"{name}={count if shown is None else shown} leaves {count} to generate; ask for 1 or more.")
    return int(count)


def _as_ids(value: int | Sequence[int] | Tensor | None) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    return tuple(value) if isinstance(value, Sequence) else (int(value),)


def _width(input_ids: Tensor | None) -> int:
    return 1 if input_ids is None or input_ids.shape[-1] == 0 else input_ids.shape[-1]


def _given(
    input_ids: Tensor | None, attention_mask: Tensor | None, call: GenerateCall, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(columns int64 [B, P], which of them are text: bool [B, P]); one BOS token where there are none."""
    if input_ids is None or input_ids.shape[-1] == 0:
        if call.bos_id is None:
            raise ValueError("the prompt is empty and the model has no BOS token; give input_ids.")
        rows = 1 if input_ids is None else input_ids.shape[0]
        columns = torch.full((rows, 1), call.bos_id, device=device if input_ids is None else input_ids.device)
        return columns, torch.ones_like(columns, dtype=torch.bool)
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids are {input_ids.dtype} {list(input_ids.shape)}; give token ids [rows, columns].")
    if attention_mask is not None:
        return input_ids, binary_mask(attention_mask, input_ids)
    # without a mask transformers takes the padding token for padding, where it cannot be the end of a text
    is_text = input_ids != call.pad_id
    is_padded = call.pad_id not in call.eos_ids and not bool(is_text.all())
    return input_ids, is_text if is_padded else torch.ones_like(input_ids, dtype=torch.bool)


def binary_mask(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """The mask as bool [B, L].

    Raises:
        ValueError: another shape, or values between or beside 0 and 1.
    """
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)} and input_ids {list(input_ids.shape)}; "
            "give one 0 or 1 a token."
        )
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask holds values other than 0 and 1; a position is text or it is padding.")
    return attention_mask == 1


def _decode(
    decoder: Decoder, rows: Sequence[Sequence[int]], num_new: int, streamer: Streamer | None
) -> list[list[int]]:
    """Given tokens and their continuation, one list a row."""
    requests = [Request(tuple(row), num_new, key) for row, key in zip(rows, sample_keys(rows), strict=True)]
    texts: list[list[int]] = [[] for _ in rows]
    tell: Callable[[Tensor], None] = (lambda tokens: None) if streamer is None else streamer.put
    tell(torch.tensor([rows[0]]))
    for event in decoder.run(requests):
        if event.tokens:
            tell(torch.tensor(event.tokens))
        if event.ids is not None:
            texts[event.request] = event.ids
    if streamer is not None:
        streamer.end()
    return texts


def _with_columns(columns_BP: Tensor, is_given_BP: Tensor, texts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """The given columns where they stood, masks among them filled, then new tokens and padding behind them."""
    # callers cut the result at the width of what they gave: the new tokens of every row begin in one column
    counts = is_given_BP.sum(dim=1).tolist()
    width = max(len(text) - count for text, count in zip(texts, counts, strict=True))
    result = columns_BP.new_full((len(texts), columns_BP.shape[1] + width), pad_id)
    result[:, : columns_BP.shape[1]] = columns_BP
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        whole = torch.tensor(text, device=result.device)
        result[row, : columns_BP.shape[1]][is_given_BP[row]] = whole[:count]
        result[row, columns_BP.shape[1] : columns_BP.shape[1] + len(text) - count] = whole[count:]
    return result
