"""The data of a run: opened where it is prepared, made under run.dir where the configuration names text.

Decides: training rows come from shards (one prepared folder, or a mixture of several) or from a stream; tokenizer, packing
rule and held-out rows come from a prepared folder in every case. Rank 0 makes, the others wait; what is made appears whole
or not at all, so a broken-off start leaves nothing behind.
Costs: with a stream every rank tokenises its own rows, and ranks of one replica (tp, pp, cp) do so alike.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from bd3_megatron.checkpoint.layout import checkpoint_folders
from bd3_megatron.config.data import DataConfig, DatasetOptions, StreamConfig, options_of
from bd3_megatron.config.objective import block_sizes, objective_of
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate_run import refuse_without_held_out, refuse_without_text
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.data.dataset_source import HubDataset
from bd3_megatron.data.held_out import check_read_alike
from bd3_megatron.data.loader import BatchLoader, TokenDataset, check_held_out
from bd3_megatron.data.megatron_indexed import open_shards
from bd3_megatron.data.mixture import Mixture
from bd3_megatron.data.packing import PackedRows, PackingRule, rule_of_recipe
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.shard_header import HEADER_FILE
from bd3_megatron.data.shards import TokenShards
from bd3_megatron.data.sources import text_source
from bd3_megatron.data.special_ids import SpecialIds
from bd3_megatron.data.stream_shard import StreamPlan
from bd3_megatron.data.streaming import StreamLoader, merge_states, plan_stream
from bd3_megatron.data.tokenizer import META_FILE
from bd3_megatron.data.vocabulary import TOKENIZER_COPY, data_folder
from bd3_megatron.errors import ConfigError, TokenizerError, cut
from bd3_megatron.files import whole
from bd3_megatron.train.held_out_sources import HeldOutSources, held_out_sources
from bd3_megatron.train.mixing import mixture_stages, stages_state
from bd3_megatron.train.plan import RunPlan
from bd3_megatron.train.state import DataIdentity

Indices = Callable[[], Iterator[Tensor]]
"""Gives the int64 [B] indices of a rank's micro-batches, the same at every call."""
DataState = Mapping[str, Any]
"""JSON: what is remembered beside the number of samples consumed."""


@dataclass(frozen=True)
class RowReading:
    """Batches in order, and the state after the last one taken."""

    batches: Iterator[CleanBatch]
    state: Callable[[], dict[str, Any]]


class TrainingRows(Protocol):
    """Where training rows come from."""

    def read(self, plan: RunPlan, indices: Indices, *, workers: int, saved: DataState | None) -> RowReading:
        """Read the rows with these indices, from where the plan and the saved state say the run stands."""

    def counts(self) -> list[dict[str, int]]:
        """Rows, documents and tokens of each source; empty where nobody has counted them, as of a stream."""


@dataclass(frozen=True)
class ShardRows:
    """Rows of prepared splits, mixed as the configuration says."""

    dataset: TokenDataset
    data: DataConfig

    def read(self, plan: RunPlan, indices: Indices, *, workers: int, saved: DataState | None) -> RowReading:
        """As TrainingRows; the mixture's stages are remembered.

        Raises:
            ConfigError: sources were taken away.
        """
        # The stages that began are taken from the checkpoint, so that a changed configuration does not recount them.
        stages = mixture_stages(self.data, plan, saved)
        source = self.dataset.mixed(Mixture(stages))
        batches = BatchLoader(source, indices(), num_workers=workers)
        return RowReading(iter(batches), lambda: stages_state(stages))

    def counts(self) -> list[dict[str, int]]:
        """As TrainingRows; in the order that numbers the sources."""
        return [_counts(rows) for rows in self.dataset.sources]


@dataclass(frozen=True)
class StreamRows:
    """Rows of a stream."""

    stream: StreamPlan

    def read(self, plan: RunPlan, indices: Indices, *, workers: int, saved: DataState | None) -> RowReading:
        """As TrainingRows; the position of every stream shard is remembered.

        Raises:
            ConfigError: the run has consumed samples, but not of a stream.
            DataError: the saved state is another stream's.
        """
        positions = saved if saved is not None and "shards" in saved else None
        if positions is None and plan.origin_samples:
            raise ConfigError(
                f"data.stream is set and the checkpoint's {plan.origin_samples:,} samples were not read from a stream; "
                "take up its weights in a new run with tools/start_run.py, or go on with prepared data."
            )
        loader = StreamLoader(self.stream, indices, num_workers=workers, state=positions)
        return RowReading(iter(loader), loader.state_dict)

    def counts(self) -> list[dict[str, int]]:
        """As TrainingRows: none."""
        return []


def merged_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a run from those of its data-parallel ranks, all after the same step."""
    return merge_states(states) if "shards" in states[0] else states[0]


@dataclass(frozen=True)
class RunData:
    """What the trainer reads and what the model must know of its ids."""

    train: TrainingRows
    valid: TokenDataset | None
    """Held-out rows in their own order; None where no split was held out."""
    by_source: HeldOutSources
    """Those of each part of a mixture."""
    convention: EvaluationConvention
    """How they are cut and counted, here and wherever the run's model is evaluated later."""
    tokenizer_folder: Path
    special: SpecialIds
    vocab_size: int
    identity: DataIdentity
    """What a resumed run compares."""


def keep_tokenizer(data: RunData, run_dir: Path) -> None:
    """Copy the tokenizer into the run, where exports find it when the data is gone. Called by one rank.

    Raises:
        FileError: it cannot be written.
    """
    kept, given = run_dir / TOKENIZER_COPY, data.tokenizer_folder
    # of megatron's indexed data there may be no tokenizer
    if not (given / META_FILE).is_file():
        return
    if (kept / META_FILE).is_file() and (kept / META_FILE).read_bytes() == (given / META_FILE).read_bytes():
        return
    with whole(kept, replace_folder=True) as staging:
        shutil.copytree(given, staging)


def prepare_text(config: Config, say: Callable[[str], None]) -> None:
    """Make run.dir/data from data.text where neither path nor mixture is given. Called by one rank.

    Raises:
        ConfigError: neither prepared data nor text is named.
        DataError, TokenizerError: the text cannot be read or cut.
    """
    data = config.data
    if data.path is not None or data.mixtures:
        return
    # a run that has begun reads what it began with, though the text may be gone or Python's own have changed
    if (data_folder(config) / "train" / HEADER_FILE).is_file() and checkpoint_folders(
        Path(config.run.dir) / "checkpoints"
    ):
        return
    refuse_without_text(data)
    request = PrepareRequest(
        out=data_folder(config),
        sources={"train": text_source(data.text)},
        tokenizer=data.tokenizer,
        vocab_size=data.tokenizer_vocab_size,
        valid_fraction=data.valid_fraction,
    )
    # An existing folder of the same request is kept: a restarted job does not tokenise again.
    made = prepare(request, say=say)
    if not made.was_there:
        say(f"prepared {made.num_tokens['train']:,} training tokens in {made.folder}")


def open_data(config: Config) -> RunData:
    """Open the splits. Every rank does.

    Raises:
        DataError: a split is missing or damaged, or the stream cannot be opened.
        ConfigError: an evaluation or a search is asked for and no rows are held out.
        TokenizerError: the model's table is smaller than the tokenizer's vocabulary.
    """
    folder = data_folder(config)
    trained, train = _open_train(config, folder)
    shards = trained[0]
    valid_folder = folder / "valid"
    has_valid = (valid_folder / HEADER_FILE).exists()
    # the held-out split's own recipe, where it has one: LM1B's rows stand between BOS and EOS
    recipe = open_shards(valid_folder).packing_rule if has_valid else shards.packing_rule
    convention = evaluation_convention(config, recipe)
    valid = convention.open_rows(valid_folder, seq_len=config.data.seq_len) if has_valid else None
    if valid is not None:
        check_held_out(valid.sources[0].shards, trained)
    else:
        refuse_without_held_out(config, f"'{cut(str(folder))}' has no split valid")
    # Larger is allowed: rows beyond the tokenizer's ids are never looked up, and padding to a round size is common.
    given = config.model.vocab_size
    if given is not None and given < shards.vocab_size:
        raise TokenizerError(
            f"model.vocab_size={given} is smaller than the tokenizer's {shards.vocab_size}; "
            f"use {shards.vocab_size} or more, or leave it unset."
        )
    return RunData(
        train=train,
        valid=valid,
        by_source=held_out_sources(
            config.data.mixed_folders,
            convention,
            trained,
            seq_len=config.data.seq_len,
            known=None if valid is None else (folder, valid),
        ),
        convention=convention,
        tokenizer_folder=folder / "tokenizer",
        special=shards.special,
        vocab_size=shards.vocab_size,
        identity=DataIdentity(
            tokenizer={"fingerprint": shards.tokenizer_fingerprint, **shards.special.as_dict()},
            rows={
                "train": train.counts(),
                "valid": None if valid is None else _counts(valid.sources[0]),
                "held_out_fraction": (shards if valid is None else valid.sources[0].shards).held_out_fraction,
            },
        ),
    )


def _counts(rows: PackedRows) -> dict[str, int]:
    shards = rows.shards
    counts = {"rows": rows.num_rows, "documents": shards.num_documents, "tokens": shards.num_tokens}
    # absent where every token is predicted: checkpoints of plain text are those of releases that knew no answers
    return counts if shards.num_supervised is None else counts | {"supervised": shards.num_supervised}


def evaluation_convention(config: Config, recipe: Mapping[str, bool]) -> EvaluationConvention:
    """How a run's model is evaluated.

    Args:
        config: the run.
        recipe: append_eos and wrap_special of the held-out split, where it has rules of its own.
    """
    rule = _packing_rule(config, recipe)
    return EvaluationConvention(
        packing=rule.mode,
        aligned_block=_aligned_block(config),
        append_eos=rule.append_eos,
        wrap_special=rule.wrap_special,
        # a model that never saw its first token masked is not asked for it
        first_token_given=config.evaluate.official or config.diffusion.never_mask_first,
    )


def _open_train(config: Config, folder: Path) -> tuple[list[TokenShards], TrainingRows]:
    """What is trained on, and the shards that decide about it."""
    if config.data.stream is not None:
        shards = open_shards(folder / "train")
        if shards.num_supervised is not None:
            raise ConfigError(
                f"data.stream reads plain text, and '{cut(str(folder))}' holds prompts with their answers: what is trained on "
                "and what is held out would differ in kind; take the tokenizer and held-out rows from a folder of plain text."
            )
        return [shards], _open_stream(config, config.data.stream, folder / "tokenizer", shards)
    # weights that cannot be mixed are refused here, before a model is built
    Mixture(mixture_stages(config.data, RunPlan(config)))
    paths = [Path(p) / "train" for p in config.data.mixed_folders] or [folder / "train"]
    dataset = TokenDataset.open(
        paths,
        seq_len=config.data.seq_len,
        packing=config.data.packing,
        block_size=_aligned_block(config),
        seed=config.run.seed,
        shuffle=config.data.shuffle,
    )
    return [rows.shards for rows in dataset.sources], ShardRows(dataset, config.data)


def _packing_rule(config: Config, recipe: Mapping[str, bool]) -> PackingRule:
    data = config.data
    return rule_of_recipe(recipe, seq_len=data.seq_len, mode=data.packing, block_size=_aligned_block(config))


def _aligned_block(config: Config) -> int:
    # Aligned to the largest block of the curriculum, documents are aligned to all that divide it. The next token has no
    # blocks: documents lie end to end, and no end token fills anything.
    return max(block_sizes(config))


def _open_stream(config: Config, stream: StreamConfig, tokenizer_folder: Path, shards: TokenShards) -> StreamRows:
    """The stream's rows are laid out as those of the prepared folder are, and what that holds out is left out."""
    data, recipe = config.data, shards.packing_rule
    dataset = HubDataset(path=stream.dataset, streaming=True, **options_of(stream, DatasetOptions))
    if shards.held_out_fraction:
        read = dataset.settings() | {"detokenizer": stream.detokenizer}
        check_read_alike(("data.stream", read), (shards.where, shards.source))
    plan = plan_stream(
        dataset,
        tokenizer_folder,
        _packing_rule(config, recipe),
        num_shards=stream.shards,
        shuffle_rows=stream.shuffle_rows if data.shuffle else 1,
        seed=config.run.seed,
        detokenizer=stream.detokenizer,
        held_out_fraction=shards.held_out_fraction,
    )
    return StreamRows(plan)


def isolation_remark(config: Config) -> str | None:
    """What a phase of one block a row does to isolated documents, or None where nothing is worth saying."""
    length, block = config.data.seq_len, _aligned_block(config)
    if config.data.packing != "isolated" or not objective_of(config).has_noise or block < length:
        return None
    # One alignment serves all phases: rows stay the same while the curriculum moves on.
    return (
        f"packing=isolated with block_size=seq_len={length}: a document begins at a multiple of the largest block, so in every "
        "phase each row holds one document, and end tokens that carry loss fill what it leaves; use packing=wrap or a "
        "smaller largest block to pack short documents together."
    )


def prepare_and_open(config: Config, *, rank: int, say: Callable[[str], None]) -> RunData:
    """Rank 0 prepares, all wait, all open. Collective."""
    if rank == 0:
        prepare_text(config, say)
        if (remark := isolation_remark(config)) is not None:
            say(remark)
    # The folder appears whole, but only after rank 0 is done; nobody may look before.
    dist.barrier()
    data = open_data(config)
    for sentence in data.by_source.left_out:
        say(sentence)
    if (remark := answers_remark(data.train.counts())) is not None:
        say(remark)
    return data


def answers_remark(counts: Sequence[Mapping[str, int]]) -> str | None:
    """What is predicted of the training sources, or None where it is everything."""
    of_answers = [source for source in counts if "supervised" in source]
    if not of_answers:
        return None
    share = sum(source["supervised"] for source in of_answers) / sum(source["tokens"] for source in of_answers)
    # Text mixed in keeps a model from forgetting; it is allowed and said, since a forgotten --messages looks the same.
    plain = "; of the others every token is" if len(of_answers) < len(counts) else ""
    return (
        f"{len(of_answers)} of {len(counts)} training sources hold prompts with their answers: only the answers, "
        f"{100 * share:.0f}% of their tokens, are predicted{plain}"
    )
