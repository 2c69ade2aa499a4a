"""Save the whole state of a run so that a checkpoint is there completely or not at all.

Contract: every rank writes its own files into a temporary folder and ends with a sidecar that lists them with checksums;
rank 0, once all sidecars are there, writes the manifest, renames the folder and then points LATEST at it. A save that
fails anywhere fails on every rank with the same sentence and touches nothing that was published before.
Costs: synchronous, the time of writing; asynchronous, one host copy of the rank's state.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_megatron.checkpoint import agree
from bd3_megatron.checkpoint.describe import describe_run
from bd3_megatron.checkpoint.files import check_space
from bd3_megatron.checkpoint.layout import TEMPORARY_PREFIX, rank_name, step_name
from bd3_megatron.checkpoint.publish import delete_old, publish, sweep
from bd3_megatron.checkpoint.record import RankRecord, record_rank
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import CheckpointError, FileError
from bd3_megatron.files import write_bytes

if TYPE_CHECKING:
    from bd3_megatron.engine.zero_engine import ZeroEngine

Warn = Callable[[str], None]


def save(
    engine: ZeroEngine,
    checkpoints_dir: Path,
    *,
    step: int,
    samples_consumed: int,
    config: Config,
    train_state: dict[str, Any],
    evaluation: dict[str, Any] | None = None,
) -> Path:
    """Save now. Collective over all ranks; returns when the checkpoint is published.

    Args:
        engine: between two steps.
        checkpoints_dir: RUN_DIR/checkpoints, on a file system that all ranks see.
        step: optimizer updates done.
        samples_consumed: position in the order of data.
        config: the run; its checkpoint section says what is kept.
        train_state: what the trainer must remember; plain JSON.
        evaluation: how likelihood is measured; plain JSON. None: the defaults.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank, when any of them failed. Earlier checkpoints are as they were.
    """
    saver = Saver(engine, checkpoints_dir, asynchronous=False)
    saver.save(
        step=step, samples_consumed=samples_consumed, config=config, train_state=train_state, evaluation=evaluation
    )
    saver.finish()
    return checkpoints_dir / step_name(step)


class Saver:
    """Saves checkpoints of one run, one after another. All methods are collective over all ranks.

    Args:
        engine: what is saved.
        checkpoints_dir: RUN_DIR/checkpoints.
        asynchronous: write while the next steps run.
        warn: told, on rank 0, when a save failed.
        write_timeout_seconds: how long rank 0 waits for the other ranks' files.
    """

    def __init__(
        self,
        engine: ZeroEngine,
        checkpoints_dir: Path,
        *,
        asynchronous: bool,
        warn: Warn | None = None,
        write_timeout_seconds: float = 1800.0,
    ) -> None:
        self._engine = engine
        self._folder = checkpoints_dir
        self._asynchronous = asynchronous
        self._warn = warn
        self._timeout = write_timeout_seconds
        self._thread: threading.Thread | None = None
        # set where another rank failed, so that rank 0's thread waits no longer for its files
        self._given_up = threading.Event()
        self._failure: str | None = None
        self._is_first = agree.rank_and_size()[0] == 0

    def save(
        self,
        *,
        step: int,
        samples_consumed: int,
        config: Config,
        train_state: dict[str, Any],
        evaluation: dict[str, Any] | None = None,
        finite_step: int | None = None,
    ) -> None:
        """Start a save (and, when synchronous, complete it); first waits for the one in flight.

        A failure is told to `warn` and kept for `finish`; it does not stop the training. The newest checkpoint up to
        `finite_step` is not deleted, whatever the configuration says.
        """
        # At most one save in flight: two would need two copies of the state in host memory.
        self._complete()
        manifest = describe_run(
            self._engine,
            config,
            step=step,
            samples_consumed=samples_consumed,
            train_state=train_state,
            evaluation=evaluation or {},
        )
        # One name for all ranks: each writes its own files into the same folder.
        temporary = self._folder / f"{TEMPORARY_PREFIX}{step_name(step)}"
        if not self._agreed(lambda: _free_space(self._folder, temporary), only_first=True):
            return
        # Before the space is checked, since only the collected state tells its size; nothing is written yet.
        record = record_rank(self._engine, temporary, copied=self._asynchronous)
        # ranks of one node share its disk, and so may all of them: the sum is what must fit
        needed = sum(agree.gathered(record.num_bytes()))
        if not self._agreed(lambda: check_space(self._folder, needed), only_first=True):
            return

        def finish() -> None:
            # Retention comes after publishing only: a failed save deletes nothing.
            published = publish(temporary, manifest, timeout_seconds=self._timeout, given_up=self._given_up)
            keep = config.checkpoint
            delete_old(
                published,
                keep_last=keep.keep_last,
                keep_every_steps=keep.keep_every_steps,
                finite_step=finite_step,
            )

        if not self._asynchronous:
            # Agreed before rank 0 looks for the others' files: it would wait for one that never comes.
            if self._agreed(lambda: _write(temporary, record)):
                self._agreed(finish, only_first=True)
            return

        def work_and_remember() -> None:
            # No collective in the thread: the ranks agree on the failure when the main threads meet in _complete.
            self._failure = _attempt(lambda: _write(temporary, record))
            if self._failure is None and self._is_first:
                self._failure = _attempt(finish)

        self._given_up.clear()
        # A daemon: a process that is told to end does not wait for the disk; what it leaves is swept at the next save.
        self._thread = threading.Thread(target=work_and_remember, name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError: the latest save failed; on every rank.
        """
        self._complete()
        if self._failure is not None:
            raise CheckpointError(self._failure)

    def _agreed(self, action: Callable[[], object], *, only_first: bool = False) -> bool:
        """Run `action` here (or on rank 0 only); True when it failed nowhere. Collective."""
        mine = None if only_first and not self._is_first else _attempt(action)
        self._settle(mine)
        return self._failure is None

    def _complete(self) -> None:
        """Join the save in flight; whether there is one is the same on every rank."""
        if self._thread is not None:
            # Rank 0's thread waits for the others' files: they end theirs first, and it is told of a failure.
            if not self._is_first:
                self._thread.join()
            failure = agree.first_failure(self._failure)
            if failure is not None:
                self._given_up.set()
            self._thread.join()
            self._thread = None
            self._settle(failure or self._failure)

    def _settle(self, mine: str | None) -> None:
        self._failure = agree.first_failure(mine)
        if self._failure is not None and self._warn is not None and self._is_first:
            self._warn(self._failure)


def _attempt(action: Callable[[], object]) -> str | None:
    """Run it; the reason when it failed. A rank must not leave its fellows waiting in a collective."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    except FileError as error:
        # it names the file, the system's reason and the remedy
        return f"{str(error).rstrip('.')}; earlier checkpoints are intact."
    except Exception as error:  # noqa: BLE001 - whatever went wrong, the other ranks must be told
        return f"the checkpoint could not be written ({type(error).__name__}: {error}); earlier ones are intact."
    return None


def _free_space(folder: Path, temporary: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # A killed save's folder may hold the very space that this one needs.
    sweep(folder)
    temporary.mkdir()


def _write(temporary: Path, record: RankRecord) -> None:
    """Write this rank's files, and the sidecar that says so."""
    try:
        content = record.sidecar(record.write(temporary))
    except Exception as error:
        # Behind the training rank 0 looks for this sidecar: it ends at once where the disk still takes so much.
        with contextlib.suppress(FileError):
            write_bytes(temporary / rank_name(record.rank), record.failed_sidecar(error))
        raise
    write_bytes(temporary / rank_name(record.rank), content)
