"""Batches by index, and a loader that reads them ahead in other processes.

Contract: `TokenDataset.batch_for(index_B)` is a function; prefetching changes when a batch is read, never what is in it.
Refuses: folders that are missing or damaged, and folders whose tokenizers differ inside one mixture.
Costs: 20 to 50 microseconds a row and process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.held_out import check_nothing_leaks, check_read_alike
from bd3_megatron.data.megatron_indexed import open_shards
from bd3_megatron.data.mixture import Mixture
from bd3_megatron.data.order import EpochOrder
from bd3_megatron.data.packing import PackedArrays, PackedRows, rule_of_recipe
from bd3_megatron.data.shards import FileMaps, TokenShards
from bd3_megatron.data.tokenizer_fingerprint import check_same_tokenizer
from bd3_megatron.errors import BD3Error, ConfigError, DataError

# Rows sent between processes at once. One process reads 20 (isolated) to 50 (wrap) million tokens/s at L = 1024 and 3
# to 6 million at L = 128, where the cost of a message would dominate.
_BUNDLE_ROWS = 64


class BatchSource(Protocol):
    """What a loader reads from."""

    def batch_for(self, index_B: Tensor) -> CleanBatch:
        """The rows with these indices in the order of consumption: int64 [B] -> B rows."""


class TokenDataset:
    """Rows of one prepared split, or of a mixture of several, in the order of consumption."""

    def __init__(
        self, sources: Sequence[PackedRows], *, mixture: Mixture | None = None, seed: int = 1, shuffle: bool = True
    ) -> None:
        """Order the rows of sources.

        Args:
            sources: packed splits, all of one sequence length and vocabulary.
            mixture: which source each index takes from; None: there is one source.
            seed: run.seed, for the order.
            shuffle: permute rows anew in every epoch; False for evaluation.

        Raises:
            ConfigError: sources that do not fit together, or weights that are not one each.
        """
        self.sources = tuple(sources)
        self.mixture = _fitting(mixture or Mixture.of([1.0] * len(self.sources)), len(self.sources))
        _check_alike(self.sources)
        # Each source has an order of its own, keyed by its number: equal sources must not run in lockstep.
        self.orders = tuple(
            EpochOrder(num_rows=rows.num_rows, seed=seed, source=number, shuffle=shuffle)
            for number, rows in enumerate(self.sources)
        )

    @staticmethod
    def open(
        path: Path | str | Sequence[Path | str],
        *,
        seq_len: int,
        packing: str = "wrap",
        block_size: int | None = None,
        append_eos: bool | None = None,
        wrap_special: bool | None = None,
        mixture: Mixture | None = None,
        seed: int = 1,
        shuffle: bool = True,
        verify: bool = False,
    ) -> TokenDataset:
        """Open prepared splits.

        Args:
            path: DIR/train or a sibling, the prefix of a megatron indexed dataset, or a list of such.
            seq_len: L.
            packing: wrap, isolated or pad.
            block_size: diffusion block S, for isolated.
            append_eos: end token after every document; None: the recipe's rule, else True.
            wrap_special: rows are BOS + L-2 tokens + EOS; None: the recipe's rule, else False.
            mixture: weights of several paths; None: equal weights.
            seed, shuffle: see `TokenDataset`.
            verify: compare all checksums first.

        Raises:
            DataError: a split is missing, damaged or too small for one row.
            ConfigError: a packing that does not fit, or paths of different tokenizers.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        # One limit for all folders: the descriptors they share are those of the process.
        sources, maps = [], FileMaps()
        for one in paths:
            shards = open_shards(one, verify=verify, maps=maps)
            rule = rule_of_recipe(
                shards.packing_rule,
                seq_len=seq_len,
                mode=packing,
                block_size=block_size,
                append_eos=append_eos,
                wrap_special=wrap_special,
            )
            sources.append(PackedRows(shards, rule))
        return TokenDataset(sources, mixture=mixture, seed=seed, shuffle=shuffle)

    def mixed(self, mixture: Mixture) -> TokenDataset:
        """The same rows in another mixture.

        Raises:
            ConfigError: weights that are not one each.
        """
        # A shallow copy shares the memory maps and the packing tables; only the weights differ.
        other = copy.copy(self)
        other.mixture = _fitting(mixture, len(self.sources))
        return other

    @property
    def num_rows(self) -> int:
        """Rows of all sources; one epoch where there is one source."""
        return sum(rows.num_rows for rows in self.sources)

    @property
    def vocab_size(self) -> int:
        return self.sources[0].shards.vocab_size

    @property
    def utilisation(self) -> float:
        """Share of positions with loss over all rows."""
        return sum(rows.utilisation * rows.num_rows for rows in self.sources) / self.num_rows

    def batch_for(self, index_B: Tensor) -> CleanBatch:
        """Rows by their index in the order of consumption.

        Args:
            index_B: int64 [B], 0 or more; beyond one epoch the next one begins.

        Returns:
            A batch of B rows of L tokens.

        Raises:
            DataError: a shard turns out damaged.
        """
        index = index_B.numpy().astype(np.int64, copy=False)
        source, count = self.mixture.locate(index)
        parts: list[tuple[np.ndarray, PackedArrays]] = []
        # Rows are read source by source, then put back in the order of their indices: the batch must not depend on how
        # the mixture groups them.
        for number in np.unique(source).tolist():
            chosen = np.flatnonzero(source == number)
            rows = self.orders[number].row_ids(torch.from_numpy(count[chosen])).numpy()
            parts.append((chosen, self.sources[number].read(rows)))
        gathered = _gather(parts, len(index))
        return batch_of(gathered, index_B.to(torch.int64))


def batch_of(arrays: PackedArrays, index_B: Tensor) -> CleanBatch:
    """The batch of packed rows."""
    optional = [None if array is None else torch.from_numpy(array) for array in arrays[1:]]
    return CleanBatch(
        tokens_BL=torch.from_numpy(arrays.tokens_BL),
        index_B=index_B,
        document_id_BL=optional[0],
        is_padding_BL=optional[1],
        position_BL=optional[2],
        is_fill_BL=optional[3],
        is_supervised_BL=optional[4],
    )


class BatchLoader:
    """Iterates over the batches of a sequence of indices, reading ahead."""

    def __init__(
        self,
        source: BatchSource,
        indices: Iterable[Tensor],
        *,
        num_workers: int = 0,
        prefetch: int = 4,
    ) -> None:
        """Prepare to iterate; processes start with the iteration.

        Args:
            source: a dataset.
            indices: int64 [B] tensors, finite or endless; with processes they are taken ahead of the batches.
            num_workers: loader processes; 0 reads in this process.
            prefetch: bundles of some 64 rows each process keeps ready.

        Raises:
            ConfigError: a negative number of processes.
        """
        if num_workers < 0:
            raise ConfigError(f"num_workers={num_workers} is negative; use 0 or more loader processes.")
        self._source, self._indices, self._num_workers = source, indices, num_workers
        self._prefetch = prefetch

    def __iter__(self) -> Iterator[CleanBatch]:
        # The same source serves both paths, so the number of loader processes, ranks and restarts cannot show in the
        # data.
        if self._num_workers == 0:
            for index_B in self._indices:
                yield self._source.batch_for(index_B)
            return
        try:
            yield from self._read_ahead()
        except RuntimeError as error:
            # torch reports a killed worker as a bare RuntimeError, which only its text tells from any other.
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"a loader process ended unexpectedly ({str(error).splitlines()[0]}); "
                "look for memory pressure or set data.num_workers=0."
            ) from error

    def _read_ahead(self) -> Iterator[CleanBatch]:
        loader = DataLoader(
            _Bundled(self._source),
            sampler=_Bundles(self._indices),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch,
            # Forked processes inherit the open dataset at no cost; they must never touch a GPU, whose context does not
            # survive a fork.
            multiprocessing_context="fork",
        )
        for sizes, outcome in loader:
            if isinstance(outcome, BD3Error):
                raise outcome
            start = 0
            # A bundle holds several batches; their sizes travel with it, since the last batch may be short.
            for size in sizes:
                yield outcome.rows(start, start + size)
                start += size


class _Bundled(Dataset):  # type: ignore[type-arg]
    """Adapter: torch's loader asks a dataset by key, and the key is a bundle of index tensors."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    def __getitem__(self, bundle: list[Tensor]) -> tuple[list[int], CleanBatch | BD3Error]:
        try:
            return [len(index_B) for index_B in bundle], self._source.batch_for(torch.cat(bundle))
        except BD3Error as error:
            # Raised in the worker it would come back with a traceback for its message.
            return [], error


class _Bundles(Sampler):  # type: ignore[type-arg]
    """Adapter: consecutive index tensors bundled to some 64 rows, since sending a batch costs more than reading one."""

    def __init__(self, indices: Iterable[Tensor]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[Tensor]]:
        bundle: list[Tensor] = []
        for index_B in self._indices:
            bundle.append(index_B)
            if sum(map(len, bundle)) >= _BUNDLE_ROWS:
                yield bundle
                bundle = []
        if bundle:
            yield bundle


def _fitting(mixture: Mixture, num_sources: int) -> Mixture:
    if mixture.num_sources != num_sources:
        raise ConfigError(f"the mixture has {mixture.num_sources} weights for {num_sources} sources; give one each.")
    return mixture


def check_held_out(held_out: TokenShards, trained: Sequence[TokenShards]) -> None:
    """Refuse held-out rows that say nothing about what is trained on.

    Args:
        held_out: the split that is evaluated.
        trained: the splits that are trained on.

    Raises:
        TokenizerError: another tokenizer made it.
        ConfigError: its documents may stand in the training text too, whole or as parts of others.
    """
    for shards in trained:
        check_same_tokenizer(
            (held_out.tokenizer_fingerprint, held_out.where), (shards.tokenizer_fingerprint, shards.where)
        )
    fractions = [(shards.where, shards.held_out_fraction) for shards in trained]
    # Documents are held out by their content: a folder with at least the same fraction holds out these documents too.
    check_nothing_leaks(fractions, (held_out.where, held_out.held_out_fraction))
    # A held-out text of its own says nothing about others.
    if held_out.held_out_fraction:
        for shards in trained:
            check_read_alike((shards.where, shards.source), (held_out.where, held_out.source))


# Different lengths cannot be stacked to one batch, and ids of different tokenizers mean different text.
def _check_alike(sources: Sequence[PackedRows]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if other.rule.seq_len != first.rule.seq_len or other.rule.mode != first.rule.mode:
            raise ConfigError(
                f"{other.shards.where} is packed as {other.rule.mode} of {other.rule.seq_len}, {first.shards.where} as "
                f"{first.rule.mode} of {first.rule.seq_len}; use one packing and seq_len in a mixture."
            )
        prints = [(rows.shards.tokenizer_fingerprint, rows.shards.where) for rows in (other, first)]
        check_same_tokenizer(prints[0], prints[1])


def _gather(parts: list[tuple[np.ndarray, PackedArrays]], size: int) -> PackedArrays:
    """Put rows of several sources in the order of their indices."""
    # One source is the common case: its rows are in order already and need no copy.
    if len(parts) == 1:
        return parts[0][1]
    # beside a source of answers, of plain text everything is predicted
    if any(arrays.is_supervised_BL is not None for _, arrays in parts):
        parts = [(chosen, _all_supervised(arrays)) for chosen, arrays in parts]
    columns: list[np.ndarray | None] = []
    for column, first in enumerate(parts[0][1]):
        if first is None:
            columns.append(None)
            continue
        whole = np.empty((size, *first.shape[1:]), dtype=first.dtype)
        for chosen, arrays in parts:
            whole[chosen] = arrays[column]
        columns.append(whole)
    return PackedArrays._make(columns)


def _all_supervised(arrays: PackedArrays) -> PackedArrays:
    if arrays.is_supervised_BL is not None:
        return arrays
    return arrays._replace(is_supervised_BL=np.ones(arrays.tokens_BL.shape, dtype=np.bool_))
