"""Tiny models that the tests of the plain model and of decoding share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.decoding_options_bd3 import DecodingOptions
from bd3_megatron.hf.draws_bd3 import sample_keys
from bd3_megatron.hf.generation_bd3 import Decoder, Request
from bd3_megatron.hf.plain_bd3 import PlainBD3

MASK = 20
STYLES: dict[str, dict[str, Any]] = {
    "paper": {"style": "paper"},
    "modern": {"style": "modern", "num_key_value_heads": 2, "qk_norm": True},
    "tied": {"style": "modern", "num_key_value_heads": 1, "tie_word_embeddings": True},
}


def tiny_config(block_size: int = 4, *, style: str = "modern", **fields: Any) -> BD3Config:
    """2 layers, D 16, 4 heads of 4, V 21 with mask 20, L 32."""
    base: dict[str, Any] = {
        "vocab_size": MASK + 1,
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "block_size": block_size,
        "mask_token_id": MASK,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return BD3Config(**{**base, **STYLES.get(style, {"style": style}), **fields})


def tiny_model(
    block_size: int = 4, *, style: str = "modern", dtype: torch.dtype = torch.float64, **fields: Any
) -> PlainBD3:
    """A model whose every term matters: weights of standard deviation 0.3, logits of order 1."""
    generator = torch.Generator().manual_seed(block_size)
    model = PlainBD3(tiny_config(block_size, style=style, **fields)).to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            parameter.copy_(0.3 * noise + (1.0 if parameter.dim() == 1 else 0.0))
    return model.to(dtype).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random real tokens."""
    return torch.randint(MASK, shape, generator=torch.Generator().manual_seed(seed))


def noised(clean_BL: Tensor, seed: int = 1) -> Tensor:
    """The same tokens, half of them masked."""
    is_masked = torch.rand(clean_BL.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return clean_BL.masked_fill(is_masked, MASK)


def decode(
    model: PlainBD3,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    batch_size: int | None = None,
    decoder_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[list[list[int]], list[int], Decoder]:
    """(whole texts, forwards of each, the decoder) of prompts decoded in batches."""
    shape = model.model.shape
    mask_id = None if shape.objective == "ar" else MASK
    said = {"mask_id": mask_id, "eos_ids": (1,), **(decoder_options or {})}
    decoder = Decoder(model.model, model.lm_head, DecodingOptions(**options), **said)
    requests = [Request(tuple(p), num_tokens, key) for p, key in zip(prompts, sample_keys(prompts), strict=True)]
    texts: list[list[int]] = [[] for _ in requests]
    forwards = [0] * len(requests)
    step = batch_size or len(requests)
    for low in range(0, len(requests), step):
        for event in decoder.run(requests[low : low + step]):
            if event.ids is not None:
                texts[low + event.request], forwards[low + event.request] = event.ids, event.num_forwards
    return texts, forwards, decoder
