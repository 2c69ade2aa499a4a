"""`bd3 sample FOLDER --prompt "..." --num-tokens N --seed S`: arguments, printing and the results file.

Texts go to stdout (token ids without a tokenizer), figures to stderr, one JSON object a sample to --out, which appears
whole or not at all. Imports torch only when it runs, so that --help is quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bd3_megatron.data.text_reading import read_text
from bd3_megatron.errors import SamplingError, shown
from bd3_megatron.files import check_writable, write_text

if TYPE_CHECKING:
    from bd3_megatron.sampling.generate import Sampler
    from bd3_megatron.sampling.request import SampleResult

# Flags that are fields of DecodingOptions, which checks them and owns their defaults.
OPTION_FLAGS: dict[str, tuple[type, str]] = {
    "rule": (str, "first_hitting (exact, default), left_to_right, ancestral, top_k_static, confidence_threshold, "
             "entropy_bounded"),
    "steps": (int, "forwards a block, at most, except for first_hitting and left_to_right (default: S)"),
    "threshold": (float, "probability above which confidence_threshold reveals (default 0.9)"),
    "entropy_bound": (float, "nats a forward for entropy_bounded (default 0.1)"),
    "temperature": (float, "0 = greedy (default 1)"),
    "top_p": (float, "mass of the nucleus; the token that crosses it is kept (default 1)"),
    "top_k": (int, "most likely tokens kept (default 0 = all)"),
    "min_p": (float, "least probability relative to the best token (default 0)"),
    "repetition_penalty": (float, "more than 1 makes visible tokens less likely (default 1)"),
    "window": (str, "beyond the trained length: recomputed (default) or evicted"),
}  # fmt: skip
_STREAM_SHOWS_ONE = "stream shows one text; give one prompt and one sample, without --infill."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bd3 sample`."""
    parser.add_argument("folder", type=Path, help="exported folder")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated (default: from BOS)")
    parser.add_argument("--prompt-ids", action="append", metavar="1,2,3", help="token ids to continue; may be repeated")
    parser.add_argument("--prompt-file", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--infill", action="store_true", help="fill the mask tokens inside the prompts")
    parser.add_argument("--num-tokens", type=int, help="new tokens a sample (needed unless --infill)")
    parser.add_argument("--seed", type=int, default=0, help="fixes every draw (default 0)")
    parser.add_argument("--num-samples", type=int, default=1, help="samples a prompt (default 1)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples decoded together; never changes them")
    parser.add_argument(
        "--stop-at-eos",
        action=argparse.BooleanOptionalAction,
        help="end a text with its first EOS token (default: where the model has one, unless --infill)",
    )
    parser.add_argument("--stop", action="append", default=[], help="end a text at this string; may be repeated")
    for name, (kind, text) in OPTION_FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: an accelerator if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or float64 (default: as stored)")
    parser.add_argument("--graphs", action="store_true", help="record and replay forwards on an accelerator")
    parser.add_argument("--out", type=Path, help="a .jsonl file: tokens, text, forwards and seconds of every sample")
    parser.add_argument("--stream", action="store_true", help="print one text as its blocks are decided")
    parser.add_argument(
        "--show-denoising", action="store_true", help="draw the block being filled (one sample at a time)"
    )


def run(args: argparse.Namespace) -> int:
    """Run `bd3 sample`; returns the exit code.

    Raises:
        BD3Error: whatever cannot be served, as one sentence.
    """
    check_arguments(args)
    prompts = read_prompts(args)
    # Late, and after the prompts: what can be refused without the model is refused at once.
    from bd3_megatron.sampling.generate import Sampler

    sampler = Sampler.from_pretrained(args.folder, device=args.device, dtype=args.dtype, with_graphs=args.graphs)
    if args.stream:
        return _stream(sampler, args, prompts)
    results = _results(sampler, args, prompts)
    for result in results:
        _print_result(sampler, result, is_alone=len(results) == 1, is_whole=args.infill)
    if args.out is not None:
        write_jsonl(args.out, results, args.seed)
    _print_figures(sampler)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        SamplingError: numbers out of range, text that is none, options that contradict each other.
        FileError: --out cannot be written.
    """
    from bd3_megatron.sampling.request import check_count, check_text, new_options

    if args.num_tokens is None and not args.infill:
        raise SamplingError("num_tokens is missing; pass --num-tokens N (or --infill to fill masks only).")
    for name in ("num_tokens", "num_samples", "batch_size"):
        if getattr(args, name) is not None:
            check_count(name, getattr(args, name))
    for name, texts in (("--prompt", args.prompt or ()), ("--stop", args.stop)):
        for text in texts:
            check_text(name, text)
    if not all(args.stop):
        raise SamplingError("a stop string is empty; give at least one character.")
    if args.stream and (args.num_samples != 1 or args.infill):
        raise SamplingError(_STREAM_SHOWS_ONE)
    if args.stream and args.out is not None:
        raise SamplingError("--out holds finished texts and --stream shows one as it grows; leave one of them out.")
    new_options(args.seed, decoding_options(args))
    if args.out is not None:
        check_writable(args.out)


def read_prompts(args: argparse.Namespace) -> list[str | list[int]]:
    """Prompts of all three kinds, in that order; a single empty one (BOS) when none is given.

    Raises:
        SamplingError: ids that are no numbers.
        DataError: an unreadable file.
    """
    prompts: list[str | list[int]] = list(args.prompt or [])
    for listed in args.prompt_ids or []:
        try:
            prompts.append([int(token) for token in listed.replace(",", " ").split()])
        except ValueError:
            raise SamplingError(f"prompt ids {shown(listed)} are not numbers; give them as 1,2,3.") from None
    if args.prompt_file is not None:
        prompts += read_text(args.prompt_file).removesuffix("\n").split("\n")
    # The empty prompt starts from BOS.
    return prompts or [""]


def decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given; the others keep the engine's defaults."""
    given = {name: getattr(args, name) for name in OPTION_FLAGS}
    # None means not given: the engine owns the defaults.
    options = {name: value for name, value in given.items() if value is not None}
    return options | ({} if args.stop_at_eos is None else {"stop_at_eos": args.stop_at_eos})


def _results(sampler: Sampler, args: argparse.Namespace, prompts: list[str | list[int]]) -> list[SampleResult]:
    from bd3_megatron.sampling.display import DenoisingDisplay

    options = decoding_options(args)
    batch_size, display = args.batch_size, None
    if args.show_denoising:
        # The display draws one line: two samples at once would overwrite each other.
        batch_size = 1
        display = DenoisingDisplay(sampler.tokenizer, sampler.config.mask_token_id, sys.stdout)
    if args.infill:
        results = sampler.infill(prompts, seed=args.seed, batch_size=batch_size, observer=display, **options)
    else:
        results = sampler.generate(
            prompts,
            num_tokens=args.num_tokens,
            seed=args.seed,
            num_samples=args.num_samples,
            batch_size=batch_size,
            stop_strings=args.stop,
            observer=display,
            **options,
        )
    if display is not None:
        display.finish()
    return results


def _stream(sampler: Sampler, args: argparse.Namespace, prompts: list[str | list[int]]) -> int:
    if len(prompts) != 1:
        raise SamplingError(_STREAM_SHOWS_ONE)
    blocks = sampler.stream(
        prompts[0], num_tokens=args.num_tokens, seed=args.seed, stop_strings=args.stop, **decoding_options(args)
    )
    for block in blocks:
        # A character cut by the block's end comes with the next block.
        shown = block.text if block.text is not None else "".join(f"{token} " for token in block.tokens)
        print(shown, end="", flush=True)
    print()
    return 0


def _print_result(sampler: Sampler, result: SampleResult, *, is_alone: bool, is_whole: bool) -> None:
    if not is_alone:
        print(f"== prompt {result.prompt_index}, sample {result.sample_index} ({result.stop_reason}) ==")
    if sampler.tokenizer is None or result.text is None:
        print(" ".join(map(str, result.tokens)))
        return
    prompt = "" if is_whole else sampler.tokenizer.decode(result.prompt_tokens, skip_special_tokens=True)
    print(prompt + result.text)


def _print_figures(sampler: Sampler) -> None:
    from bd3_megatron.sampling.figures import copy_bandwidth

    if sampler.figures is None:
        return
    device = sampler.model.model.embed_tokens.weight.device
    for line in sampler.figures.lines(copy_bandwidth(device)):
        # Figures apart from the texts, so that stdout can be piped.
        print(line, file=sys.stderr)


def write_jsonl(path: Path, results: list[SampleResult], seed: int) -> None:
    """One JSON object a sample; the file appears whole.

    Raises:
        FileError: it cannot be written.
    """
    lines = [json.dumps({**asdict(result), "seed": seed}, ensure_ascii=False) + "\n" for result in results]
    write_text(path, "".join(lines))
