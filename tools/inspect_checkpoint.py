"""Look into a checkpoint: `python tools/inspect_checkpoint.py RUN_OR_CHECKPOINT [--norms] [--verify] [--against OTHER]`.

One process, no GPU; a parameter at a time. With --against, exit code 1 says that the two differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.errors import counted

if TYPE_CHECKING:
    from bd3_megatron.checkpoint.read import CheckpointReader


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    parser = CommandParser(prog="inspect_checkpoint", description="Print what a checkpoint holds, or how two differ.")
    parser.add_argument("source", type=Path, help="a run's folder, or one checkpoint of it")
    parser.add_argument(
        "--which", default="model", choices=("model", "ema", "exp_avg", "exp_avg_sq"), help="which tensors"
    )
    parser.add_argument("--norms", action="store_true", help="norm and largest value of every parameter (reads all)")
    parser.add_argument("--verify", action="store_true", help="check every file's size and checksum")
    parser.add_argument("--against", type=Path, help="another checkpoint: print what differs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(parsed: argparse.Namespace) -> int:
    """Print the manifest and the tensors, or the differences."""
    from bd3_megatron.checkpoint.layout import MANIFEST
    from bd3_megatron.checkpoint.read import open_checkpoint
    from bd3_megatron.checkpoint.verify import verify
    from bd3_megatron.convert.from_checkpoint import find_checkpoint
    from bd3_megatron.train.resume import saved_run

    # A folder with a manifest is read as it is, damaged or not: finding out is what the tool is for.
    path = parsed.source if (parsed.source / MANIFEST).is_file() else find_checkpoint(parsed.source)
    # Reads every byte; left out by default, since a checkpoint may be terabytes.
    if parsed.verify:
        verify(path)
    reader = open_checkpoint(path)
    if parsed.against is not None:
        return print_differences(reader, open_checkpoint(find_checkpoint(parsed.against)), parsed.which)
    print_manifest(reader, verified=parsed.verify)
    print_tensors(reader, parsed.which, norms=parsed.norms)
    # Last, so that all there is to see of a checkpoint that cannot be used was printed.
    saved_run(path, reader.manifest)
    return 0


def print_manifest(reader: CheckpointReader, *, verified: bool) -> None:
    """The manifest, without the files one by one."""
    manifest = reader.manifest
    total = sum(record.bytes for record in manifest.files.values())
    print(f"{reader.folder}: step {manifest.step}, {manifest.samples_consumed} samples consumed, {manifest.kind}")
    print(
        f"  grid {manifest.grid}, ZeRO {manifest.zero_stage}, {counted(manifest.world_size, 'rank')}; "
        f"holds {', '.join(reader.kinds())}"
    )
    print(
        f"  vocabulary {manifest.vocab_size}, mask {manifest.mask_id}; commit {manifest.git_commit}; {manifest.software}"
    )
    print(f"  train state {json.dumps(manifest.train_state)}; counters {json.dumps(manifest.engine)}")
    if manifest.origin:
        print(f"  from {json.dumps(manifest.origin)}")
    state = "every checksum is right" if verified else "checksums not checked (--verify)"
    print(f"  {counted(len(manifest.files), 'file')}, {total / 2**20:.1f} MiB, {state}")


def print_tensors(reader: CheckpointReader, which: str, *, norms: bool) -> None:
    """Every parameter, with norms where asked for."""
    from bd3_megatron.checkpoint.compare import facts

    # Shapes come from the sidecars: no tensor is read.
    if not norms:
        for name in (*reader.names(), *reader.bias_names()):
            print(f"  {name}  {list(reader.shape(name))}")
        return
    for fact in facts(reader, which):
        strange = f"  {fact.num_not_finite} NOT FINITE" if fact.num_not_finite else ""
        print(f"  {fact.name}  {list(fact.shape)}  norm {fact.norm:.6g}  largest {fact.largest:.6g}{strange}")


def print_differences(first: CheckpointReader, second: CheckpointReader, which: str) -> int:
    """What differs between two; 1 when tensors do."""
    from bd3_megatron.checkpoint.compare import differences, manifest_differences, only_in_one

    for line in manifest_differences(first.manifest, second.manifest):
        print(f"  {line}")
    unmatched = only_in_one(first, second)
    for name in unmatched:
        print(f"  only in one, or of another shape: {name}")
    # Equal means equal to the bit.
    apart = [difference for difference in differences(first, second, which) if difference.largest != 0.0]
    for difference in apart:
        print(f"  {difference.name}  differs by at most {difference.largest:.3e}, relatively {difference.relative:.3e}")
    count = len(first.names())
    print(
        f"{len(apart)} of {count} tensors ({which}) differ"
        if apart or unmatched
        else f"all {count} tensors ({which}) are equal"
    )
    # As diff does; manifests may differ between equal weights.
    return 1 if apart or unmatched else 0


if __name__ == "__main__":
    sys.exit(main())
