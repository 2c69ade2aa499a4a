"""Perplexity, the zero-shot table and the frontier of `bd3 evaluate`, from parsed options to printed lines. Only rank 0
prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bd3_megatron.compat.device import collective_backend, cuda_is_there, rank_device
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.text_reading import read_text
from bd3_megatron.diffusion.noise_schedule import MIN_T
from bd3_megatron.errors import BackendError, ConfigError, TokenizerError, shown
from bd3_megatron.evaluate import generative, zero_shot
from bd3_megatron.evaluate.mauve_score import mauve_is_there
from bd3_megatron.evaluate.offline import Work, evaluate_plain, load_model, model_convention, open_model, open_split
from bd3_megatron.evaluate.perplexity import Estimate, ScoreSettings, rows_to_score
from bd3_megatron.evaluate.scoring_model import ScoringModel
from bd3_megatron.evaluate.tables import render
from bd3_megatron.evaluate.text_units import text_tokenizer, text_units
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.sampling.generate import Sampler
from bd3_megatron.sampling.text import folder_tokenizer

DEFAULT_DRAWS = 2
"""Noise draws of a sequence: the fewest that show their own noise."""
MEASURES = (("bits_per_byte", ".4f", "bits per byte"), ("word_perplexity", ".2f", "perplexity per word"))
"""Key, form and unit of the measures that do not depend on the tokenizer."""


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[Work]:
    """This process's part of the work; inside, the processes that torchrun started are one group."""
    rank, ranks = _variable("RANK", 0), _variable("WORLD_SIZE", 1)
    device = device_of(options)
    if ranks > 1:
        torch.distributed.init_process_group(collective_backend(device), rank=rank, world_size=ranks)
    try:
        yield Work(device=device, batch_size=options.batch_size, rank=rank, ranks=ranks)
    finally:
        if ranks > 1:
            torch.distributed.destroy_process_group()


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for.

    Raises:
        BackendError: it is unknown, or not there.
    """
    if options.device == "cpu":
        return torch.device("cpu")
    if options.device not in (None, "cuda"):
        raise BackendError(f"--device {shown(options.device)} is not known; use cpu or cuda.")
    if options.device == "cuda" and not cuda_is_there():
        raise BackendError("--device cuda was asked for and no CUDA device is visible; use --device cpu.")
    return rank_device(_variable("LOCAL_RANK", 0))


def asked_settings(options: argparse.Namespace, config: BD3Config) -> tuple[ScoreSettings, tuple[str, ...]]:
    """(what is asked of a model, which parts of its own convention that overrides).

    Raises:
        ConfigError: a convention that no evaluation can have.
    """
    convention, overridden = model_convention(config).changed(
        packing=options.packing,
        append_eos=options.append_eos,
        wrap_special=options.wrap_special,
        # The official conventions are these three: first token given, MIN_T, one drawn level.
        first_token_given=True if options.official else options.first_token_given,
        min_t=MIN_T if options.official else options.min_t,
    )
    settings = ScoreSettings(
        convention=convention,
        num_sequences=options.num_sequences,
        draws=1 if options.official else options.draws or DEFAULT_DRAWS,
        exact=options.exact,
        by_level=options.official,
        seed=options.seed,
    )
    return settings, overridden


def say_convention(settings: ScoreSettings, overridden: Sequence[str], dataset: TokenDataset) -> None:
    """Tell people on stderr under which convention a number stands: two numbers of different ones do not compare."""
    recipe = dataset.sources[0].shards.packing_rule
    other = {name: value for name, value in recipe.items() if value != getattr(settings.convention, name)}
    if other:
        named = ", ".join(f"{name}={value}" for name, value in other.items())
        # To stderr: stdout holds the number alone.
        print(f"note: the text's own recipe says {named}; it is scored under the convention below", file=sys.stderr)
    whose = f"overridden: {', '.join(overridden)}" if overridden else "the model's own"
    drawn = "; one draw of t a block, as in the official code" if settings.by_level else ""
    print(f"convention ({whose}): {settings.convention.sentence()}{drawn}", file=sys.stderr)


def print_perplexity(options: argparse.Namespace, work: Work) -> int:
    """`--data`."""
    folder = Path(options.folder)
    # what can be refused is refused before the weights are read
    opened = open_model(folder)
    settings, overridden = asked_settings(options, opened.config)
    dataset = open_split(Path(options.data), folder, opened.config, settings.convention, split=options.split)
    model = opened.load(device=work.device, dtype=_dtype(options))
    result = evaluate_plain(model, dataset, settings, work, mask_id=opened.config.mask_token_id)
    if work.rank == 0:
        # By the tokenizer that made the text: perplexity per token depends on it, these measures do not.
        measures = text_measures(Path(options.data), dataset, settings, result)
        if options.format == "json":
            how = {"convention": settings.convention.to_json(), "overridden": list(overridden)}
            print(json.dumps(result.as_dict() | measures | how))
            return 0
        print(result.sentence())
        if measures:
            said = ", ".join(
                f"{measures[name]:{form}} {unit}" for name, form, unit in MEASURES if measures[name] is not None
            )
            print(f"{said} ({measures['num_bytes']:,} bytes, {measures['num_words']:,} words)")
        say_convention(settings, overridden, dataset)
    return 0


def text_measures(
    data: Path, dataset: TokenDataset, settings: ScoreSettings, result: Estimate
) -> dict[str, float | int | None]:
    """Bits per byte and perplexity per word of the scored rows; nothing, said on stderr, where no tokenizer is there.

    Raises:
        TokenizerError: the tokenizer beside the text is damaged, or did not make it.
    """
    tokenizer = text_tokenizer(dataset, data)
    if tokenizer is None:
        print(
            f"note: no tokenizer lies beside {data}; bits per byte and perplexity per word are left out",
            file=sys.stderr,
        )
        return {}
    row_id_N = rows_to_score(num_rows=dataset.num_rows, num_sequences=settings.num_sequences)
    return text_units(dataset, row_id_N, tokenizer).measures(result.nll_nats_per_token)


def print_zero_shot(options: argparse.Namespace, work: Work) -> int:
    """`--zero-shot`; the exit code is 1 where no set could be had."""
    folder = Path(options.folder)
    recipes = Path(options.recipes) if options.recipes else Path(__file__).resolve().parents[2] / "configs" / "data"
    if not recipes.is_dir():
        raise ConfigError(f"{recipes} holds no recipes; give --recipes DIR (configs/data of a checkout).")
    names, local = options.sets or list(zero_shot.SETS), named_paths(options.local)
    zero_shot.check_sets(names)
    opened = open_model(folder)
    config = opened.config
    # how rows are cut is each set's recipe, as in the paper's table; what is counted of them is the model's convention
    settings, _ = asked_settings(options, config)
    model = opened.load(device=work.device, dtype=_dtype(options))

    def score(dataset: TokenDataset) -> Estimate:
        return evaluate_plain(model, dataset, settings, work, mask_id=config.mask_token_id)

    rows = zero_shot.zero_shot(
        names,
        score,
        recipes=recipes,
        work=Path(options.zero_shot),
        tokenizer_folder=folder,
        seq_len=config.max_position_embeddings,
        local=local,
    )
    if work.rank == 0:
        print(render(zero_shot.ZERO_SHOT_COLUMNS, [row.as_dict() for row in rows], options.format))
    # A table with some sets is a result; one without any is a failure.
    return 0 if any(row.estimate is not None for row in rows) else 1


def named_paths(pairs: Sequence[str]) -> dict[str, Path]:
    """{"ptb": Path("a.txt")} from ["ptb=a.txt"].

    Raises:
        ConfigError: a pair without "=".
    """
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--local {shown(pair)} names no file; write SET=FILE.")
    named = {name: Path(path) for name, path in (pair.split("=", 1) for pair in pairs)}
    zero_shot.check_sets(named)
    return named


def print_frontier(options: argparse.Namespace) -> int:
    """`--frontier`, in one process."""
    device, references = device_of(options), reference_texts(options)
    folder = Path(options.folder)
    tokenizer = folder_tokenizer(folder)
    if options.scoring_model is not None and tokenizer is None:
        raise TokenizerError(f"{folder} holds no tokenizer, so its samples are no text to score; copy its files there.")
    scorer = None if options.scoring_model is None else ScoringModel.load(options.scoring_model, device=device)
    sampler = Sampler(*load_model(folder, device=device, dtype=_dtype(options)), tokenizer)
    request = generative.GenerationRequest(
        references=references,
        num_samples=options.num_samples,
        num_tokens=options.num_tokens,
        seed=options.seed,
        batch_size=options.batch_size,
        options=generative.shared_options(options.top_p, options.steps),
    )
    points = generative.frontier(sampler, scorer, request, generative.grid_of(options.rules, options.temperatures))
    print(render(generative.GENERATION_COLUMNS, points, options.format))
    return 0


def reference_texts(options: argparse.Namespace) -> list[str]:
    """The texts of `--references`; none, said on stderr, where MAUVE's package is not installed.

    Raises:
        ConfigError: there is no such file, or nothing to embed its texts with.
    """
    if options.references is None:
        return []
    path = Path(options.references)
    if options.scoring_model is None:
        raise ConfigError(
            "--references gives MAUVE its texts, which the scoring model embeds; give --scoring-model FOLDER."
        )
    if not path.is_file():
        raise ConfigError(f"--references {path} is not a file; give a file of texts, one a line.")
    if not mauve_is_there():
        print("note: MAUVE is left out: its package is not installed (pip install mauve-text)", file=sys.stderr)
        return []
    # An empty line is no text and has no embedding.
    return [line for line in read_text(path).split("\n") if line.strip()]


def _variable(name: str, default: int) -> int:
    """What torchrun says of this process."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{name}={shown(text)} is no whole number; start with torchrun, or unset it.")
    return int(text)


def _dtype(options: argparse.Namespace) -> torch.dtype | None:
    return None if options.dtype is None else getattr(torch, options.dtype)
