"""How much memory and time a conversion takes, on a checkpoint of random weights laid out as a run would leave it.

    python -m tools.bench.convert                         1.3B parameters, cut tp=2 x pp=2, to fp32 and bf16
    python -m tools.bench.convert --config configs/debug_cpu.yaml --vocab 300

Decides: the checkpoint is written offline, rank by rank, in the layout of DeepSpeed's ZeRO-1 files with our sidecars and
averages. The conversion is the tool as a command of its own; its peak is the largest resident size the kernel saw,
mapped file pages included. TMPDIR says where the 10 GB go. Refuses: a peak above --limit GiB (exit code 1).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.checkpoint.describe import software_versions
from bd3_megatron.checkpoint.files import record_of, write_safetensors, write_torch
from bd3_megatron.checkpoint.layout import (
    STATE_DIR,
    TEMPORARY_PREFIX,
    FileRecord,
    Manifest,
    ema_name,
    rank_name,
    step_name,
)
from bd3_megatron.checkpoint.publish import publish_files
from bd3_megatron.checkpoint.record import RankRecord
from bd3_megatron.command import CommandParser
from bd3_megatron.config.load import load_config, replace_field, to_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.from_checkpoint import describe_model
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.to_hf import expected_shapes
from bd3_megatron.errors import LaunchError
from bd3_megatron.files import write_bytes
from bd3_megatron.model.partition import EMBEDDING, HEAD_BIAS, HEAD_WEIGHT, partition_of
from tools.bench import harness
from tools.bench.harness import REPOSITORY, Note

# The least grid that exercises cuts along rows and columns, and a pipeline's two stages.
TP, PP = 2, 2
CHECKPOINT_STEP = 1000
MEMORY_POLL_SECONDS = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_conversion, arguments)


def measure_conversion(options: argparse.Namespace) -> Iterator[Note]:
    """Make a checkpoint, then convert it once in each precision."""
    config = load_config(options.config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        path = write_random_checkpoint(folder / "checkpoints", config, vocab_size=options.vocab)
        # Said apart: writing the checkpoint is not what is measured.
        made = time.perf_counter() - began
        shapes = whole_shapes(config, options.vocab)
        largest = max(math.prod(shape) for shape in shapes.values()) * 4 / 2**30
        num_parameters = sum(math.prod(shape) for shape in shapes.values())
        rows, worst = [], 0.0
        for dtype in ("fp32", "bf16"):
            seconds, peak = timed_conversion(path, folder / dtype, dtype)
            # The memory promise must hold in both precisions.
            worst = max(worst, peak)
            rows.append([dtype, f"{seconds:.1f}", f"{peak:.2f}", f"{peak - largest:.2f}"])
    body = harness.table(["stored as", "seconds", "peak memory, GiB", "beyond the largest tensor, GiB"], rows)
    body += (
        f"\n\n{num_parameters / 1e9:.2f}B parameters, largest tensor {largest:.2f} GiB; making it took {made:.0f} s."
    )
    title = f"a checkpoint cut tp={TP} x pp={PP}, averaged weights, to a folder and its proof"
    yield Note(title, body, is_sound=worst <= options.limit)


def timed_conversion(path: Path, out: Path, dtype: str) -> tuple[float, float]:
    """Run the tool; wall seconds and peak resident GiB of its process."""
    tool = [
        sys.executable,
        str(REPOSITORY / "tools/convert_checkpoint.py"),
        str(path),
        "--out",
        str(out),
        "--dtype",
        dtype,
    ]
    began, peak_bytes = time.perf_counter(), 0
    child = subprocess.Popen(tool, stdout=subprocess.DEVNULL)
    # the mark only rises, so the last reading is the peak; wait4's own figure would begin at this process's size
    while child.poll() is None:
        peak_bytes = max(peak_bytes, _high_water_bytes(child.pid))
        time.sleep(MEMORY_POLL_SECONDS)
    if child.returncode != 0:
        raise LaunchError(f"the conversion failed with exit code {child.returncode}; its own error stands above.")
    return time.perf_counter() - began, peak_bytes / 2**30


def _high_water_bytes(pid: int) -> int:
    """Largest resident size of a process so far (VmHWM); 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def whole_shapes(config: Config, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every parallel parameter of the run and its whole shape, padding included."""
    manifest = _manifest(config, vocab_size)
    plain = expected_shapes(describe_model(config, manifest, None)[0])
    table, shapes = NameTable(config.model, vocab_size), {}
    for name in table.parallel_names():
        with torch.device("meta"):
            shapes[name] = tuple(
                table.to_parallel(name, {n: torch.empty(plain[n]) for n in table.plain_names(name)}).shape
            )
    return shapes


def write_random_checkpoint(checkpoints_dir: Path, config: Config, *, vocab_size: int) -> Path:
    """A checkpoint of random fp32 weights and averages, without moments, as a tp x pp run would leave it.

    Args:
        checkpoints_dir: where.
        config: the run.
        vocab_size: V, mask id (the last one) included.

    Returns:
        The checkpoint's folder.
    """
    shapes = whole_shapes(config, vocab_size)
    temporary = checkpoints_dir / f"{TEMPORARY_PREFIX}{step_name(CHECKPOINT_STEP)}"
    temporary.mkdir(parents=True)
    files: dict[str, FileRecord] = {}
    for rank in range(TP * PP):
        files |= _write_rank(temporary, rank, config, shapes)
    manifest = Manifest(**{**vars(_manifest(config, vocab_size)), "files": files})
    return publish_files(temporary, manifest)


def _write_rank(folder: Path, rank: int, config: Config, shapes: dict[str, tuple[int, ...]]) -> dict[str, FileRecord]:
    pp_rank, tp_rank = divmod(rank, TP)
    names = [name for name in shapes if _stage_of(name, config) == pp_rank]
    local = {name: _local_shape(name, shapes[name], gated=config.model.style == "modern") for name in names}
    # Decayed and plain, the optimizer's two groups.
    groups = [[n for n in names if len(local[n]) > 1], [n for n in names if len(local[n]) == 1]]
    state_file = f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt"
    written = {}
    flats = [_random_flat(group, local, seed=2 * rank + index) for index, group in enumerate(groups)]
    # Without moments: the conversion does not read them, and they would triple the disk.
    state = {"single_partition_of_fp32_groups": flats, "base_optimizer_state": {"state": {}}}
    written[f"{STATE_DIR}/{state_file}"] = write_torch(folder / STATE_DIR / state_file, {"optimizer_state_dict": state})
    # In place, after the weights are on the disk: one copy in memory, and averages that differ from the weights.
    averages = {f"shard.{index}": flat.mul_(0.5) for index, flat in enumerate(flats)}
    written[ema_name(rank)] = write_safetensors(folder / ema_name(rank), averages, {})
    description = {
        "rank": rank,
        "tp_rank": tp_rank,
        "pp_rank": pp_rank,
        "state_file": state_file,
        "zero_stage": 1,
        "kinds": ["fp32", "ema"],
        "shapes": local,
        "pieces": list(_pieces(groups, local)),
    }
    record = RankRecord(rank=rank, states={}, averages={}, biases={}, description=description)
    write_bytes(folder / rank_name(rank), record.sidecar(written))
    return written | {rank_name(rank): record_of(folder / rank_name(rank))}


def _pieces(groups: list[list[str]], local: dict[str, tuple[int, ...]]) -> Iterator[list[object]]:
    for index, group in enumerate(groups):
        start = 0
        for name in group:
            numel = math.prod(local[name])
            yield [name, index, start, numel, 0]
            start += numel


def _random_flat(names: list[str], local: dict[str, tuple[int, ...]], *, seed: int) -> Tensor:
    flat = torch.empty(sum(math.prod(local[name]) for name in names))
    flat.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
    start = 0
    for name in names:
        numel = math.prod(local[name])
        if "norm" in name and name.endswith("weight"):
            # every tensor-parallel rank must hold the same norms; halved for the average, they are one
            flat[start : start + numel] = 2.0
        elif len(local[name]) == 1:
            flat[start : start + numel] = 0.0
        start += numel
    return flat


def _stage_of(name: str, config: Config) -> int:
    if name == EMBEDDING:
        return 0
    if name in (HEAD_WEIGHT, HEAD_BIAS) or name.startswith("decoder.final"):
        return PP - 1
    return int(name.split(".")[2]) * PP // config.model.num_layers


def _local_shape(name: str, whole: tuple[int, ...], *, gated: bool) -> tuple[int, ...]:
    dim = partition_of(name, gated=gated).dim
    return tuple(n // TP if d == dim else n for d, n in enumerate(whole))


def _manifest(config: Config, vocab_size: int) -> Manifest:
    grid = {"tp": TP, "pp": PP, "vpp": 1, "cp": 1, "dp": 1}
    for axis, size in grid.items():
        config = replace_field(config, f"parallel.{axis}", size)
    return Manifest(
        step=CHECKPOINT_STEP,
        samples_consumed=CHECKPOINT_STEP * config.train.global_batch_size,
        grid=grid,
        zero_stage=1,
        world_size=TP * PP,
        config=to_tree(config),
        git_commit=None,
        seeds={"run": config.run.seed},
        vocab_size=vocab_size,
        mask_id=vocab_size - 1,
        train_state={},
        engine={
            "adam_step": CHECKPOINT_STEP,
            "ema_updates": CHECKPOINT_STEP,
            "skipped_steps": 0,
            "global_steps": CHECKPOINT_STEP,
        },
        software=software_versions(),
    )


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("convert", __doc__, repeats=1)
    parser.add_argument("--config", default="configs/1b3.yaml", help="whose model (default 1.3B)")
    parser.add_argument("--vocab", type=int, default=50258, help="ids, mask included")
    parser.add_argument("--limit", type=float, default=6.0, help="GiB that the conversion may take")
    return parser


if __name__ == "__main__":
    sys.exit(main())
