"""Training directly from a stream that is too big to shard first: rows by index, tokenised in loader processes.

Contract: the stream's files are dealt to N stream shards; sample i is row i div N of stream shard i mod N. A sample is
the same for every number of ranks, loader processes and restarts.
Refuses: a saved state of another stream or plan, indices before it, streams without text, processes that died (by name).
Costs: tokenisation speed of the processes (about 1 million tokens/s each).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.loader import batch_of
from bd3_megatron.data.packing import PackedArrays, PackingRule
from bd3_megatron.data.stream_shard import StreamPlan, StreamShard, StreamShardState, shard_states
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.errors import BD3Error, ConfigError, DataError

# Stream shards by default. A rank whose samples touch a stream shard without owning all its rows tokenises the rows of
# the others too, so their number should be a multiple of dp * micro_batch_size where files allow.
_MOST_SHARDS = 64
_POLL_SECONDS = 2.0

NumberedRows = list[tuple[int, PackedArrays]]
"""Rows of one batch: number of the row in the batch, arrays of shape [L]."""


def plan_stream(
    dataset: HubDataset,
    tokenizer_folder: Path,
    rule: PackingRule,
    *,
    num_shards: int | None = None,
    shuffle_rows: int,
    seed: int = 1,
    detokenizer: str = "none",
    held_out_fraction: float = 0.0,
) -> StreamPlan:
    """Decide how a stream is read.

    Args:
        dataset: where the text comes from; read as a stream.
        tokenizer_folder: as written by `Tokenizer.save`.
        rule: how documents become rows.
        num_shards: None: one a file, at most 64.
        shuffle_rows: rows of a stream shard permuted together.
        seed: run.seed.
        detokenizer: see detokenizers.
        held_out_fraction: of the prepared folder whose held-out rows are evaluated; its documents are left out.

    Raises:
        ConfigError: more stream shards than files, or an empty window.
        DataError: the stream cannot be opened, or has no such column.
    """
    dataset = replace(dataset, streaming=True)
    # Refused here, when the stream is planned, and not by the first batch of a loader process.
    dataset.check_columns()
    files = int(dataset.open().num_shards)
    shards = min(files, _MOST_SHARDS) if num_shards is None else num_shards
    # A file belongs to one stream shard: with more of them than files some would have no text.
    if not 1 <= shards <= files:
        raise ConfigError(
            f"num_shards={shards} is outside [1, {files}], the files of {dataset.path}; use {files} or fewer."
        )
    if shuffle_rows < 1:
        raise ConfigError(f"shuffle_rows={shuffle_rows} is empty; use 1 (no shuffling) or more.")
    return StreamPlan(
        dataset=dataset,
        tokenizer_folder=tokenizer_folder,
        rule=rule,
        num_shards=shards,
        shuffle_rows=shuffle_rows,
        seed=seed,
        detokenizer=detokenizer,
        held_out_fraction=held_out_fraction,
    )


class StreamLoader:
    """Iterates over the batches of a rank's indices."""

    def __init__(
        self,
        plan: StreamPlan,
        indices: Callable[[], Iterable[Tensor]],
        *,
        num_workers: int = 0,
        prefetch: int = 8,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare to iterate.

        Args:
            plan: from `plan_stream`.
            indices: gives int64 [B] tensors, increasing, the same at every call; every process calls it.
            num_workers: loader processes; 0 tokenises in this process.
            prefetch: batches each process keeps ready.
            state: from `state_dict`, merged over ranks; None: the stream's beginning.

        Raises:
            DataError: the state belongs to another plan.
        """
        self._plan, self._indices = plan, indices
        self._num_workers, self._prefetch = num_workers, prefetch
        # The identity is stored with the state, so that a resume under another plan is refused and not silently
        # different.
        self._identity = _identity(plan)
        self._states = _checked_states(self._identity, state)

    def __iter__(self) -> Iterator[CleanBatch]:
        # Workers return rows in their own order; the row number restores the order of the batch.
        work = self._read_here() if self._num_workers == 0 else self._read_ahead()
        for index_B, rows in work:
            yield batch_of(_stack([arrays for _, arrays in sorted(rows, key=lambda row: row[0])]), index_B)

    def state_dict(self) -> dict[str, Any]:
        """Positions of this rank's stream shards after the last batch that was yielded; JSON."""
        return {
            **self._identity,
            "shards": {str(shard): state.as_dict() for shard, state in sorted(self._states.items())},
        }

    def _read_here(self) -> Iterator[tuple[Tensor, NumberedRows]]:
        shards = _StreamShards(self._plan, self._states, range(self._plan.num_shards))
        for index_B in self._indices():
            rows, states = shards.read(index_B)
            self._states |= states
            yield index_B, rows

    def _read_ahead(self) -> Iterator[tuple[Tensor, NumberedRows]]:
        # More processes than stream shards would have nothing to read.
        workers = _Workers(self._plan, self._states, self._indices, min(self._num_workers, self._plan.num_shards))
        try:
            workers.start(self._prefetch)
            for index_B in self._indices():
                rows: NumberedRows = []
                # The state advances only with batches that were yielded; batches read ahead are read again after a
                # resume.
                for worker in workers.wanted(index_B):
                    some, states = workers.receive(worker)
                    self._states |= states
                    rows += some
                yield index_B, rows
        finally:
            # Also runs when the consumer abandons the iterator; else the processes would outlive the loader.
            workers.stop()


class _StreamShards:
    """The stream shards that one process reads."""

    def __init__(self, plan: StreamPlan, states: Mapping[int, StreamShardState], own: Iterable[int]) -> None:
        self._plan, self._states, self._own = plan, dict(states), frozenset(own)
        self._shards: dict[int, StreamShard] = {}

    def read(self, index_B: Tensor) -> tuple[NumberedRows, dict[int, StreamShardState]]:
        """Own rows of a batch, and the states of their stream shards after it."""
        rows: NumberedRows = []
        states: dict[int, StreamShardState] = {}
        for row, index in enumerate(index_B.tolist()):
            number, shard = divmod(index, self._plan.num_shards)
            if shard not in self._own:
                continue
            # Opened at first use: a rank opens only the stream shards that its samples touch.
            if shard not in self._shards:
                self._shards[shard] = StreamShard(self._plan, shard, self._states.get(shard))
            rows.append((row, self._shards[shard].row(number)))
            states[shard] = self._shards[shard].state_before(number + 1)
        return rows, states


class _Workers:
    """Loader processes; process w reads stream shards w, w + W, ... and sends its rows of each batch in order."""

    def __init__(
        self,
        plan: StreamPlan,
        states: Mapping[int, StreamShardState],
        indices: Callable[[], Iterable[Tensor]],
        size: int,
    ) -> None:
        self._plan, self._states, self._indices, self._size = plan, states, indices, size
        self._processes: list[Any] = []
        self._queues: list[Any] = []

    def start(self, prefetch: int) -> None:
        # Forked, not spawned: the opened dataset and `indices` are inherited and need not be pickled.
        context = multiprocessing.get_context("fork")
        for worker in range(self._size):
            ready = context.Queue(maxsize=prefetch)
            shards = _StreamShards(self._plan, self._states, range(worker, self._plan.num_shards, self._size))
            process = context.Process(target=_produce, args=(shards, self._indices, ready, os.getpid()), daemon=True)
            process.start()
            self._queues.append(ready)
            self._processes.append(process)

    def wanted(self, index_B: Tensor) -> list[int]:
        """Processes that hold rows of a batch."""
        return sorted({index % self._plan.num_shards % self._size for index in index_B.tolist()})

    def receive(self, worker: int) -> tuple[NumberedRows, dict[int, StreamShardState]]:
        while True:
            try:
                outcome = self._queues[worker].get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                # A killed process sends no error; without this check the rank would wait for ever.
                code = self._processes[worker].exitcode
                if code is not None:
                    raise DataError(
                        f"stream process {worker} ended with exit code {code}; look for memory pressure, or set "
                        "data.num_workers=0 to see its error here."
                    ) from None
        if isinstance(outcome, BD3Error):
            raise outcome
        rows: tuple[NumberedRows, dict[int, StreamShardState]] = outcome
        return rows

    def stop(self) -> None:
        for process in self._processes:
            # All are told before any is waited for, so that the waits overlap.
            process.terminate()
        for process, ready in zip(self._processes, self._queues, strict=True):
            process.join()
            ready.close()
            ready.cancel_join_thread()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of all data-parallel ranks: of each stream shard, the one that is furthest.

    All ranks must have consumed the same steps; then no sample still to come lies before the furthest state.
    """
    merged = dict(states[0])
    shards: dict[str, Any] = {}
    for state in states:
        for shard, record in state["shards"].items():
            # A rank that did not touch the stream shard lately still holds an older state of it.
            if shard not in shards or record["window"] > shards[shard]["window"]:
                shards[shard] = record
    return merged | {"shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}


def _produce(shards: _StreamShards, indices: Callable[[], Iterable[Tensor]], ready: Any, parent: int) -> None:
    import torch

    # The parent's threads do not exist here, and a pool of them would wait for ever.
    torch.set_num_threads(1)
    try:
        for index_B in indices():
            rows, states = shards.read(index_B)
            if rows and not _handed_over(ready, (rows, states), parent):
                return
    except BD3Error as error:
        _handed_over(ready, error, parent)


def _handed_over(ready: Any, outcome: object, parent: int) -> bool:
    """Wait until the queue takes the rows; False when the parent is gone, which no full pipe would ever tell."""
    while os.getppid() == parent:
        try:
            ready.put(outcome, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    ready.cancel_join_thread()
    return False


def _identity(plan: StreamPlan) -> dict[str, Any]:
    """All that decides the rows but the path of the files, which may move: JSON."""
    dataset = plan.dataset
    stated = {
        "num_shards": plan.num_shards,
        "num_files": int(dataset.open().num_shards),
        "shuffle_rows": plan.shuffle_rows,
        **{name: getattr(dataset, name) for name in ("name", "split", "column", "data_files", "revision")},
        "filters": [asdict(one) for one in dataset.filters],
        "detokenizer": plan.detokenizer,
        "held_out_fraction": plan.held_out_fraction,
        "seed": plan.seed,
        "tokenizer": load_tokenizer(plan.tokenizer_folder).fingerprint,
        **asdict(plan.rule),
    }
    # tuples become lists, as they do in a checkpoint
    plain: dict[str, Any] = json.loads(json.dumps(stated))
    return plain


def _checked_states(identity: Mapping[str, Any], state: Mapping[str, Any] | None) -> dict[int, StreamShardState]:
    if state is None:
        return {}
    for name, value in identity.items():
        if state.get(name) != value:
            raise DataError(
                f"the saved stream state has {name}={state.get(name)}, the run has {value}; "
                f"resume with {name}={state.get(name)}."
            )
    return shard_states(state["shards"])


def _stack(rows: list[PackedArrays]) -> PackedArrays:
    columns: list[np.ndarray | None] = []
    for column, first in enumerate(rows[0]):
        columns.append(None if first is None else np.stack([np.asarray(row[column]) for row in rows]))
    return PackedArrays._make(columns)
