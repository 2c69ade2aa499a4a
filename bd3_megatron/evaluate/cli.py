"""`bd3 evaluate`: the arguments, the process group under torchrun, and the lines that are printed.

Decides nothing about likelihoods. Imports torch only when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bd3_megatron.evaluate.offline import Work
    from bd3_megatron.evaluate.perplexity import Estimate, ScoreSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `bd3 evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", metavar="FOLDER", help="exported model folder (config.json, model.safetensors)")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="prepared text: DIR with valid/, or one split of it"
    )
    parser.add_argument("--split", default="valid", help="split of --data to score (default: valid)")
    parser.add_argument(
        "--packing", choices=("wrap", "isolated", "pad"), default="wrap", help="of documents into rows (default: wrap)"
    )
    parser.add_argument("--draws", type=int, default=2, metavar="K", help="noise draws a sequence (default: 2)")
    parser.add_argument("--num-sequences", type=int, metavar="N", help="sequences, evenly spaced (default: all)")
    parser.add_argument(
        "--exact", action="store_true", help="enumerate mask patterns: no noise, 2^block_size - 1 passes"
    )
    parser.add_argument(
        "--official", action="store_true", help="official conventions: one draw, first token not counted"
    )
    parser.add_argument("--first-token-given", action="store_true", help="do not count the first token of a sequence")
    parser.add_argument("--seed", type=int, default=1, help="of the noise (default: 1, as in training)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="rows of one forward (default: 8)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), help="default: as stored")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = (
        "  bd3 evaluate runs/quickstart/hf --data runs/quickstart/data\n"
        "  torchrun --nproc-per-node 8 -m bd3_megatron.cli evaluate FOLDER --data DIR --draws 4"
    )


def settings_from(options: argparse.Namespace) -> ScoreSettings:
    """What was asked for.

    Raises:
        RangeError: numbers out of range, or flags that contradict each other.
    """
    from bd3_megatron.errors import RangeError
    from bd3_megatron.evaluate.perplexity import ScoreSettings

    for name, value in (
        ("num-sequences", options.num_sequences),
        ("draws", options.draws),
        ("batch-size", options.batch_size),
    ):
        if value is not None and value < 1:
            raise RangeError(f"--{name} {value} is out of range; use 1 or more.")
    if options.official and options.exact:
        raise RangeError("--official draws its noise and --exact enumerates it; leave one out.")
    if options.official:
        return ScoreSettings.official(num_sequences=options.num_sequences, seed=options.seed)
    return ScoreSettings(
        num_sequences=options.num_sequences,
        draws=options.draws,
        exact=options.exact,
        exclude_first=options.first_token_given,
        seed=options.seed,
    )


def run(options: argparse.Namespace) -> int:
    """Evaluate and print; returns the exit code."""
    import torch

    from bd3_megatron.evaluate.offline import evaluate_plain, load_model, open_split

    settings = settings_from(options)
    work = _join(options)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    folder = Path(options.folder)
    try:
        model, config = load_model(folder, device=work.device, dtype=dtype)
        dataset = open_split(Path(options.data), folder, config, split=options.split, packing=options.packing)
        result = evaluate_plain(model, dataset, settings, work, mask_id=config.mask_token_id)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if work.rank == 0:
        _print(result, options)
    return 0


def _print(result: Estimate, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(result.as_dict()))
        return
    print(result.sentence())
    if options.official:
        print("official conventions: one draw, t in [1e-3, 1], first token of a sequence not counted", file=sys.stderr)


def _join(options: argparse.Namespace) -> Work:
    """This process's part of the work; joins the others that torchrun started."""
    import torch

    from bd3_megatron.compat.device import collective_backend, cuda_is_there, rank_device
    from bd3_megatron.errors import BackendError
    from bd3_megatron.evaluate.offline import Work

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if options.device == "cpu":
        device = torch.device("cpu")
    elif options.device in (None, "cuda"):
        if options.device == "cuda" and not cuda_is_there():
            raise BackendError("--device cuda was asked for and no CUDA device is visible; use --device cpu.")
        device = rank_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        raise BackendError(f"--device {options.device} is not known; use cpu or cuda.")
    if ranks > 1:
        torch.distributed.init_process_group(collective_backend(device), rank=rank, world_size=ranks)
    return Work(device=device, batch_size=options.batch_size, rank=rank, ranks=ranks)
