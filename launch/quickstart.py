#!/usr/bin/env python3
"""The quickstart: text, tokens, a trained model, an exported folder, samples, and a summary of what came out.

    bash launch/quickstart.sh [--steps N] [--out DIR] [--grid tp=1,dp=2]

The same command on the same folder resumes where it stopped; other settings start anew, and the earlier results are moved
aside, never deleted. Every step is a command that anyone can type; this file only types them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.config.load import load_config
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import ConfigError, LaunchError, counted, cut
from bd3_megatron.files import move, read_json_list, write_json, write_text
from launch.env import visible_gpus
from launch.local import check_gpus, check_run_folder
from launch.submission import ROOT

CONFIG = ROOT / "configs" / "quickstart.yaml"
GRID_KEYS = ("tp", "pp", "vpp", "cp", "dp", "zero_stage", "sequence_parallel")
MARK = ".quickstart.json"
SAMPLE_TOKENS = 96
_PR_SET_PDEATHSIG = 1


class StepFailed(Exception):
    """A step's command failed and has said why; carries its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """What is run where."""

    folder: Path
    overrides: tuple[str, ...]
    config: Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps.

    Returns:
        0; 2 for a mistake in the input; the exit code of a step that failed.
    """

    def work(options: argparse.Namespace) -> int:
        started = time.monotonic()
        try:
            quickstart = quickstart_of(options)
            print(begin(quickstart), flush=True)
            run_steps(quickstart)
            print(closing_lines(quickstart, time.monotonic() - started))
        except StepFailed as failed:
            return failed.code
        return 0

    return run_tool(build_parser(), work, argv)


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="quickstart", description="From nothing to samples, in minutes.")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: what configs/quickstart.yaml says)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/quickstart", help="folder of results (runs/quickstart)"
    )
    parser.add_argument("--grid", help="parallel axes, for example tp=1,dp=2; axes not named are 1 (tp=2,dp=2)")
    return parser


def quickstart_of(options: argparse.Namespace) -> Quickstart:
    """Settings of this run; writes nothing.

    Raises:
        ConfigError, GridError, LaunchError: one sentence with value, rule and remedy.
    """
    folder = options.out.absolute()
    overrides = [f"run.dir={folder}", f"data.path={folder / 'data'}", *grid_overrides(options.grid)]
    if options.steps is not None:
        overrides.append(f"train.steps={options.steps}")
    config = load_config(CONFIG, overrides)
    validate(config)
    check_gpus(config.parallel.world_size(), visible_gpus())
    check_run_folder(config)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise LaunchError(f"'{folder}' holds files that are not the quickstart's; give another --out.")
    return Quickstart(folder=folder, overrides=tuple(overrides), config=config)


def grid_overrides(grid: str | None) -> list[str]:
    """Overrides of a grid "tp=1,dp=2": axes not named are 1; without a grid, what fits the GPUs there are.

    Raises:
        ConfigError: not a list of axes.
    """
    if grid is None:
        gpus = visible_gpus()
        # the configuration's own grid is four ranks
        if not 0 < gpus < 4:
            return []
        grid = "tp=2" if gpus >= 2 else "tp=1"
        print(f"quickstart: {counted(gpus, 'GPU')} found, so the grid is {grid},dp=1 instead of tp=2,dp=2")
    parts = grid.split(",")
    named = dict(part.partition("=")[::2] for part in parts)
    if len(named) < len(parts):
        raise ConfigError(f"--grid {cut(grid)} names an axis twice; leave one of them out.")
    for axis, value in named.items():
        if axis not in GRID_KEYS or not value:
            raise ConfigError(f"--grid {grid}: '{axis}' is no axis with a value; write for example --grid tp=1,dp=2.")
    return [f"parallel.{axis}={value}" for axis, value in ({"tp": "1", "dp": "1"} | named).items()]


def begin(quickstart: Quickstart) -> str:
    """Make or reuse the folder.

    Returns:
        The sentence that says whether this run starts, resumes or starts anew.
    """
    folder, mark = quickstart.folder, quickstart.folder / MARK
    # where things lie is no setting: a folder may be moved
    settings = [o for o in quickstart.overrides if not o.startswith(("run.dir=", "data.path="))]
    settings.append(CONFIG.read_text(encoding="utf-8"))
    if not mark.is_file():
        _write_mark(folder, settings)
        return f"quickstart: starts in {folder}"
    if read_json_list(mark, f"name another --out, or remove {folder}", kind=LaunchError) == settings:
        done = (folder / "checkpoints" / "LATEST").exists()
        return f"quickstart: {'resumes' if done else 'starts anew (nothing was saved yet)'} in {folder}"
    aside = next(p for n in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
    move(folder, aside)
    _write_mark(folder, settings)
    # the text does not depend on the settings, so its tokens serve again
    if (aside / "data").is_dir():
        move(aside / "data", folder / "data")
    return f"quickstart: starts anew in {folder}, because the settings differ; the earlier run is now {aside}"


def _write_mark(folder: Path, settings: list[str]) -> None:
    write_json(folder / MARK, settings)


def run_steps(quickstart: Quickstart) -> None:
    """Text to tokens, training with evaluation before and after, export, samples.

    Raises:
        StepFailed: a command failed; it has said why.
    """
    folder, data = quickstart.folder, quickstart.config.data
    bd3, tools = [sys.executable, "-m", "bd3_megatron.cli"], ROOT / "tools"
    say(1, "text to tokens: the documentation every Python has")
    vocabulary = ["--tokenizer", data.tokenizer, "--vocab-size", str(data.tokenizer_vocab_size)]
    prepare = ["--builtin", "python-docs", *vocabulary, "--out", str(folder / "data")]
    run_step_command([sys.executable, str(tools / "prepare_data.py"), *prepare])
    parallel = quickstart.config.parallel
    say(2, f"training on {parallel.world_size()} local ranks (tp={parallel.tp}, pp={parallel.pp}, dp={parallel.dp})")
    run_step_command([*bd3, "train", str(CONFIG), *quickstart.overrides])
    say(3, "checkpoint to a Hugging Face folder")
    # of an earlier attempt
    hf = folder / "hf"
    shutil.rmtree(hf, ignore_errors=True)
    run_step_command([sys.executable, str(tools / "convert_checkpoint.py"), str(folder), "--out", str(hf)])
    say(4, "three samples")
    drawn = folder / ".samples.jsonl"
    request = ["--num-samples", "3", "--num-tokens", str(SAMPLE_TOKENS), "--seed", "1", "--out", str(drawn)]
    # samples of one length, whatever so short a run has learned of the ends of documents
    run_step_command([*bd3, "sample", str(hf), *request, "--no-stop-at-eos"], capture=True)
    texts = [json.loads(line)["text"].strip() for line in drawn.read_text(encoding="utf-8").splitlines()]
    drawn.unlink()
    write_text(folder / "samples.txt", "\n\n----\n\n".join(texts) + "\n")
    say(5, "looking at what came out")


def say(number: int, what: str) -> None:
    """The heading of a step."""
    print(f"[{number}/5] {what}", flush=True)


def run_step_command(command: Sequence[str], *, capture: bool = False) -> str:
    """Run a step's command; it dies with this process, and a stop request reaches it before this process ends.

    Returns:
        Its standard output where captured, else nothing.

    Raises:
        StepFailed: it failed, or the person stopped the quickstart.
    """
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE if capture else None, text=True, preexec_fn=_end_with_parent, cwd=ROOT
    )
    stopped: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        # a Ctrl-C has reached the child already, as a member of the process group
        if number == signal.SIGTERM:
            child.send_signal(number)
        stopped.append(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        output, _ = child.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        print("quickstart: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise StepFailed(128 + stopped[0])
    # of a child that a signal ended, what a shell would report
    if child.returncode != 0:
        raise StepFailed(child.returncode if child.returncode > 0 else 128 - child.returncode)
    return output or ""


def _end_with_parent() -> None:
    # TERM, not KILL: training saves before it ends
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def closing_lines(quickstart: Quickstart, seconds: float) -> str:
    """What came out, in a few lines."""
    folder = quickstart.folder
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = folder / "samples.txt"
    inspect = [sys.executable, str(ROOT / "tools/inspect_samples.py"), str(samples), "--data", str(folder / "data")]
    counted = json.loads(run_step_command(inspect, capture=True))
    share = counted["share_in_training_text"]
    known = (
        "no words were sampled"
        if share is None
        else f"{share:.0%} of {counted['num_words']} sampled words occur in the training text"
    )
    lines = [
        "",
        f"quickstart: done in {int(seconds) // 60} min {int(seconds) % 60} s; all of it is in {folder}",
        f"  perplexity  {perplexity_line(records)}",
        f"  throughput  {throughput_line(records)}",
        f"  words       {known}",
        f"  samples     {samples}",
        "",
        samples.read_text(encoding="utf-8"),
    ]
    return "\n".join(lines)


def perplexity_line(records: Sequence[dict[str, float | None]]) -> str:
    """Held-out perplexity before the first and after the last step."""
    found = [r["eval/perplexity"] for r in records if r.get("eval/perplexity") is not None]
    if len(found) < 2 or found[0] is None or found[-1] is None:
        return "was not measured before and after"
    return f"{found[0]:,.1f} before, {found[-1]:,.1f} after training, on held-out text: {found[0] / found[-1]:.1f} times lower"


def throughput_line(records: Sequence[dict[str, float | None]]) -> str:
    """Median tokens a second and MFU of the logged steps."""
    speeds = [s for r in records if (s := r.get("throughput/data_tokens_per_second"))]
    shares = [m for r in records if (m := r.get("throughput/mfu")) is not None]
    if not speeds:
        return "was not measured"
    source = next((str(r["throughput/peak_source"]) for r in records if r.get("throughput/peak_source")), "unknown")
    # the median leaves out the first steps, which compile and fill caches
    mfu = f"MFU {statistics.median(shares):.1%} (peak: {source})" if shares else f"MFU unknown ({source})"
    return f"{statistics.median(speeds):,.0f} data tokens/s, {mfu}"


if __name__ == "__main__":
    sys.exit(main())
