"""Where numbers go: metrics.jsonl is the record; the console, wandb and TensorBoard mirror it.

Decides: rank 0 alone writes; every record is one flushed line with its `step`; a mirror that fails says so once and is
left out, it never stops training. On resuming, the record is first cut to its complete lines up to the resumed step, so
that each step stands in it once.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from bd3_megatron.checkpoint.describe import source_commit
from bd3_megatron.config.load import to_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import FileError
from bd3_megatron.files import disk_errors, json_record, write_bytes

Values = Mapping[str, Any]


class Mirror(Protocol):
    """A second place for records."""

    def write(self, record: Values) -> None:
        """Take one record; may raise anything."""

    def cut(self, step: int) -> None:
        """Hide what was said of later steps, where its kind can; may raise anything."""

    def close(self) -> None:
        """Flush and end."""


class Record:
    """metrics.jsonl of a run."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open for appending, after cutting to what a run resumed at `resumed_step` has already said."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut_record(path, resumed_step)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def cut(self, step: int) -> None:
        """Forget what was said of later steps, which will be made again."""
        self._file.close()
        cut_record(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, record: Values) -> None:
        """One line, flushed, so that a killed run loses nothing it has said."""
        with disk_errors(f"writing {self._path}", "free some space, then run the same command again", kind=FileError):
            self._file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut_record(path: Path, step: int) -> None:
    """Keep complete lines whose step is at most `step`; the file is replaced whole.

    Of step 0, which a run that starts anew evaluates once more, only the events stay.
    """
    kept = []
    # The last element is empty, or a line that a killed process did not finish.
    for line in path.read_bytes().split(b"\n")[:-1]:
        record = json_record(line)
        at = None if record is None else record.get("step", 0)
        if record is not None and type(at) is int and at <= step and (step > 0 or "event" in record):
            kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))


def _plain(value: Any) -> Any:
    # JSON has no nan; readers get null
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """A progress bar with loss, tokens/s, MFU and time left; plain lines where stderr is no terminal."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            # A log file gets a line every ten seconds; a terminal is redrawn.
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )

    def advance(self) -> None:
        """One step done."""
        self._bar.update(1)

    def write(self, record: Values) -> None:
        shown = {}
        if "loss/train_nats_per_token" in record:
            shown["loss"] = f"{record['loss/train_nats_per_token']:.3f}"
        if "throughput/data_tokens_per_second" in record:
            shown["tokens/s"] = f"{record['throughput/data_tokens_per_second']:,.0f}"
        if record.get("throughput/mfu") is not None:
            shown["MFU"] = f"{100 * record['throughput/mfu']:.1f}%"
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        if record.get("eval/perplexity") is not None:
            self._bar.write(
                f"step {record['step']}: held-out perplexity {record['eval/perplexity']:.1f}", file=sys.stderr
            )

    def say(self, sentence: str) -> None:
        """A sentence above the bar."""
        self._bar.write(sentence, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class WandbMirror:
    """Weights & Biases, online or offline, one run id across restarts."""

    def __init__(self, config: Config, run_id: str, *, attempt: str) -> None:
        # Optional, and slow to import: only runs that ask for it pay.
        import wandb

        folder = Path(config.run.dir)
        self._run = wandb.init(
            project=config.log.wandb_project,
            id=run_id,
            name=folder.name,
            group=run_id,
            tags=[attempt],
            # A restarted run goes on in its own history.
            resume="allow",
            mode=config.log.wandb,
            dir=str(folder),
            config={**to_tree(config), "git_commit": source_commit()},
        )

    def write(self, record: Values) -> None:
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        self._run.log(numbers, step=record["step"])

    def cut(self, step: int) -> None:
        """The tracker keeps what it has: its steps may only rise, and it drops those that come again."""

    def close(self) -> None:
        self._run.finish()


class TensorBoardMirror:
    """TensorBoard event files under run.dir/tensorboard."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        self._folder = folder
        self._writer = self._open(resumed_step)

    def _open(self, resumed_step: int) -> Any:
        """A new event file, whose beginning hides what older files say of the steps that will be made again."""
        # Needs the optional package tensorboard.
        from torch.utils.tensorboard import SummaryWriter

        # a run that starts anew evaluates its step 0 once more
        again_from = resumed_step + 1 if resumed_step else 0
        return SummaryWriter(str(self._folder), purge_step=again_from, flush_secs=5)

    def write(self, record: Values) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def cut(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        self._writer.close()


class Loggers:
    """All of them as one; exists on rank 0 only."""

    def __init__(self, record: Record, console: Console, mirrors: Mapping[str, Mirror]) -> None:
        self._record, self.console = record, console
        self._mirrors = dict(mirrors)

    def write(self, record: Values) -> None:
        """To the record first, then to whatever still mirrors it."""
        # The record is the truth: it has the line before any mirror can fail.
        self._record.write(record)
        self.console.write(record)
        self._tell(lambda mirror: mirror.write(record))

    def cut(self, step: int) -> None:
        """The run returned to `step`: the record forgets what came after, and mirrors hide it where they can."""
        self._record.cut(step)
        self._tell(lambda mirror: mirror.cut(step))

    def _tell(self, what: Callable[[Mirror], None]) -> None:
        for name, mirror in list(self._mirrors.items()):
            try:
                what(mirror)
            # a tracker's outage may surface as any exception, and must not cost the run
            except Exception as error:
                del self._mirrors[name]
                self.console.say(f"{name} failed and is left out from here on: {type(error).__name__}: {error}")

    def close(self) -> None:
        """End all; a mirror that fails to close is named."""
        for name, mirror in self._mirrors.items():
            try:
                mirror.close()
            except Exception as error:
                self.console.say(f"{name} did not close: {type(error).__name__}: {error}")
        self._record.close()
        self.console.close()


def open_mirrors(
    config: Config, run_id: str, *, attempt: str, resumed_step: int, say: Callable[[str], None]
) -> dict[str, Mirror]:
    """The mirrors the configuration asks for; one that cannot start is named through `say` and left out."""
    mirrors: dict[str, Mirror] = {}
    makers: dict[str, Any] = {}
    if config.log.wandb != "disabled":
        makers["wandb"] = lambda: WandbMirror(config, run_id, attempt=attempt)
    if config.log.tensorboard:
        makers["tensorboard"] = lambda: TensorBoardMirror(
            Path(config.run.dir) / "tensorboard", resumed_step=resumed_step
        )
    for name, make in makers.items():
        try:
            mirrors[name] = make()
        except Exception as error:
            say(f"{name} could not start and is left out: {type(error).__name__}: {error}")
    return mirrors
