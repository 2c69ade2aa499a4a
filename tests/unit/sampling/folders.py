"""Exported folders of tiny models, with and without a tokenizer, that the sampler's tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from bd3_megatron.convert.to_hf import write_folder
from tests.unit.hf.models import MASK, tiny_config, tiny_model

WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(2, MASK)), "[MASK]"]


def write_tokenizer(folder: Path, *, words: Sequence[str] = WORDS) -> Path:
    """A word-level tokenizer with ids as in the tiny models: BOS 0, EOS 1, mask 20."""
    folder.mkdir(parents=True)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "[MASK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "[MASK]"}
    described = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), "utf-8")
    return folder


def exported(folder: Path, *, tokenizer_dir: Path | None = None, **fields: Any) -> Path:
    """An exported fp64 folder of a tiny model."""
    config = tiny_config(4, **fields)
    write_folder(tiny_model(4, **fields).state_dict(), config, folder, tokenizer_dir=tokenizer_dir, dtype=torch.float64)
    return folder
