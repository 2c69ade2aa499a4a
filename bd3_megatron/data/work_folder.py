"""The folder in which a prepared folder comes to be: `.NAME.partial` beside it, restartable, published by one rename.

Contract: finished parts stay until the folder is published, whatever goes wrong; a run with the same settings goes on with
those whose text did not change. Refuses: a second process, and other settings while finished parts are there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bd3_megatron.data.part_maker import RECORD_FILE, PartRecord, part_folder
from bd3_megatron.data.shard_header import ShardRecord
from bd3_megatron.data.shards import SHARD_SUFFIXES, SUPERVISED_SUFFIX
from bd3_megatron.data.source import PartTask
from bd3_megatron.errors import ConfigError, DataError, counted
from bd3_megatron.files import discard, move, read_json, read_json_list, remove_leftovers, write_json
from bd3_megatron.lease import held

MANIFEST_FILE = "prepare.json"


class WorkFolder:
    """One half becomes the prepared folder, the other holds settings, finished parts and what was learnt on the way."""

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        # Beside the target, so that both are on one file system and a rename publishes.
        self.root = self.out.with_name(f".{self.out.name}.partial")
        self.data, self.work = self.root / "data", self.root / "work"
        self._settings, self._order = self.work / "plan.json", self.work / "order.json"
        self._made: list[Path] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out, of this machine or another.

        Raises:
            FolderHeldError: another process is preparing the same folder.
            LaunchError: the folder cannot be written.
        """
        # Remembered before anything is made, so that a refused run leaves no empty parents behind.
        self._made = [p for p in (self.root, *self.root.parents) if not p.exists()]
        with held(self.root, name=f"out={self.out}"):
            yield

    def begin(self, settings: dict[str, Any]) -> bool:
        """Set the folder up; True where an earlier run with these settings goes on.

        Raises:
            ConfigError: an earlier run with other settings has finished parts here.
        """
        if self._settings.is_file() and is_written(self._settings, settings):
            self._take_back()
            # Half-written parts of a killed run; the lease says that nobody writes them now.
            remove_leftovers(self.work / "parts")
            # This folder is published as it stands. Workers never write here, and no other run does under the lease.
            remove_leftovers(self.data, no_writers=True)
            for split in filter(Path.is_dir, self.data.iterdir()):
                remove_leftovers(split, no_writers=True)
            return True
        finished = self.num_finished()
        # Finished parts may be days of work: they are never removed without being asked.
        if finished:
            raise ConfigError(
                f"{self.root} holds {counted(finished, 'finished part')} of a run with other settings; run that command again, "
                "remove the folder, or name another --out."
            )
        for folder in (self.data, self.work):
            shutil.rmtree(folder, ignore_errors=True)
        (self.work / "parts").mkdir(parents=True)
        self.data.mkdir()
        write_json(self._settings, settings)
        return False

    def num_finished(self) -> int:
        """Parts that are kept."""
        return sum(1 for _ in (self.work / "parts").glob(f"*/{RECORD_FILE}"))

    def publish(
        self, tasks: Sequence[PartTask], records: Mapping[PartTask, PartRecord], headers: Mapping[str, Any]
    ) -> None:
        """Give the parts their final names and the folder its own.

        Args:
            tasks: all parts in order.
            records: of each.
            headers: content of each file beside the shards, by path inside the folder.
        """
        # Killed from here on, the next run finds in this list whose part each file is.
        write_json(self._order, [task.stem for task in tasks])
        for number, task in enumerate(tasks):
            for split, record in records[task].shards.items():
                (self.data / split).mkdir(exist_ok=True)
                supervised = () if record.sup_sha256 is None else (SUPERVISED_SUFFIX,)
                for suffix in (*SHARD_SUFFIXES, *supervised):
                    move(
                        part_folder(self.work, task) / f"{split}{suffix}",
                        self.data / split / f"{shard_name(number)}{suffix}",
                    )
        for name, content in headers.items():
            write_json(self.data / name, content)
        # A user may have made the empty folder; a rename needs the name to be free.
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()
        move(self.data, self.out)
        self._discard()

    def remove(self) -> None:
        """Leave nothing behind, not even folders made on the way."""
        self._discard()
        for folder in self._made[1:]:
            try:
                folder.rmdir()
            except OSError:
                return

    def _discard(self) -> None:
        # By one rename first: a heartbeat that misses its lease writes it anew, and would do so into a folder half deleted.
        with suppress(OSError):
            discard(self.root)
        # what a run that was killed here had renamed
        if self.out.parent.is_dir():
            remove_leftovers(self.out.parent)

    def _take_back(self) -> None:
        """Undo the renaming of a run that was killed while it published."""
        if not self._order.is_file():
            return
        # A killed publication may have renamed some files only; each goes back to the part it came from.
        stems = dict(enumerate(read_json_list(self._order, f"remove {self.root} and prepare the data again")))
        for path in sorted(self.data.glob("*/part-*")):
            number = path.stem.removeprefix("part-")
            stem = stems.get(int(number)) if number.isdecimal() else None
            if not isinstance(stem, str):
                raise DataError(
                    f"{self._order} names no part of {path}; remove {self.root} and prepare the data again."
                )
            move(path, self.work / "parts" / stem / f"{path.parent.name}{path.suffix}")
        self._order.unlink()


def shard_name(number: int) -> str:
    """Final name of a part's shards."""
    return f"part-{number:05d}"


def named_shards(
    tasks: Sequence[PartTask], records: Mapping[PartTask, PartRecord], split: str
) -> tuple[ShardRecord, ...]:
    """The shards of a split under their final names."""
    return tuple(
        replace(records[task].shards[split], name=shard_name(number))
        for number, task in enumerate(tasks)
        if split in records[task].shards
    )


def is_written(path: Path, content: dict[str, Any]) -> bool:
    """Whether a file holds this JSON."""
    written = read_json(path, "remove the folder and prepare the data again")
    # Through JSON on both sides: tuples become lists and keys become texts.
    return json.dumps(written, sort_keys=True) == json.dumps(json.loads(json.dumps(content)), sort_keys=True)
