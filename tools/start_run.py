"""Start a run from somebody's weights: `python tools/start_run.py FOLDER CONFIG [section.key=value ...]`.

FOLDER is a Qwen3, Llama or SDAR folder, or one exported by us. Prepares the run's data where CONFIG names text, writes
step 0 of the run and proves it; `bd3 train CONFIG` then starts from there on any grid.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, add_config_arguments, run_tool


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    parser = CommandParser(prog="start_run", description="Write step 0 of a run from a Hugging Face folder's weights.")
    parser.add_argument("folder", type=Path, help="Qwen3, Llama or SDAR folder, or an exported folder")
    add_config_arguments(parser)
    parser.add_argument(
        "--mask-init",
        choices=("mean", "noise", "keep"),
        default="mean",
        help="the mask token's row: mean of the others, drawn like them, or as the source has it",
    )
    parser.add_argument(
        "--upcycle",
        type=float,
        metavar="NOISE",
        help="make the run's experts of a dense folder's MLPs; each copy gets noise of NOISE times its weights' standard "
        "deviation (0: the logits stay what they are)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments)


def work(parsed: argparse.Namespace) -> int:
    """Prepare the data, write step 0 and say how to go on."""
    # Late: torch is not needed to print --help.
    from bd3_megatron.config.load import load_config
    from bd3_megatron.config.objective import objective_of
    from bd3_megatron.config.validate import validate
    from bd3_megatron.convert.start_run import check_source, start_run
    from bd3_megatron.data.shard_header import read_header
    from bd3_megatron.data.vocabulary import data_folder
    from bd3_megatron.train.dataset import prepare_text

    config = load_config(parsed.config, parsed.overrides)
    validate(config)
    # Before the text is tokenised, which may take hours.
    check_source(parsed.folder)
    # The data's header decides V, the mask id and the tokenizer that the weights must fit.
    prepare_text(config, print)
    header = read_header(data_folder(config) / "train")
    mask_id = header.special_ids.mask if objective_of(config).has_noise else None
    # A larger table than the tokenizer's is the configuration's choice.
    size = config.model.vocab_size or header.vocab_size
    report = start_run(
        parsed.folder,
        config,
        vocab_size=size,
        mask_id=mask_id,
        mask_init=parsed.mask_init,
        upcycle_noise=parsed.upcycle,
        tokenizer=(header.tokenizer_fingerprint, str(data_folder(config))),
    )
    print(f"{report.path}: {report.num_parameters / 1e6:.2f} M parameters of a {report.model_type} folder")
    print(f"  logits of the folder and of the checkpoint differ by at most {report.max_logit_difference:.2e}")
    print(f"  next: bd3 train {' '.join([parsed.config, *parsed.overrides])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
