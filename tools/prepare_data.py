#!/usr/bin/env python3
"""Tokenise text into a prepared folder: DIR/train, DIR/valid, DIR/tokenizer.

Runs again where it was broken off; the result does not depend on the number of workers. Examples:
    tools/prepare_data.py --builtin python-docs --tokenizer sentencepiece --vocab-size 2048 --out data/docs
    tools/prepare_data.py --text book.txt notes/ --tokenizer bytes --out data/own
    tools/prepare_data.py --dataset corpus.jsonl --column text --tokenizer path/to/tokenizer --out data/own --workers 8
    tools/prepare_data.py --dataset chats.jsonl --messages messages --tokenizer path/to/tokenizer --out data/chats
    tools/prepare_data.py --recipe configs/data/wikitext103.yaml --out data/wikitext103
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.config.data import DEFAULT_HELD_OUT, DEFAULT_NUM_PIECES
from bd3_megatron.errors import ConfigError, shown

if TYPE_CHECKING:
    from bd3_megatron.config.data import RowFilter
    from bd3_megatron.data.decontaminate import NgramRequest
    from bd3_megatron.data.prepare import PrepareRequest


_OF_ANSWERS = ("messages", "prompt-column", "answer-column")
"""Options that make a folder of which only answers are predicted."""


def build_parser() -> CommandParser:
    """The arguments of this tool."""
    made = CommandParser(prog="prepare_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = made.add_argument_group("what to read (one of)")
    text.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 text files, or folders of .txt, .md, .rst")
    text.add_argument("--builtin", metavar="NAME", help="python-docs or python-topics: text every Python has")
    text.add_argument("--dataset", metavar="PATH", help="jsonl, parquet, arrow, csv file or folder, or hub name")
    text.add_argument("--recipe", metavar="YAML", help="a file of configs/data: sources, splits, cleaning, tokenizer")
    _add_reading(made.add_argument_group("how to read it"))
    _add_result(made.add_argument_group("what to make"))
    return made


def _add_reading(how: argparse._ArgumentGroup) -> None:
    """What of the text is taken, and how it is cut and cleaned."""
    how.add_argument(
        "--documents",
        choices=("paragraph", "line", "file"),
        default="paragraph",
        help="with --text, where a document ends: blank line (default), line, or file",
    )
    how.add_argument("--column", default=None, help="with --dataset, meta.body for nested ones (default: text)")
    how.add_argument(
        "--messages",
        nargs="?",
        const="messages",
        metavar="COLUMN",
        help="with --dataset: chats, written by the tokenizer's chat template; only the assistant's turns are predicted",
    )
    how.add_argument("--prompt-column", metavar="COLUMN", help="with --dataset and --answer-column: what is given")
    how.add_argument("--answer-column", metavar="COLUMN", help="with --dataset: what is predicted, and nothing else")
    how.add_argument("--split", default="train", help="with --dataset, e.g. train[:-1000] (default: train)")
    how.add_argument("--name", help="with --dataset: its configuration")
    how.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="YAML",
        help="with --dataset: keep rows by a column, e.g. 'column: score, at_least: 3' (equals, one_of, at_most, matches)",
    )
    how.add_argument("--streaming", action="store_true", help="with --dataset: read without a local copy")
    how.add_argument(
        "--skip-bad",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N documents that cannot be read, and name them (0: stop at the first)",
    )
    how.add_argument("--dedup", action="store_true", help="leave out exact copies of earlier documents")
    how.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="FILE",
        help="leave out documents that share a run of words with these evaluation sets (text, jsonl, parquet, csv)",
    )
    how.add_argument("--ngram", type=int, default=None, metavar="WORDS", help="words of such a run (13)")
    how.add_argument("--detokenizer", default=None, help="undo a benchmark's spacing: wikitext, ptb, lm1b, ...")


def _add_result(what: argparse._ArgumentGroup) -> None:
    """The folder that is made."""
    what.add_argument("--out", required=True, metavar="DIR", help="folder to make; must not hold anything else")
    what.add_argument(
        "--tokenizer",
        default=None,
        help="bytes (default), sentencepiece or sentencepiece-bpe (trained here), a .model file, a folder or hub name",
    )
    what.add_argument(
        "--vocab-size", type=int, default=None, help=f"of a trained tokenizer, mask included ({DEFAULT_NUM_PIECES})"
    )
    what.add_argument(
        "--valid-fraction",
        type=float,
        default=None,
        help=f"share of documents held out, by content ({DEFAULT_HELD_OUT})",
    )
    what.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    what.add_argument("--quiet", action="store_true", help="no progress bar")


def request_of(arguments: argparse.Namespace) -> PrepareRequest:
    """Turn the command line into a request.

    Raises:
        ConfigError: none or several of the sources were named.
    """
    from bd3_megatron.data.prepare import PrepareRequest

    named = [n for n in ("text", "builtin", "dataset", "recipe") if getattr(arguments, n)]
    if len(named) != 1:
        given = " and ".join(f"--{name}" for name in named) or "none"
        raise ConfigError(
            f"one source is read and {given} was given; use one of --text, --builtin, --dataset, --recipe."
        )
    chosen = {
        "tokenizer": arguments.tokenizer,
        "vocab_size": arguments.vocab_size,
        "valid_fraction": arguments.valid_fraction,
        "detokenizer": arguments.detokenizer,
    }
    # Only what was given: a recipe's own settings stay otherwise.
    changes = {key: value for key, value in chosen.items() if value is not None}
    changes |= {"dedup": arguments.dedup, "decontaminate": _evaluation_sets(arguments)}
    out = Path(arguments.out)
    # Silently ignoring a filter would train on rows that somebody wanted out.
    if arguments.filter and not arguments.dataset:
        raise ConfigError("--filter is about rows of --dataset; a recipe states filters of its own.")
    of_answers = [f"--{name}" for name in _OF_ANSWERS if getattr(arguments, name.replace("-", "_")) is not None]
    if of_answers and not arguments.dataset:
        raise ConfigError(f"{' and '.join(of_answers)} names columns of --dataset; a recipe states its own.")
    if arguments.recipe:
        from bd3_megatron.data.recipe import load_recipe

        return load_recipe(Path(arguments.recipe)).request(out, **changes)
    if arguments.dataset:
        from bd3_megatron.data.dataset_source import HubDataset

        dataset = HubDataset(
            path=arguments.dataset,
            name=arguments.name,
            split=arguments.split,
            column=arguments.column or HubDataset.column,
            filters=tuple(_filter(text) for text in arguments.filter),
            streaming=arguments.streaming,
            messages=arguments.messages,
            prompt_column=arguments.prompt_column,
            answer_column=arguments.answer_column,
        )
        return PrepareRequest(out=out, sources={"train": dataset}, **changes)
    from bd3_megatron.data.sources import text_source

    names = arguments.text or [f"builtin:{arguments.builtin}"]
    return PrepareRequest(out=out, sources={"train": text_source(names, documents_are=arguments.documents)}, **changes)


def _filter(text: str) -> RowFilter:
    """A filter as recipes write it, with or without braces."""
    from bd3_megatron.config.data import RowFilter
    from bd3_megatron.config.load import build_named
    from bd3_megatron.config.yaml_file import parse_yaml

    where = f"--filter {shown(text)}"
    # Braces are optional, because a shell would make people quote them.
    stated = parse_yaml(text if text.lstrip().startswith("{") else "{" + text + "}", where)
    made: RowFilter = build_named(RowFilter, stated, where)
    return made


def _evaluation_sets(arguments: argparse.Namespace) -> NgramRequest | None:
    from bd3_megatron.data.decontaminate import DEFAULT_WORDS, NgramRequest

    if not arguments.decontaminate:
        if arguments.ngram is not None:
            raise ConfigError("--ngram is about --decontaminate FILE; name the evaluation sets.")
        return None
    words = DEFAULT_WORDS if arguments.ngram is None else arguments.ngram
    return NgramRequest(files=tuple(arguments.decontaminate), num_words=words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit code."""
    return run_tool(build_parser(), work, arguments, interrupted="stopped; run the same command again to go on")


def work(options: argparse.Namespace) -> int:
    """Prepare, and say how much there is."""
    # Parallelism is by processes here; the library's threads would compete with them for the same cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from bd3_megatron.data.prepare import prepare

    made = prepare(
        request_of(options),
        num_workers=options.workers,
        skip_bad=options.skip_bad,
        # In a log file a bar is noise.
        show_progress=not options.quiet and sys.stderr.isatty(),
        say=lambda sentence: print(sentence, file=sys.stderr, flush=True),
    )
    counts = ", ".join(
        f"{split} {made.num_tokens[split]:,} tokens in {made.num_documents[split]:,} documents"
        + (
            f" ({made.num_supervised[split]:,} of answers, which alone are predicted)"
            if split in made.num_supervised
            else ""
        )
        for split in made.num_tokens
    )
    # The same request on a finished folder does nothing, so scripts may call this every time.
    state = "was prepared before" if made.was_there else "prepared"
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(made.left_out.items()))
    print(
        f"{made.folder} {state}: {counts}; vocabulary {made.vocab_size}"
        + (f"; left out: {left_out}" if left_out else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
