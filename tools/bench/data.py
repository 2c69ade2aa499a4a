"""How fast and how safely data is prepared and read.

    python -m tools.bench.data --prepare 1.0 --workers 2      a synthetic corpus of so many GB: 1 process against 2, memory
    python -m tools.bench.data --kills 20                     kill -9 at random moments, then compare with a calm run
    python -m tools.bench.data --loader                       tokens/s from shards, by packing, length and processes
    python -m tools.bench.data --gpt2 FOLDER --text FILE      ids against transformers' own tokenizer, one by one

Refuses: nothing; a broken promise (bytes that differ, ids that differ) ends with exit code 1.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bd3_megatron.command import CommandParser
from bd3_megatron.data.builtin_text import builtin_documents, builtin_items
from bd3_megatron.data.loader import BatchLoader, TokenDataset
from bd3_megatron.data.sampler import BatchShare
from bd3_megatron.data.tokenizer_open import open_tokenizer
from bd3_megatron.errors import UsageError
from tools.bench import harness
from tools.bench.harness import REPOSITORY, Note

# Memory is polled 20 times a second.
_POLL_SECONDS = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_data, arguments)


def measure_data(options: argparse.Namespace) -> Iterator[Note]:
    """Whatever was asked for, one note each.

    Raises:
        UsageError: nothing was asked for.
    """
    if bool(options.gpt2) != bool(options.text):
        raise UsageError("--gpt2 and --text go together: a folder and a file.")
    if not (options.prepare or options.kills or options.loader or options.gpt2):
        raise UsageError("nothing to do: give --prepare, --kills, --loader or --gpt2.")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        if options.prepare:
            yield bench_prepare(options, folder)
        if options.kills:
            yield bench_kills(options, folder)
        if options.loader:
            yield bench_loader(options, folder)
        if options.gpt2:
            yield compare_gpt2(options)


def bench_prepare(options: argparse.Namespace, folder: Path) -> Note:
    """One process against several over the same corpus."""
    corpus = write_corpus(folder / "corpus.txt", int(options.prepare * 1e9), seed=1)
    rows = []
    seconds = {}
    for workers in (1, options.workers):
        out = folder / f"out{workers}"
        seconds[workers], memory = timed(command(corpus, out, workers, options.tokenizer, options.vocab_size))
        # Two bytes a token: the vocabulary is below 65,536.
        tokens = sum(path.stat().st_size for path in out.glob("*/*.bin")) // 2
        rate = tokens / seconds[workers] / 1e6
        rows.append([workers, f"{seconds[workers]:.1f}", f"{rate:.2f}", f"{memory / 1e6:.0f}"])
    same = contents(folder / "out1") == contents(folder / f"out{options.workers}")
    body = harness.table(["processes", "seconds", "million tokens/s", "peak memory, MB"], rows)
    ratio = seconds[1] / seconds[options.workers]
    state = "equal" if same else "DIFFERENT"
    body += f"\n\n{options.workers} processes are {ratio:.2f}x as fast as one; the folders are {state}.\n"
    return Note(f"preparing {options.prepare} GB, tokenizer {options.tokenizer}", body)


def bench_kills(options: argparse.Namespace, folder: Path) -> Note:
    """Kill a run at random moments until enough kills hit; the result must equal an undisturbed one."""
    corpus = write_corpus(folder / "corpus.txt", int(options.kill_megabytes * 1e6), seed=2)
    calm, disturbed = folder / "calm", folder / "disturbed"
    seconds, _ = timed(command(corpus, calm, options.workers, options.tokenizer, options.vocab_size))
    chosen = random.Random(options.seed)
    hits, moments = 0, []
    # Only kills that hit a run at work count; one that came too late is drawn again.
    while hits < options.kills:
        process = subprocess.Popen(
            command(corpus, disturbed, options.workers, options.tokenizer, options.vocab_size),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Over the length of an undisturbed run, so that every part of it is hit.
        moment = chosen.uniform(0.0, seconds)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            hits += 1
            moments.append(moment)
        else:  # it was quicker: begin anew, so that every kill hits a run at work
            shutil.rmtree(disturbed, ignore_errors=True)
    timed(command(corpus, disturbed, options.workers, options.tokenizer, options.vocab_size))
    same = contents(calm) == contents(disturbed)
    body = (
        f"{hits} kills between {min(moments):.2f} and {max(moments):.2f} s of a run of {seconds:.2f} s with "
        f"{options.workers} processes; the final folder is {'equal, byte for byte' if same else 'DIFFERENT'}.\n"
    )
    return Note(f"kill -9 during preparation, {options.kill_megabytes} MB", body, is_sound=same)


def bench_loader(options: argparse.Namespace, folder: Path) -> Note:
    """Reading speed from shards."""
    corpus = write_corpus(folder / "corpus.txt", int(options.loader_megabytes * 1e6), seed=3)
    timed(command(corpus, folder / "loader", 1, "bytes", 0))
    rows = []
    for packing in ("wrap", "isolated", "pad"):
        for length, micro in ((128, 8), (1024, 8), (1024, 64)):
            dataset = TokenDataset.open(folder / "loader" / "train", seq_len=length, packing=packing, block_size=16)
            rates = [reading_rate(dataset, micro, workers, options.seconds) for workers in (0, options.workers)]
            rows.append([packing, length, micro, *(f"{rate / 1e6:.1f}" for rate in rates)])
    header = ["packing", "L", "rows a batch", "this process", f"{options.workers} loader processes"]
    return Note("million tokens/s from shards", harness.table(header, rows) + "\n")


def compare_gpt2(options: argparse.Namespace) -> Note:
    """Ids of a text from a GPT-2 folder, against transformers' GPT2 tokenizer on the same files."""
    import transformers

    text = Path(options.text).read_text(encoding="utf-8")
    ours = open_tokenizer(options.gpt2).encode(text).tolist()
    files = {"vocab": f"{options.gpt2}/vocab.json", "merges": f"{options.gpt2}/merges.txt"}
    try:
        foreign = transformers.GPT2TokenizerFast(**files)
    except TypeError:  # transformers 4 names the files otherwise
        foreign = transformers.GPT2TokenizerFast(files["vocab"], files["merges"])
    theirs = foreign(text)["input_ids"]
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    same = ours == theirs
    state = "equal" if same else f"DIFFERENT from token {first}"
    body = (
        f"{len(theirs)} tokens of {len(text)} characters; ours are {state} (transformers {transformers.__version__}).\n"
    )
    return Note("GPT-2 ids against transformers", body, is_sound=same)


def reading_rate(dataset: TokenDataset, micro_batch: int, workers: int, seconds: float) -> float:
    """Tokens a second of wall time, after the first batch."""
    share = BatchShare(global_batch_size=micro_batch, micro_batch_size=micro_batch)
    batches = iter(BatchLoader(dataset, share.steps(0), num_workers=workers))
    # Processes start and files are opened before the clock does.
    next(batches)
    tokens, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        tokens += next(batches).tokens_BL.numel()
    return tokens / spent


def write_corpus(path: Path, size: int, *, seed: int) -> Path:
    """Paragraphs of the built-in English in a random order, until the file holds `size` bytes."""
    paragraphs = [
        p + "\n\n" for item in builtin_items("python-topics") for d in builtin_documents(item) for p in d.split("\n\n")
    ]
    chosen = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        written = 0
        while written < size:
            written += file.write("".join(chosen.choices(paragraphs, k=2000))[: size - written])
    return path


def command(corpus: Path, out: Path, workers: int, tokenizer: str, vocab_size: int) -> list[str]:
    """tools/prepare_data.py as a user calls it."""
    made = [
        sys.executable,
        str(REPOSITORY / "tools" / "prepare_data.py"),
        "--text",
        str(corpus),
        "--out",
        str(out),
        "--quiet",
    ]
    made += ["--workers", str(workers), "--tokenizer", tokenizer]
    return made + (["--vocab-size", str(vocab_size)] if tokenizer.startswith("sentencepiece") else [])


def timed(arguments: list[str]) -> tuple[float, int]:
    """Run a command: (seconds, peak bytes of its processes together).

    Raises:
        CalledProcessError: it failed.
    """
    started, peak = time.perf_counter(), 0
    # The whole command by the wall clock, as a user waits for it, starting processes included.
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, sum(proportional_bytes(pid) for pid in family(process.pid)))
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return time.perf_counter() - started, peak


def family(pid: int) -> list[int]:
    """A process and its descendants, those that are still there."""
    try:
        children = [Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [pid, *(below for child in children[0] for below in family(int(child)))]


def proportional_bytes(pid: int) -> int:
    """Memory of a process, shared pages divided among their users."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    # Pss: pages that processes share would be counted several times by the resident size.
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("data", __doc__, repeats=1)
    parser.add_argument("--prepare", type=float, metavar="GB", help="prepare a corpus of this size")
    parser.add_argument("--kills", type=int, metavar="N", help="kill preparation N times")
    parser.add_argument("--kill-megabytes", type=float, default=20.0, help="size of the corpus for --kills (20)")
    parser.add_argument("--loader", action="store_true", help="read from shards")
    parser.add_argument("--loader-megabytes", type=float, default=50.0, help="size of the corpus for --loader (50)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each reading (2)")
    parser.add_argument("--gpt2", metavar="FOLDER", help="folder with GPT-2's vocab.json and merges.txt")
    parser.add_argument("--text", metavar="FILE", help="text for --gpt2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", default="sentencepiece")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1, help="of the moments of --kills")
    parser.add_argument("--scratch", type=Path, help="where the corpora go (the system's temporary folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
