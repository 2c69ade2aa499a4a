"""`bd3 evaluate`: the arguments, and which part answers them: perplexity, the zero-shot table, tasks, or the frontier.

Imports torch only when it runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bd3_megatron.errors import CheckpointError, ConfigError, RangeError, shown

COUNTED_OPTIONS = {
    "num_sequences": 10**12,
    "draws": 10**6,
    "batch_size": 10**6,
    "num_samples": 10**7,
    "num_tokens": 10**7,
    "limit": 10**7,
}
"""Options that count something, with the greatest number that can have been meant; the least is 1."""
EXAMPLES = """
  bd3 evaluate runs/quickstart/hf --data runs/quickstart/data
  bd3 evaluate runs/quickstart/hf --data runs/quickstart/data --exact --json
  bd3 evaluate FOLDER --zero-shot runs/zero_shot --local ptb=ptb.valid.txt --format markdown
  bd3 evaluate FOLDER --tasks arc_easy,hellaswag --num-fewshot 5
  bd3 evaluate FOLDER --tasks my_task --include-path tasks/ --json
  bd3 evaluate FOLDER --frontier --scoring-model GPT2 --rules first_hitting ancestral --temperatures 0.8 1.0
  torchrun --nproc-per-node 8 -m bd3_megatron.cli evaluate FOLDER --data DIR --draws 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `bd3 evaluate`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="exported model folder, or a run's folder")
    add("--data", metavar="DIR", help="prepared text to score: DIR with valid/, or one split of it")
    add("--split", default="valid", help="split of --data (default: valid)")
    add("--draws", type=int, metavar="K", help="noise draws a sequence (default: 2; for --tasks see there)")
    add("--num-sequences", type=int, metavar="N", help="sequences, evenly spaced (default: all)")
    add("--exact", action="store_true", help="enumerate mask patterns: no noise, 2^block_size - 1 passes")
    add("--official", action="store_true", help="official conventions: one draw of t, first token not counted")
    add("--seed", type=int, default=1, help="of the noise or the samples (default: 1, as in training)")
    add("--batch-size", type=int, default=8, metavar="B", help="rows of one forward (default: 8)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--dtype", choices=("float32", "float64", "bfloat16"), help="default: as stored")
    add("--json", action="store_true", help="print JSON (same as --format json)")
    add("--format", choices=("text", "markdown", "json"), default="text", help="of what is printed")
    _add_convention(parser.add_argument_group("convention (default: the model's own, as its run recorded it)"))
    _add_zero_shot(parser.add_argument_group("zero-shot table"))
    _add_tasks(parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'bd3-megatron[eval]')"))
    _add_frontier(parser.add_argument_group("generated text"))


def _add_convention(group: argparse._ArgumentGroup) -> None:
    # --flag, --no-flag, or neither: then the model's own convention holds.
    switch = argparse.BooleanOptionalAction
    group.add_argument("--packing", metavar="MODE", help="of documents into rows: wrap, isolated or pad")
    group.add_argument("--append-eos", action=switch, help="an end token after every document")
    group.add_argument("--wrap-special", action=switch, help="rows are BOS + text + EOS")
    group.add_argument("--first-token-given", action=switch, help="do not count the first token of a row")
    group.add_argument("--min-t", type=float, metavar="T", help="smallest noise level of the bound")


def _add_zero_shot(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--zero-shot", metavar="WORK", help="score the paper's sets, prepared under WORK")
    group.add_argument("--sets", nargs="+", metavar="SET", help="ptb wikitext lm1b lambada ag_news pubmed arxiv")
    group.add_argument("--local", nargs="+", default=[], metavar="SET=FILE", help="files that stand in for the hub")
    group.add_argument("--recipes", metavar="DIR", help="recipes of the sets (default: configs/data of the checkout)")


def _add_tasks(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="tasks or groups; blocks with up to 8 scored tokens have no noise, others 128 draws unless --draws says",
    )
    add("--include-path", "--include_path", metavar="DIR", help="folder of the tasks' own YAML files")
    add(
        "--num-fewshot",
        "--num_fewshot",
        type=int,
        metavar="N",
        help="examples before each question (default: the task's)",
    )
    add("--limit", type=int, metavar="N", help="questions a task (default: all)")


def _add_frontier(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--frontier", action="store_true", help="sample under every rule and temperature and measure the texts")
    add("--scoring-model", metavar="FOLDER", help="local autoregressive model for generative perplexity")
    add("--references", metavar="FILE", help="human texts, one a line, for MAUVE (with --scoring-model and mauve-text)")
    add("--rules", nargs="+", default=["first_hitting"], metavar="RULE", help="decoding rules (default: first_hitting)")
    add("--temperatures", nargs="+", type=float, default=[1.0], metavar="T", help="(default: 1.0)")
    add("--steps", type=int, help="forwards a block, for rules that take them")
    add("--top-p", type=float, default=1.0, help="nucleus (default: 1.0 = off)")
    add("--num-samples", type=int, default=32, help="texts a setting (default: 32)")
    add("--num-tokens", type=int, default=128, help="tokens a text (default: 128)")


def check_options(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        ConfigError: not exactly one task.
        RangeError: numbers out of range, or flags that contradict each other.
    """
    asked = [options.data is not None, options.zero_shot is not None, options.tasks is not None, options.frontier]
    # One number at a time: two tasks would leave it open which one --json describes.
    if sum(asked) != 1:
        raise ConfigError("evaluate does one thing at a time; give --data, --zero-shot, --tasks or --frontier.")
    for name, most in COUNTED_OPTIONS.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= most:
            raise RangeError(f"--{name.replace('_', '-')} {shown(value)} is out of range; use 1 to {most}.")
    # the key of the counter-based generator has 48 bits
    if not 0 <= options.seed < 2**48:
        raise RangeError(f"--seed {shown(options.seed)} is out of range; use 0 to 2^48 - 1.")
    if options.official and options.exact:
        raise RangeError("--official draws its noise and --exact enumerates it; leave one out.")
    if options.tasks is not None and (options.official or options.num_sequences is not None):
        raise RangeError("--tasks takes neither --official nor --num-sequences; use --draws and --limit.")
    if options.official and options.first_token_given is False:
        raise RangeError("--official does not count the first token; leave --no-first-token-given out.")
    if options.frontier:
        _check_frontier(options)


def _check_frontier(options: argparse.Namespace) -> None:
    from bd3_megatron.evaluate.generative import grid_of, shared_options
    from bd3_megatron.sampling.request import new_options

    shared = shared_options(options.top_p, options.steps)
    # Every setting is checked now: the last one must not fail after hours of sampling.
    for setting in grid_of(options.rules, options.temperatures):
        new_options(options.seed, {**shared, **setting})
    # a model of ours may load for minutes before the scoring model's turn comes
    if options.scoring_model is not None and not (Path(options.scoring_model) / "config.json").is_file():
        raise CheckpointError(
            f"--scoring-model {shown(options.scoring_model)} holds no config.json; give a model's folder."
        )


def run(options: argparse.Namespace) -> int:
    """Do what was asked and print it; returns the exit code."""
    # Late: torch is not needed to print --help.
    from bd3_megatron.evaluate import harness_tasks, tasks

    if options.json:
        options.format = "json"
    check_options(options)
    if options.frontier:
        return tasks.print_frontier(options)
    if options.tasks is not None:
        return harness_tasks.print_tasks(options)
    # Rows are shared by the processes of torchrun; sampling runs in one process.
    with tasks.joined(options) as work:
        task = tasks.print_perplexity if options.zero_shot is None else tasks.print_zero_shot
        return task(options, work)
