"""Foreign tokenizers: Hugging Face fast tokenizers from a folder or hub name, and GPT-2's vocab.json + merges.txt.

Decides: the tokenizer.json that `transformers` would run is taken as it is, the mask token appended (id = V, V += 1)
where it has none, so the ids of text are transformers' own.
Refuses: names that resolve to nothing, slow tokenizers without a fast form, vocabularies that already use the mask text.
Costs: imports transformers (seconds), once, in the process that prepares data; workers load the saved folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from bd3_megatron.data.special_ids import MASK_TEXT, SpecialTexts
from bd3_megatron.data.tokenizer_fast import FastTokenizer, with_mask
from bd3_megatron.errors import TokenizerError

_GPT2_END = "<|endoftext|>"
_NAMED = ("bos_token", "eos_token", "cls_token", "sep_token", "mask_token", "pad_token")


def import_tokenizer(name: str) -> FastTokenizer:
    """Import a Hugging Face tokenizer from a local folder or hub name.

    Args:
        name: a folder with tokenizer.json (or vocab.json and merges.txt), or a hub name.

    Returns:
        The tokenizer, with a mask token.

    Raises:
        TokenizerError: see the module's refusals.
    """
    folder = Path(name)
    # GPT-2's two files may come without a tokenizer_config.json, which transformers needs to choose a class.
    has_json = (folder / "tokenizer.json").is_file()
    if not has_json and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_vocab_and_merges(folder)
    # Else a mistyped path is looked up on the hub, and the error speaks of the network.
    if _looks_local(name) and not folder.exists():
        raise TokenizerError(f"tokenizer {name} does not exist; give bytes, a .model file or a tokenizer folder.")
    foreign = _open_with_transformers(name)
    # Slow tokenizers run in Python and have no tokenizer.json that workers could load.
    backend = getattr(foreign, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(f"tokenizer {name} has no fast form (tokenizer.json); convert it with transformers first.")
    named = {key: None if getattr(foreign, key, None) is None else str(getattr(foreign, key)) for key in _NAMED}
    texts = SpecialTexts.choose(named, name)
    clean_up = bool(getattr(foreign, "clean_up_tokenization_spaces", False))
    return with_mask(
        backend.to_str(),
        texts,
        has_mask=named["mask_token"] is not None,
        where=name,
        clean_up=clean_up,
        chat_template=_template_of(foreign),
    )


def _from_vocab_and_merges(folder: Path) -> FastTokenizer:
    """GPT-2's two files, as transformers' GPT2 tokenizer reads them (no prefix space, byte-level, one end token)."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{folder} cannot be read as vocab.json and merges.txt ({error}); fetch it again."
        ) from error
    built = tokenizers.Tokenizer(model)
    if built.token_to_id(_GPT2_END) is None:
        raise TokenizerError(
            f"{folder}/vocab.json has no {_GPT2_END}, so documents cannot be separated; "
            "add a tokenizer.json and tokenizer_config.json that name an eos_token."
        )
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([tokenizers.AddedToken(_GPT2_END, special=True, normalized=True)])
    texts = SpecialTexts(bos=_GPT2_END, eos=_GPT2_END, mask=MASK_TEXT, pad=_GPT2_END)
    return with_mask(built.to_str(), texts, has_mask=False, where=str(folder))


def _template_of(foreign: object) -> str | None:
    """The template that chats get where nobody names another one."""
    given = getattr(foreign, "chat_template", None)
    return given.get("default") if isinstance(given, dict) else given


def _open_with_transformers(name: str) -> object:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # hub, parsing and missing-file errors all differ by version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenizerError(
            f"tokenizer {name} cannot be opened ({reason}); give bytes, sentencepiece, a .model file, a folder with "
            "tokenizer.json, or a hub name that this machine can reach."
        ) from error


def _looks_local(name: str) -> bool:
    # A hub name has at most one slash, as in owner/name.
    return name.startswith((".", "/", "~")) or name.count("/") != 1 and os.sep in name
