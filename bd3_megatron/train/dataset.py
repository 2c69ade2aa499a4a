"""The data of a run: opened where it is prepared, made under run.dir where the configuration names text.

Rank 0 makes, the others wait; what is made appears whole or not at all, so a broken-off start leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from bd3_megatron.checkpoint.layout import candidates
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import block_sizes
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.mixture import Mixture
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.shards import HEADER_FILE
from bd3_megatron.data.sources import text_source
from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.errors import ConfigError, TokenizerError


@dataclass(frozen=True)
class RunData:
    """What the trainer reads and what the model must know of its ids."""

    train: TokenDataset
    valid: TokenDataset | None
    """Held-out rows in their own order; None where no split was held out."""
    tokenizer_folder: Path
    special: SpecialIds

    @property
    def vocab_size(self) -> int:
        return self.train.vocab_size


def data_folder(config: Config) -> Path:
    """Where the run's prepared data lies or will lie (of a mixture: its first part)."""
    if config.data.path is not None:
        return Path(config.data.path)
    return Path(next(iter(config.data.mixture))) if config.data.mixture else Path(config.run.dir) / "data"


def prepare_text(config: Config, say: Callable[[str], None]) -> None:
    """Make run.dir/data from data.text where neither path nor mixture is given. Called by one rank.

    Raises:
        ConfigError: neither prepared data nor text is named.
        DataError, TokenizerError: the text cannot be read or cut.
    """
    data = config.data
    if data.path is not None or data.mixture:
        return
    # a run that has begun reads what it began with, though the text may be gone or Python's own have changed
    if (data_folder(config) / "train" / HEADER_FILE).is_file() and candidates(Path(config.run.dir) / "checkpoints"):
        return
    if not data.text:
        raise ConfigError("data.path is not set and data.text is empty; name a prepared folder or text files.")
    request = PrepareRequest(
        out=data_folder(config),
        sources={"train": text_source(data.text)},
        tokenizer=data.tokenizer,
        vocab_size=data.tokenizer_vocab_size,
        valid_fraction=data.valid_fraction,
    )
    made = prepare(request, say=say)
    if not made.was_there:
        say(f"prepared {made.num_tokens['train']:,} training tokens in {made.folder}")


def open_data(config: Config) -> RunData:
    """Open the splits. Every rank does.

    Raises:
        DataError: a split is missing or damaged.
        TokenizerError: the model's table is smaller than the tokenizer's vocabulary.
    """
    folder = data_folder(config)
    weights = config.data.mixture
    train = _open(
        config, [Path(p) / "train" for p in weights] or [folder / "train"], tuple(weights.values()), shuffle=None
    )
    valid_folder = folder / "valid"
    valid = _open(config, [valid_folder], (), shuffle=False) if (valid_folder / HEADER_FILE).exists() else None
    given = config.model.vocab_size
    if given is not None and given < train.vocab_size:
        raise TokenizerError(
            f"model.vocab_size={given} is smaller than the tokenizer's {train.vocab_size}; "
            f"use {train.vocab_size} or more, or leave it unset."
        )
    return RunData(train, valid, folder / "tokenizer", train.sources[0].shards.special)


def _open(config: Config, paths: list[Path], weights: tuple[float, ...], *, shuffle: bool | None) -> TokenDataset:
    sizes = block_sizes(config)
    return TokenDataset.open(
        paths,
        seq_len=config.data.seq_len,
        packing=config.data.packing,
        # aligned to the largest block of the curriculum, documents are aligned to all that divide it
        block_size=max(sizes),
        mixture=Mixture.of(weights) if weights else None,
        seed=config.run.seed,
        shuffle=config.data.shuffle if shuffle is None else shuffle,
    )


def prepare_and_open(config: Config, *, rank: int, say: Callable[[str], None]) -> RunData:
    """Rank 0 prepares, all wait, all open. Collective."""
    if rank == 0:
        prepare_text(config, say)
    dist.barrier()
    return open_data(config)
