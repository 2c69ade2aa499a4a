"""SentencePiece models and their exported tokenizer.json encode alike; what cannot be exported exactly is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from bd3_megatron.data.sentencepiece_model import from_sentencepiece, load_sentencepiece, train_sentencepiece
from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.data.tokenizer_open import open_tokenizer
from bd3_megatron.errors import TokenizerError
from tests.unit.data.corpora import AWKWARD, english
from tests.unit.data.test_tokenizer import noise_texts


def model(**options: object) -> bytes:
    """A model as others train it."""
    content = io.BytesIO()
    given = {"vocab_size": 400, "model_type": "unigram", "byte_fallback": True, "hard_vocab_limit": False, **options}
    lines = (english(900, 1) + " caf\u00e9 \ufb01 1234").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=content, minloglevel=2, num_threads=1, **given
    )
    return content.getvalue()


ASCII = "".join(chr(c) for c in range(33, 127))
EXACT = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
FOREIGN = [
    {},
    {"model_type": "bpe"},
    {**EXACT},
    {**EXACT, "model_type": "bpe"},
    {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    {"byte_fallback": False},
    {"byte_fallback": False, "required_chars": ASCII},
    {"pad_id": 3, "user_defined_symbols": ["<sep>"], **EXACT},
]


@pytest.mark.parametrize("options", FOREIGN, ids=str)
def test_loaded_models_encode_as_sentencepiece_does(options: dict, tmp_path: Path) -> None:
    content = model(**options)
    (tmp_path / "tokenizer.model").write_bytes(content)
    tokenizer = open_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    texts = [english(400, 3), "<sep> a<sep>b", *AWKWARD, *noise_texts(250, 4)]
    for text in texts:
        if "\u2581" not in text:
            assert tokenizer.encode(text).tolist() == reference.encode(text), text
    assert (
        tokenizer.special.mask == reference.get_piece_size() and tokenizer.vocab_size == reference.get_piece_size() + 1
    )
    assert load_sentencepiece(tmp_path / "tokenizer.model").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_yields_exactly_the_size_asked_for_and_repeats(model_type: str) -> None:
    texts = [english(900, 1), "tab\tand nul\0 and sign \u2581 inside"]
    first, again = (train_sentencepiece(texts, 400, model_type=model_type) for _ in range(2))
    assert first.vocab_size == 400 and first.special == SpecialIds(bos=1, eos=2, pad=3, mask=4)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != train_sentencepiece(texts[:1], 410, model_type=model_type).fingerprint
    assert len(first.encode("there would their we him")) < 12


def test_long_lines_are_trained_on_too() -> None:
    line = english(3000, 2).replace("\n", " ")
    assert len(train_sentencepiece([line], 400).encode(line)) < len(line) / 2


def test_unigram_and_sentencepiece_agree_on_ten_thousand_tokens(tmp_path: Path) -> None:
    from bd3_megatron.data import sentencepiece_model as own_module

    content = own_module._rounded_scores(model(**EXACT))
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    text = english(9000, 7)
    ids = from_sentencepiece(content, "it").encode(text).tolist()
    assert len(ids) > 10_000 and ids == reference.encode(text)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model_type": "char"}, "is not a unigram or BPE model"),
        ({"treat_whitespace_as_suffix": True}, "treats white space in a way a tokenizer.json cannot hold"),
        ({"user_defined_symbols": ["<sep>"]}, "has user-defined pieces and a dummy prefix"),
        ({"eos_id": -1}, "has neither eos_token nor sep_token"),
    ],
    ids=str,
)
def test_models_that_cannot_be_exported_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(TokenizerError, match=sentence):
        from_sentencepiece(model(**options), "it")


def test_a_model_whose_export_would_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from bd3_megatron.data import sentencepiece_model as own_module

    monkeypatch.setattr(own_module, "UNMATCHABLE_SCORE", 1.0)
    with pytest.raises(TokenizerError, match="cannot be turned into an equal tokenizer.json .they differ on 'def f"):
        from_sentencepiece(model(**EXACT, required_chars=ASCII), "it")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no.model cannot be read"):
        load_sentencepiece(tmp_path / "no.model")
    (tmp_path / "bad.model").write_bytes(b"\xff\xff\xff nonsense")
    with pytest.raises(TokenizerError, match="bad.model is not a SentencePiece model"):
        open_tokenizer(tmp_path / "bad.model")
    with pytest.raises(TokenizerError, match="holds no pieces"):
        from_sentencepiece(b"", "nothing")


def test_impossible_vocabularies_are_refused() -> None:
    with pytest.raises(TokenizerError, match="vocab_size=261 holds nothing beside 256 bytes and 5 special tokens"):
        train_sentencepiece([english(100, 1)], 261)
    with pytest.raises(
        TokenizerError, match="vocab_size=5000 cannot be trained on this text .* use a smaller --vocab-size"
    ):
        train_sentencepiece([english(100, 1)], 5000)
    with pytest.raises(TokenizerError, match="cannot be trained on this text"):
        train_sentencepiece([], 400)
    with pytest.raises(TokenizerError, match="model_type=word is not known; use unigram or bpe"):
        train_sentencepiece([english(100, 1)], 400, model_type="word")
