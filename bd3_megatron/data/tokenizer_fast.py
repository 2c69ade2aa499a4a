"""A tokenizer that runs on the `tokenizers` library, from the text of a tokenizer.json.

Refuses: what is no tokenizer.json, special tokens that are missing or share an id, a mask text that the vocabulary uses.
Costs: about 3 MB/s of English a core. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bd3_megatron.data.dialogue import ChatTemplate
from bd3_megatron.data.special_ids import SpecialIds, SpecialTexts
from bd3_megatron.data.text_cutting import cut_text, is_cuttable
from bd3_megatron.data.tokenizer import Tokens, write_tokenizer_folder
from bd3_megatron.data.tokenizer_fingerprint import fingerprint_of
from bd3_megatron.errors import TokenizerError

CUT_CHARACTERS = 4096
"""Longer documents are encoded in pieces of about this size where that is exact: time grows faster than length."""


class FastTokenizer:
    """A tokenizer that runs on the `tokenizers` library from the text of a tokenizer.json."""

    kind = "fast"

    def __init__(
        self,
        tokenizer_json: str,
        texts: SpecialTexts,
        *,
        where: str,
        clean_up: bool = False,
        chat_template: str | None = None,
    ) -> None:
        """Build from the text of a tokenizer.json whose vocabulary holds the four special texts.

        Args:
            tokenizer_json: written again byte for byte by `save`.
            texts: the special tokens as written.
            where: name or folder, for errors.
            clean_up: transformers' clean_up_tokenization_spaces for the exported folder.
            chat_template: Jinja that writes chats; None: there is none.

        Raises:
            TokenizerError: not a tokenizer.json, no vocabulary, or special tokens that are missing or share the mask's id.
        """
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"tokenizer.json of {where} cannot be read ({error}); export it again.") from error
        self._json, self._texts, self._clean_up = tokenizer_json, texts, clean_up
        # A tokenizer.json may carry the limits of its old model: they would cut or pad documents without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # True makes the library treat special tokens in text as ordinary letters: a document may not write control
        # ids.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise TokenizerError(f"tokenizer.json of {where} holds no vocabulary; export it again.")
        # The highest id decides, not the number of entries: ids may have gaps, and an embedding needs a row for each.
        self._vocab_size = max(vocabulary.values()) + 1
        ids = {name: vocabulary.get(text) for name, text in vars(texts).items()}
        self._special = SpecialIds.from_dict(ids, self._vocab_size, f"tokenizer {where}")
        # As the library writes it: files of different releases then have one form.
        self._fingerprint = fingerprint_of(self._tokenizer.to_str(), self._special)
        self._cuttable = is_cuttable(json.loads(tokenizer_json))
        self._template = None
        if chat_template is not None:
            added = self._tokenizer.get_added_tokens_decoder().values()
            named = {f"{name}_token": text for name, text in vars(texts).items()}
            self._template = ChatTemplate(chat_template, named, frozenset(t.content for t in added if t.special))

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def special(self) -> SpecialIds:
        return self._special

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, text: str) -> Tokens:
        return self.encode_batch([text])[0]

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self._template

    def encode_batch(self, texts: Sequence[str], *, with_control: bool = False) -> list[Tokens]:
        # a cut may fall inside a control token's text
        pieces = [[text] if with_control else self._pieces(text) for text in texts]
        self._tokenizer.encode_special_tokens = not with_control
        # All pieces in one call, so that the library's threads share them; offsets, which nobody reads, are not
        # computed.
        encodings = iter(self._tokenizer.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False))
        return [
            np.concatenate([np.asarray(next(encodings).ids, dtype=np.uint32) for _ in ps], dtype=np.uint32)
            if ps
            else np.zeros(0, dtype=np.uint32)
            for ps in pieces
        ]

    def decode(self, ids: Sequence[int] | NDArray[np.integer], *, skip_special: bool = False) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def save(self, folder: Path) -> None:
        write_tokenizer_folder(folder, self, self._json, self._texts, clean_up=self._clean_up)

    def _pieces(self, text: str) -> list[str]:
        if not text:
            return []
        return cut_text(text, CUT_CHARACTERS) if self._cuttable else [text]


def with_mask(
    tokenizer_json: str,
    texts: SpecialTexts,
    *,
    has_mask: bool,
    where: str,
    clean_up: bool = False,
    chat_template: str | None = None,
) -> FastTokenizer:
    """Append the mask token where the tokenizer has none.

    Args:
        tokenizer_json: text of a tokenizer.json.
        texts: its special tokens; `texts.mask` is appended unless `has_mask`.
        has_mask: the tokenizer declares `texts.mask` itself.
        where: name or folder, for errors.
        clean_up, chat_template: passed on to the exported folder.

    Raises:
        TokenizerError: the vocabulary already uses the text without declaring it a mask, or ids would collide.
    """
    import tokenizers

    if has_mask:
        return FastTokenizer(tokenizer_json, texts, where=where, clean_up=clean_up, chat_template=chat_template)
    built = tokenizers.Tokenizer.from_str(tokenizer_json)
    vocabulary = built.get_vocab(with_added_tokens=True)
    if texts.mask in vocabulary:
        raise TokenizerError(
            f"the vocabulary of {where} holds {texts.mask} as token {vocabulary[texts.mask]} but does not declare it; "
            'write "mask_token" into its tokenizer_config.json.'
        )
    expected = max(vocabulary.values()) + 1
    built.add_special_tokens([tokenizers.AddedToken(texts.mask, special=True, normalized=False)])
    # The library counts entries: where ids have gaps, the new id would fall inside the vocabulary.
    if built.token_to_id(texts.mask) != expected:
        raise TokenizerError(
            f"the mask token would get id {built.token_to_id(texts.mask)} inside the vocabulary of {expected}; "
            "remove the gaps in the tokenizer's ids."
        )
    return FastTokenizer(built.to_str(), texts, where=where, clean_up=clean_up, chat_template=chat_template)
