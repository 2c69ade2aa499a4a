"""SentencePiece: train a vocabulary from text, load a .model, and turn either into an equal tokenizer.json.

Contract: trained models give every UTF-8 text back exactly; an export is compared with SentencePiece on probe texts.
Refuses: too little text for the vocabulary, word and character models, white space treated as suffix, user-defined
pieces together with a dummy prefix, and any model whose export does not encode the probe texts as SentencePiece does.
Source: Kudo and Richardson, "SentencePiece", EMNLP 2018.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bd3_megatron.data.special_ids import MASK_TEXT, SpecialTexts
from bd3_megatron.data.tokenizer_fast import FastTokenizer, with_mask
from bd3_megatron.errors import TokenizerError

SPACE_SIGN = "\u2581"
UNMATCHABLE_SCORE = -1000.0
"""Score of bytes and control pieces in the export: text that spells "<0x41>" must not become the byte 0x41."""
# Unit: nats. Sums of multiples of 2^-6 are exact in SentencePiece's float32 up to 2^18 nats (about 40,000 tokens of
# one text) and in the float64 of `tokenizers`: both find the same best path, ties included.
_SCORE_QUANTUM = 2.0**-6
_MAX_LINE_BYTES = 4096
# Ids: <unk> 0, <s> 1, </s> 2, <pad> 3, <mask> 4, bytes 5..260, then pieces.
_SMALLEST_VOCABULARY = 5 + 256
# Probes hold what exports get wrong: runs of spaces, control characters, joined emoji, text that spells special
# pieces, and letters that Unicode normalisation would change.
_PROBES = (
    "The quick brown fox, 1234.5 times!",
    "  two  spaces and   three\tand a tab\nnew line\r\n\n",
    "caf\u00e9 na\u00efve \u4f60\u597d\u4e16\u754c \U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \u0000\u0001\u007f",
    "def f(x):\n    return x ** 2  # <0x41> <s> </s> <unk> <pad> <mask>",
    "e\u0301 \ufb01 \u00a0 \u3000 \u212b \ufeff \u00bd",
)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, *, model_type: str = "unigram", num_threads: int = 1
) -> FastTokenizer:
    """Train a vocabulary and return it as a tokenizer.

    Args:
        texts: documents; consumed once, held in memory by the trainer.
        vocab_size: V, mask and the other four special tokens and 256 bytes included; at least 262.
        model_type: "unigram" or "bpe".
        num_threads: threads of the trainer; the result depends on it in the last digits, so it is fixed by default.

    Raises:
        TokenizerError: unknown model type, vocabulary too small, or too large for the text.

    Source: Kudo and Richardson, "SentencePiece", EMNLP 2018; trainer options of its 0.2 release.
    """
    import sentencepiece

    if model_type not in ("unigram", "bpe"):
        raise TokenizerError(f"model_type={model_type} is not known; use unigram or bpe.")
    if vocab_size <= _SMALLEST_VOCABULARY:
        raise TokenizerError(
            f"vocab_size={vocab_size} holds nothing beside 256 bytes and 5 special tokens; use 262 or more."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            # These options together make decoding exact: bytes for unknown letters, no normalisation, no added or
            # removed spaces.
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            # A control piece is never matched by text, so no document can hold the mask id.
            control_symbols=["<mask>"],
            # Printable ASCII must be pieces: then no unknown letter ever makes "<0x41>" the cheaper path.
            required_chars="".join(chr(c) for c in range(33, 127)),
            max_sentence_length=_MAX_LINE_BYTES * 2,
            num_threads=num_threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"vocab_size={vocab_size} cannot be trained on this text ({_last_sentence(error)}); "
            "use a smaller --vocab-size or more text."
        ) from error
    # Rounded before the export, so that the saved model and the tokenizer.json have the same scores.
    return from_sentencepiece(_rounded_scores(model.getvalue()), "the trained model")


def load_sentencepiece(path: Path) -> FastTokenizer:
    """Open a SentencePiece .model file.

    Raises:
        TokenizerError: not such a file, or a model whose meaning a tokenizer.json cannot hold exactly.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"{path} cannot be read ({os.strerror(error.errno or 0)}); give a SentencePiece .model."
        ) from error
    return from_sentencepiece(content, str(path))


def from_sentencepiece(content: bytes, where: str) -> FastTokenizer:
    """Translate a serialized SentencePiece model into an equal tokenizer and prove it on the probe texts.

    Args:
        content: bytes of a .model file.
        where: its name, for errors.

    Raises:
        TokenizerError: see the module's refusals.
    """
    import tokenizers

    model = _parse(content, where)
    pieces = _pieces(model)
    built = tokenizers.Tokenizer(_translated_model(model, pieces, where))
    _translate_white_space(built, model, where)
    _isolate_unknown_letters(built, model, pieces)
    kinds = model.SentencePiece
    # With byte fallback nothing is ever unknown, and text that spells "<unk>" should stay text for everyone.
    unknown = [] if model.trainer_spec.byte_fallback else [(kinds.UNKNOWN, True)]
    for kind, is_special in (*unknown, (kinds.CONTROL, True), (kinds.USER_DEFINED, False)):
        built.add_tokens(
            [
                tokenizers.AddedToken(text, special=is_special, normalized=False)
                for text, _, piece_kind in pieces
                if piece_kind == kind
            ]
        )
    named = _named_tokens(model)
    texts = SpecialTexts.choose(named, where)
    tokenizer = with_mask(built.to_str(), texts, has_mask=named["mask_token"] is not None, where=where)
    # Not shown to be equal: BPE on periodic text where two overlapping pairs spell the same piece (never seen in
    # trials).
    _prove_equal(content, tokenizer, where)
    return tokenizer


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines the trainer accepts: it skips those with tabs, stops at NUL, and reads U+2581 as a space."""
    for text in texts:
        for line in text.replace("\t", "\n").replace("\0", "\n").replace(SPACE_SIGN, "\n").splitlines():
            # Cut by characters: one is at most 4 bytes of UTF-8, so no line exceeds the trainer's limit, which would
            # drop it.
            for start in range(0, len(line), _MAX_LINE_BYTES // 4):
                yield line[start : start + _MAX_LINE_BYTES // 4]


def _rounded_scores(content: bytes) -> bytes:
    model = _parse(content, "the trained model")
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
        for piece in model.pieces:
            piece.score = round(piece.score / _SCORE_QUANTUM) * _SCORE_QUANTUM
    return bytes(model.SerializeToString())


def _parse(content: bytes, where: str) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError lives in a private module
        raise TokenizerError(f"{where} is not a SentencePiece model; give the .model file it wrote.") from error
    if not model.pieces:
        raise TokenizerError(f"{where} holds no pieces; give the .model file SentencePiece wrote.")
    return model


def _pieces(model: Any) -> list[tuple[str, float, int]]:
    """(text, score, kind) of every piece, with plain spaces in the pieces that text can match."""
    normal = (model.SentencePiece.NORMAL, model.SentencePiece.USER_DEFINED)
    # With plain spaces, text that holds U+2581 itself comes back exactly; SentencePiece turns it into a space.
    return [(p.piece.replace(SPACE_SIGN, " ") if p.type in normal else p.piece, p.score, p.type) for p in model.pieces]


def _translated_model(model: Any, pieces: list[tuple[str, float, int]], where: str) -> Any:
    from tokenizers import models

    trainer = model.trainer_spec
    normal = model.SentencePiece.NORMAL
    unknown = next((i for i, piece in enumerate(pieces) if piece[2] == model.SentencePiece.UNKNOWN), None)
    if unknown is None or trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        raise TokenizerError(f"{where} is not a unigram or BPE model with an unknown piece; train one of these.")
    if trainer.model_type == trainer.UNIGRAM:
        scored = [(text, score if kind == normal else UNMATCHABLE_SCORE) for text, score, kind in pieces]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    vocabulary = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = _merges([(text, score) for text, score, kind in pieces if kind == normal], vocabulary)
    return models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token=pieces[unknown][0],
        # SentencePiece joins a run of unknown letters to one unknown piece.
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _merges(scored: list[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together, best piece first: SentencePiece merges by the score of the result."""
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for text, score in scored:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, vocabulary[left], vocabulary[right], (left, right)))
    # Ties go to the lower ids, so the order of merges is the same on every machine.
    return [pair for _, _, _, pair in sorted(ranked)]


def _translate_white_space(built: Any, model: Any, where: str) -> None:
    from tokenizers import Regex, decoders, normalizers

    spec, trainer = model.normalizer_spec, model.trainer_spec
    if not spec.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        raise TokenizerError(f"{where} treats white space in a way a tokenizer.json cannot hold; train it without.")
    user_defined = any(p.type == model.SentencePiece.USER_DEFINED for p in model.pieces)
    changes_ends = spec.add_dummy_prefix or spec.remove_extra_whitespaces
    # User-defined pieces cut the text before the normaliser runs, and every cut would get a prefix of its own.
    if user_defined and changes_ends:
        raise TokenizerError(f"{where} has user-defined pieces and a dummy prefix; a tokenizer.json cannot hold both.")
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if steps:
        built.normalizer = normalizers.Sequence(steps)
    tail = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *tail])


def _isolate_unknown_letters(built: Any, model: Any, pieces: list[tuple[str, float, int]]) -> None:
    """Keep text that spells a byte or control piece from matching it where some of its letters are no pieces.

    The low score of such pieces protects only against paths of known letters, since an unknown letter costs more than
    any piece. Unknown letters stand alone in every path anyway, so cutting around them changes nothing else.
    """
    from tokenizers import Regex, pre_tokenizers

    normal = model.SentencePiece.NORMAL
    known = {text for text, _, kind in pieces if kind == normal and len(text) == 1}
    hidden = (model.SentencePiece.BYTE, model.SentencePiece.CONTROL, model.SentencePiece.UNKNOWN)
    letters = {letter for text, _, kind in pieces if kind in hidden for letter in text}
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM and not letters <= known:
        inside = "".join(f"\\x{{{ord(letter):x}}}" for letter in sorted(known))
        # Without byte fallback a run of unknown letters is one unknown piece and must stay together.
        run = "" if model.trainer_spec.byte_fallback else "+"
        built.pre_tokenizer = pre_tokenizers.Split(Regex(f"[^{inside}]{run}"), "isolated")


def _named_tokens(model: Any) -> dict[str, str | None]:
    trainer = model.trainer_spec

    def piece(index: int) -> str | None:
        return model.pieces[index].piece if 0 <= index < len(model.pieces) else None

    control = {p.piece for p in model.pieces if p.type == model.SentencePiece.CONTROL}
    # Only a control piece may be the mask: an ordinary piece could occur in text.
    mask = next((text for text in ("<mask>", "[MASK]", MASK_TEXT) if text in control), None)
    return {
        "bos_token": piece(trainer.bos_id),
        "eos_token": piece(trainer.eos_id),
        "pad_token": piece(trainer.pad_id),
        "mask_token": mask,
    }


def _prove_equal(content: bytes, tokenizer: FastTokenizer, where: str) -> None:
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_proto=content)
    for probe in _PROBES:
        if original.encode(probe) != tokenizer.encode(probe).tolist():
            raise TokenizerError(
                f"{where} cannot be turned into an equal tokenizer.json (they differ on {probe[:20]!r}); "
                "train it with identity normalisation, no dummy prefix and no removal of white space."
            )


def _last_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "the trainer gave no reason"
