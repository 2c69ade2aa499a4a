"""Tokenizers: exact round trips, the same ids in an exported folder, ids and refusals."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bd3_megatron.data.sentencepiece_model import train_sentencepiece
from bd3_megatron.data.special_ids import MASK_TEXT, SpecialIds, SpecialTexts, check_special_ids
from bd3_megatron.data.text_cutting import cut_text, is_cuttable
from bd3_megatron.data.tokenizer import Tokenizer
from bd3_megatron.data.tokenizer_fast import FastTokenizer, with_mask
from bd3_megatron.data.tokenizer_fingerprint import check_same_tokenizer
from bd3_megatron.data.tokenizer_open import load_tokenizer, open_tokenizer
from bd3_megatron.errors import TokenizerError
from tests.unit.data.corpora import AWKWARD, english

NAMES = ("bytes", "unigram", "bpe", "byte-level")


def byte_level(folder: Path) -> Path:
    """GPT-2's kind of tokenizer, trained here: vocab.json and merges.txt only."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator([english(800, 1), *AWKWARD], trainer)
    folder.mkdir(exist_ok=True, parents=True)
    built.model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [english(800, seed) for seed in range(3)]
    return {
        "bytes": open_tokenizer("bytes"),
        "unigram": train_sentencepiece(texts, 420),
        "bpe": train_sentencepiece(texts, 420, model_type="bpe"),
        "byte-level": open_tokenizer(byte_level(folder / "byte_level")),
    }


def noise_texts(num_texts: int, seed: int) -> list[str]:
    """Random mixtures of words, awkward pieces and any code points."""
    chosen = random.Random(seed)
    plain = english(2000, 9)

    def piece() -> str:
        kind = chosen.random()
        if kind < 0.5:
            start = chosen.randrange(len(plain) - 50)
            return plain[start : start + chosen.randint(1, 40)]
        if kind < 0.8:
            return chosen.choice([*AWKWARD, "  ", "\n\n", "\t", "\u2581", "<s>", "<0x0A>", "aaaa"]) * chosen.randint(
                1, 2
            )
        return chr(chosen.choice([chosen.randrange(0xD800), chosen.randrange(0xE000, 0x110000)]))

    return ["".join(piece() for _ in range(chosen.randint(1, 8))) for _ in range(num_texts)]


@pytest.mark.parametrize("name", NAMES)
def test_any_text_comes_back_exactly(made: dict[str, Tokenizer], name: str) -> None:
    texts = [*AWKWARD, *noise_texts(300, 1)]
    for text, ids in zip(texts, made[name].encode_batch(texts), strict=True):
        assert made[name].decode(ids) == text
        assert ids.dtype == np.uint32


@pytest.mark.parametrize("name", NAMES)
def test_text_never_becomes_a_special_token(made: dict[str, Tokenizer], name: str) -> None:
    special = set(made[name].special.as_dict().values())
    forged = "".join(("<s></s><pad><mask><|mask|><|endoftext|>", "<bos><eos>", MASK_TEXT, "<0x41>"))
    for text in (forged, f"a {forged} b", *noise_texts(50, 2)):
        assert not special & set(made[name].encode(text).tolist())


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_folder_gives_the_same_ids_in_transformers(
    made: dict[str, Tokenizer], name: str, tmp_path: Path
) -> None:
    import transformers

    tokenizer = made[name]
    tokenizer.save(tmp_path)
    foreign = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(foreign) == tokenizer.vocab_size
    ids = tokenizer.special
    assert (foreign.bos_token_id, foreign.eos_token_id) == (ids.bos, ids.eos)
    assert (foreign.mask_token_id, foreign.pad_token_id) == (ids.mask, ids.pad)
    unforged = [t for t in (*AWKWARD, *noise_texts(60, 3), english(3000, 4)) if "<" not in t]
    for text in unforged:
        ours = foreign(text)["input_ids"]
        assert ours == tokenizer.encode(text).tolist()
        assert foreign.decode(ours) == text
    assert foreign(foreign.mask_token)["input_ids"] == [ids.mask]  # their custom, for prompts with a mask


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_loads_as_the_same_tokenizer(made: dict[str, Tokenizer], name: str, tmp_path: Path) -> None:
    made[name].save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "bd3_tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (loaded.fingerprint, loaded.vocab_size, loaded.special) == (
        made[name].fingerprint,
        made[name].vocab_size,
        made[name].special,
    )
    text = " ".join(AWKWARD)
    assert loaded.encode(text).tolist() == made[name].encode(text).tolist()
    assert open_tokenizer(tmp_path / "a").fingerprint == loaded.fingerprint


def test_fingerprints_differ(made: dict[str, Tokenizer]) -> None:
    assert len({tokenizer.fingerprint for tokenizer in made.values()}) == len(made)
    assert all(len(tokenizer.fingerprint) == 64 for tokenizer in made.values())


def letters(folder: Path, *, backwards: bool = False) -> Path:
    """A tokenizer of single letters; backwards has the same size and special ids, and other ids for the letters."""
    vocabulary = {letter: i for i, letter in enumerate("edcba" if backwards else "abcde")} | {"<e>": 5}
    built = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    built.add_special_tokens(["<e>"])
    folder.mkdir(parents=True)
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizers_of_equal_size_are_not_the_same(tmp_path: Path) -> None:
    one, other = open_tokenizer(letters(tmp_path / "a")), open_tokenizer(letters(tmp_path / "b", backwards=True))
    assert (one.vocab_size, one.special) == (other.vocab_size, other.special)
    check_same_tokenizer((one.fingerprint, "a"), (open_tokenizer(letters(tmp_path / "c" / "d")).fingerprint, "d"))
    with pytest.raises(
        TokenizerError, match=f"^a has the tokenizer {one.fingerprint[:16]}, b has {other.fingerprint[:16]}:"
    ):
        check_same_tokenizer((one.fingerprint, "a"), (other.fingerprint, "b"))


def test_a_fingerprint_is_of_what_decides_ids(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    folder = letters(tmp_path / "a")
    before, path = open_tokenizer(folder), folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    end = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    for change in (
        {"decoder": end},
        {"version": "1.0"},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    ):
        path.write_text(json.dumps(spec | change, indent=3))
        assert open_tokenizer(folder).fingerprint == before.fingerprint
    for name, change in (
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("model", spec["model"] | {"vocab": spec["model"]["vocab"] | {"ab": 6}, "merges": [["a", "b"]]}),
    ):
        path.write_text(json.dumps(spec | {name: change}))
        assert open_tokenizer(folder).fingerprint != before.fingerprint
    path.write_text(json.dumps(spec))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>", "bos_token": "a"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_tokenizer(folder).fingerprint != before.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_folder_without_our_record_has_the_same_fingerprint(
    made: dict[str, Tokenizer], name: str, tmp_path: Path
) -> None:
    import transformers

    made[name].save(tmp_path / "a")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "bd3_tokenizer.json").exists()
    assert open_tokenizer(tmp_path / "b").fingerprint == made[name].fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_decoding_may_leave_special_tokens_out(made: dict[str, Tokenizer], name: str) -> None:
    tokenizer = made[name]
    ids = [
        tokenizer.special.bos,
        *tokenizer.encode("some words").tolist(),
        tokenizer.special.eos,
        tokenizer.special.mask,
    ]
    assert tokenizer.decode(ids, skip_special=True) == "some words"
    whole = tokenizer.decode(ids)
    assert whole != "some words" and "some words" in whole
    assert tokenizer.decode([]) == ""


def test_bytes_that_are_no_text_decode_to_the_replacement_sign(made: dict[str, Tokenizer]) -> None:
    assert made["bytes"].decode([0x41, 0xFF, 0x42, 0xE2, 0x96]) == "A\ufffdB\ufffd"
    assert made["bytes"].decode([0x41, 1000]) == "A\ufffd"


def test_the_mask_is_appended_where_a_tokenizer_has_none(tmp_path: Path) -> None:
    folder = byte_level(tmp_path)
    size = len(json.loads((folder / "vocab.json").read_text()))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.special.mask == size and tokenizer.vocab_size == size + 1
    end = json.loads((folder / "vocab.json").read_text())["<|endoftext|>"]
    assert tokenizer.special == SpecialIds(bos=end, eos=end, pad=end, mask=size)


def test_bert_like_tokenizers_lend_their_own_tokens(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "of", "##s", "word"]
    built = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.add_special_tokens(words[:5])
    built.save(str(tmp_path / "tokenizer.json"))
    named = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.special == SpecialIds(bos=2, eos=3, mask=4, pad=0) and tokenizer.vocab_size == 9
    assert tokenizer.encode("the words of").tolist() == [5, 8, 7, 6]


def write_fast(folder: Path, config: dict, extra: tuple[str, ...] = ()) -> Path:
    built = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "<e>": 2, **{t: 3 + i for i, t in enumerate(extra)}}, []))
    built.add_special_tokens(["<e>"])
    folder.mkdir(exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def test_tokenizers_without_what_is_needed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="has neither eos_token nor sep_token, so documents cannot be separated"):
        open_tokenizer(write_fast(tmp_path / "a", {}))
    with pytest.raises(TokenizerError, match=r"holds <\|mask\|> as token 3 but does not declare it"):
        open_tokenizer(write_fast(tmp_path / "b", {"eos_token": "<e>"}, (MASK_TEXT,)))
    with pytest.raises(TokenizerError, match="tokenizer ./nowhere/at/all does not exist; give bytes"):
        open_tokenizer("./nowhere/at/all")
    (tmp_path / "c").mkdir()
    with pytest.raises(TokenizerError, match="cannot be opened .* give bytes, sentencepiece, a .model file"):
        open_tokenizer(tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "d" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(TokenizerError, match=r"vocab.json has no <\|endoftext\|>"):
        open_tokenizer(tmp_path / "d")
    (tmp_path / "d" / "vocab.json").write_text("nonsense")
    with pytest.raises(TokenizerError, match="cannot be read as vocab.json and merges.txt"):
        open_tokenizer(tmp_path / "d")


def test_ids_with_gaps_are_refused() -> None:
    built = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 7, "<e>": 2}, []))
    texts = SpecialTexts(bos="<e>", eos="<e>", pad="<e>", mask=MASK_TEXT)
    with pytest.raises(TokenizerError, match="would get id 3 inside the vocabulary of 8; remove the gaps"):
        with_mask(built.to_str(), texts, has_mask=False, where="t")


def test_a_tokenizer_json_must_hold_its_special_tokens() -> None:
    texts = SpecialTexts(bos="<e>", eos="<e>", pad="<e>", mask=MASK_TEXT)
    built = tokenizers.Tokenizer(models.BPE({"a": 0, "<e>": 1}, []))
    with pytest.raises(TokenizerError, match="^tokenizer t has no mask id; give a tokenizer that has all four"):
        FastTokenizer(built.to_str(), texts, where="t")
    with pytest.raises(TokenizerError, match="tokenizer.json of t cannot be read"):
        FastTokenizer("{}", texts, where="t")
    with pytest.raises(TokenizerError, match="tokenizer.json of t holds no vocabulary"):
        FastTokenizer(tokenizers.Tokenizer(models.BPE()).to_str(), texts, where="t")


@pytest.mark.parametrize("other", ["bos", "eos", "pad"])
def test_a_mask_that_is_another_special_token_is_refused_when_opened(tmp_path: Path, other: str) -> None:
    named = {"eos_token": "<e>", f"{other}_token": "b", "mask_token": "b"}
    with pytest.raises(
        TokenizerError, match=rf"tokenizer {tmp_path}.*: the mask id 1 is also the id of (bos and )?{other}"
    ):
        open_tokenizer(write_fast(tmp_path / "a", named))


@pytest.mark.parametrize("bad", [-1, 9, 1.0, True, "1", [1]])
@pytest.mark.parametrize("name", ["bos", "eos", "mask", "pad"])
def test_special_ids_are_whole_numbers_of_the_vocabulary(name: str, bad: object) -> None:
    sound = {"bos": 0, "eos": 8, "mask": 1, "pad": 8}
    assert SpecialIds.from_dict(sound, 9, "x") == SpecialIds(bos=0, eos=8, mask=1, pad=8)
    with pytest.raises(TokenizerError, match=rf"^x: the {name} id .* is no whole number in \[0, 9\); give a tokenizer"):
        SpecialIds.from_dict(sound | {name: bad}, 9, "x")
    with pytest.raises(TokenizerError, match=f"^x has no {name} id"):
        SpecialIds.from_dict(sound | {name: None}, 9, "x")


def test_ids_that_are_not_stated_are_not_checked() -> None:
    check_special_ids({"mask": 3, "eos": None}, 4, "x")
    with pytest.raises(
        TokenizerError, match="the mask id 3 is also the id of bos and eos; give the mask a token of its own"
    ):
        check_special_ids({"mask": 3, "eos": 3, "bos": 3}, 4, "x")


def test_changed_or_newer_folders_are_refused(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    made["unigram"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    original = path.read_text()
    path.write_text(original.replace('"the"', '"thf"').replace('" the"', '" thf"'))
    sentence = rf"{tmp_path} has the tokenizer \w{{16}}, its own record bd3_tokenizer.json has {made['unigram'].fingerprint[:16]}"
    with pytest.raises(TokenizerError, match=sentence):
        load_tokenizer(tmp_path)
    path.write_text(original)
    record = json.loads((tmp_path / "bd3_tokenizer.json").read_text())
    for name, value in (("vocab_size", None), ("special_ids", record["special_ids"] | {"mask": "x"})):
        (tmp_path / "bd3_tokenizer.json").write_text(json.dumps(record | {name: value}))
        with pytest.raises(
            TokenizerError, match=f"bd3_tokenizer.json says {name}=.* and the tokenizer has .*; restore the"
        ):
            load_tokenizer(tmp_path)
    (tmp_path / "bd3_tokenizer.json").write_text(json.dumps(record))
    path.unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read \(No such file or directory\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "bd3_tokenizer.json").write_text(json.dumps(record | {"version": 3}))
    with pytest.raises(TokenizerError, match="has version 3; this release reads version 2"):
        load_tokenizer(tmp_path)
    for damaged in ({"kind": "slow"}, {"fingerprint": 3}):
        (tmp_path / "bd3_tokenizer.json").write_text(json.dumps(record | damaged))
        with pytest.raises(TokenizerError, match="bd3_tokenizer.json is damaged .kind .*, fingerprint .*; restore the"):
            load_tokenizer(tmp_path)
    (tmp_path / "bd3_tokenizer.json").write_text(json.dumps(record))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(TokenizerError, match="tokenizer_config.json names no eos_token; restore the folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "bd3_tokenizer.json").write_text("[]")
    with pytest.raises(TokenizerError, match="holds no JSON object"):
        load_tokenizer(tmp_path)
    for content in ("{", "[" * 100_000, f'{{"a": {"1" * 5000}}}'):
        (tmp_path / "bd3_tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match="is not JSON"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", NAMES[1:])
def test_cutting_long_texts_changes_no_id(made: dict[str, Tokenizer], name: str) -> None:
    tokenizer = made[name]
    assert isinstance(tokenizer, FastTokenizer)
    for seed, text in enumerate(["".join(noise_texts(120, 5)), english(6000, 6)]):
        pieces = cut_text(text, 300 + seed)
        assert "".join(pieces) == text and len(pieces) > 5
        whole = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
        assert np.concatenate(tokenizer.encode_batch(pieces)).tolist() == whole
        assert tokenizer.encode(text).tolist() == whole


def test_what_may_straddle_a_cut_is_not_cut() -> None:
    def spec(vocabulary: list[str], **changes: object) -> dict:
        return {"model": {"vocab": {word: i for i, word in enumerate(vocabulary)}}, **changes}

    assert is_cuttable(spec(["a", " the", "\u0120of", "\n "]))
    assert not is_cuttable(spec(["of the"]))
    assert not is_cuttable(spec(["of\u2581the"]))
    assert not is_cuttable(spec(["a"], normalizer={"type": "Prepend"}))
    # words are encoded one by one: cutting the text around them gains nothing
    assert not is_cuttable(spec(["a"], pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}))
    assert not is_cuttable(
        spec(["a"], pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]})
    )
    assert is_cuttable(spec(["a"], pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Split"}]}))
    assert not is_cuttable(spec(["a"], pre_tokenizer={"type": "Metaspace"}))
    assert not is_cuttable(spec(["a"], added_tokens=[{"content": "of the"}]))
    assert cut_text("no_cut_here" * 50, 100) == ["no_cut_here" * 50]
