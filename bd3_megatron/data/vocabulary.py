"""Where a run's prepared data lies and how many ids it has, asked before anything is loaded. Torch-free."""

from __future__ import annotations

from pathlib import Path

from bd3_megatron.config.schema import Config
from bd3_megatron.data.prepare import TRAINED_TOKENIZERS
from bd3_megatron.data.shard_header import HEADER_FILE, read_header
from bd3_megatron.data.tokenizer_bytes import ByteTokenizer

TOKENIZER_COPY = "tokenizer"
"""Under run.dir: the run's own copy of its tokenizer, so that an export needs no data."""


def data_folder(config: Config) -> Path:
    """Where the run's prepared data lies or will lie: of a mixture without path, its first part."""
    if config.data.path is not None:
        return Path(config.data.path)
    folders = config.data.mixed_folders
    return Path(folders[0]) if folders else Path(config.run.dir) / "data"


def vocabulary_size(config: Config) -> int | None:
    """Number of ids, mask included; None where only data that is not there yet can say.

    Args:
        config: model.vocab_size wins, then the prepared data's header, then the tokenizer that `data.text` would get.

    Raises:
        DataError: the prepared data's header is damaged.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    # Prepared data wins over the tokenizer's setting: its ids are the ones that the model will read.
    if (data_folder(config) / "train" / HEADER_FILE).is_file():
        return read_header(data_folder(config) / "train").vocab_size
    if config.data.text and config.data.tokenizer in TRAINED_TOKENIZERS:
        return config.data.tokenizer_vocab_size
    if config.data.text and config.data.tokenizer == ByteTokenizer.kind:
        return ByteTokenizer().vocab_size
    return None
