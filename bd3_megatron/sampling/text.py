"""Between text and tokens: encoding prompts, decoding continuations piece by piece.

Refuses text where the folder has no tokenizer: ids need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bd3_megatron.errors import SamplingError, TokenizerError
from bd3_megatron.hf.text_bd3 import CONTEXT_TOKENS, continuation_text

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
# What decoders put for bytes that are no whole character yet.
UNFINISHED_CHARACTER = "\ufffd"


class HubTokenizer(Protocol):
    """What this package needs of a transformers tokenizer."""

    mask_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


def folder_tokenizer(folder: Path) -> HubTokenizer | None:
    """The tokenizer of a model's folder, by transformers; None where it has no tokenizer files.

    Raises:
        TokenizerError: there are files, but they cannot be loaded without running code.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    # a second of import, wanted only for a tokenizer
    from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

    try:
        tokenizer: HubTokenizer
        if (folder / "tokenizer.json").is_file():
            # From the file alone: no class of the folder is looked up or run.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        else:
            # With a configuration in hand transformers does not read the folder's, whose remote code it would ask about.
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), config=PretrainedConfig(), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # transformers raises many kinds here
        raise TokenizerError(f"tokenizer in {folder} cannot be loaded ({error}); copy its files again.") from None
    return tokenizer


def encode_prompt(prompt: str | Sequence[int], tokenizer: HubTokenizer | None, bos_id: int | None) -> list[int]:
    """Token ids of a prompt; an empty one becomes the BOS token.

    Raises:
        SamplingError: text without a tokenizer, or nothing to begin with.
    """
    if isinstance(prompt, str) and prompt:
        if tokenizer is None:
            raise SamplingError(
                "the prompt is text, but the folder has no tokenizer; give token ids, or export with a tokenizer."
            )
        # The text alone: an added EOS would end the prompt.
        return list(tokenizer.encode(prompt, add_special_tokens=False))
    if len(prompt) > 0:
        return [int(token) for token in prompt]
    if bos_id is None:
        raise SamplingError("the prompt is empty and the model has no BOS token; give at least one token.")
    return [bos_id]


class TextStream:
    """A continuation's text as it grows; keeps a bounded number of tokens."""

    def __init__(self, tokenizer: HubTokenizer, given: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._shown = list(given[-CONTEXT_TOKENS:])
        self._waiting: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        """Text that can be shown now; a character whose bytes are not complete waits for the next call."""
        self._waiting += tokens
        fresh = continuation_text(self._tokenizer, self._shown, self._waiting)
        # Not for ever: a model may really write broken bytes.
        if fresh.endswith(UNFINISHED_CHARACTER) and len(self._waiting) < CONTEXT_TOKENS:
            return ""
        # A bounded context is enough to decode what follows, however long the text grows.
        self._shown = [*self._shown, *self._waiting][-CONTEXT_TOKENS:]
        self._waiting = []
        return fresh

    def finish(self) -> str:
        """What was still waiting."""
        return continuation_text(self._tokenizer, self._shown, self._waiting) if self._waiting else ""


def cut_at_stop(text: str, strings: Sequence[str]) -> str:
    """The text before the first stop string."""
    found = [text.index(string) for string in strings if string in text]
    return text[: min(found)] if found else text
