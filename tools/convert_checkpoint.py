"""Turn a run's checkpoint into a Hugging Face folder: `python tools/convert_checkpoint.py RUN --out FOLDER`.

One process, no GPU, no process group; memory for the largest tensor and a little. With `--layout` sdar, llada2 or qwen3 the
folder is what SGLang and LMDeploy serve; RUN may then also be a folder exported before. A thin command over
convert/from_checkpoint and convert/layouts; imports late, so that --help is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool

# Short for people; the names are resolved late, when torch is there.
OWN_LAYOUT = "bd3"
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    parser = CommandParser(
        prog="convert_checkpoint", description="Write a checkpoint as a Hugging Face folder, and prove it."
    )
    parser.add_argument(
        "source", type=Path, help="a run's folder, one checkpoint of it, or (with --layout) an exported folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write (appears whole or not at all)")
    parser.add_argument("--raw", action="store_true", help="trained weights instead of their moving average")
    parser.add_argument("--dtype", choices=sorted(TORCH_NAMES), default="fp32", help="of the stored weights")
    parser.add_argument(
        "--layout", choices=(OWN_LAYOUT, "sdar", "llada2", "qwen3"), default=OWN_LAYOUT, help="whose names and fields"
    )
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument(
        "--remap-mask", action="store_true", help="sdar, llada2: move the mask to the id SGLang and LMDeploy assume"
    )
    mask.add_argument(
        "--keep-mask", action="store_true", help="sdar, llada2: leave the mask's id, for engines that take any"
    )
    parser.add_argument("--license", help="licence of the weights, for the model card (default: it names none)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(parsed: argparse.Namespace) -> int:
    """Convert, and say what the proof found."""
    lines = convert_own_folder(parsed) if parsed.layout == OWN_LAYOUT else convert_layout(parsed)
    print("\n  ".join(lines))
    return 0


def convert_own_folder(parsed: argparse.Namespace) -> list[str]:
    """Write our own folder; returns what to say."""
    import torch

    # Late: torch is not needed to print --help.
    from bd3_megatron.convert.from_checkpoint import convert_checkpoint

    report = convert_checkpoint(
        parsed.source,
        parsed.out,
        raw=parsed.raw,
        dtype=getattr(torch, TORCH_NAMES[parsed.dtype]),
        licence=parsed.license,
        # To stderr: what is printed on stdout is the report.
        warn=lambda text: print(text, file=sys.stderr),
    )
    return [
        f"{report.out}: {report.which} weights of {report.source}, {report.num_parameters / 1e6:.2f} M parameters",
        f"logits of the folder and of the checkpoint differ by at most {report.max_logit_difference:.2e}",
        *report.notes,
    ]


def convert_layout(parsed: argparse.Namespace) -> list[str]:
    """Write another engine's folder, by way of ours where the source is a run; returns what to say."""
    import torch

    from bd3_megatron.convert.folder import model_type_of
    from bd3_megatron.convert.layouts import export_layout
    from bd3_megatron.convert.qwen3_layout import MaskPlace
    from bd3_megatron.files import scratch_folder
    from bd3_megatron.sampling.folder import MODEL_TYPE

    dtype = getattr(torch, TORCH_NAMES[parsed.dtype])
    # Beside --out and so on its disk: the folder between is as large as the result.
    with scratch_folder(parsed.out) as between:
        folder, lines = parsed.source, []
        if model_type_of(folder) != MODEL_TYPE:
            folder = between / OWN_LAYOUT
            # The first line names the folder between, which is gone afterwards.
            lines = convert_own_folder(argparse.Namespace(**{**vars(parsed), "out": folder}))[1:]
        # None lets the layout refuse where the two ids differ: neither choice is a default.
        mask: MaskPlace | None = "moved" if parsed.remap_mask else "kept" if parsed.keep_mask else None
        remarks = export_layout(folder, parsed.out, parsed.layout, mask=mask, dtype=dtype)
    return [f"{parsed.out}: {parsed.layout} layout of {parsed.source}", *lines, *remarks]


if __name__ == "__main__":
    sys.exit(main())
