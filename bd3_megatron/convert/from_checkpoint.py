"""A run's checkpoint as a Hugging Face folder: averaged or raw weights, streamed, proved at the end.

Decides: which checkpoint of a run is meant (the newest complete one), what BD3Config says (from the manifest: shape,
block size of the phase in force at that step, ids of the prepared data), where the tokenizer's files are. The proof
compares logits of the written folder with logits computed on the parallel tensors (layerwise.py).
Refuses: damaged checkpoints, an average where none was kept, a result whose logits differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bd3_megatron.checkpoint.describe import config_of
from bd3_megatron.checkpoint.layout import MANIFEST, Manifest
from bd3_megatron.checkpoint.read import CheckpointReader, open_checkpoint
from bd3_megatron.checkpoint.verify import newest_valid, verify
from bd3_megatron.config.curriculum import curriculum_of
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.layerwise import NUM_BLOCKS, parallel_logits, plain_logits, proof_span, random_tokens
from bd3_megatron.convert.model_card import model_card
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.plain_config import plain_config, run_tokenizer
from bd3_megatron.convert.plain_source import CheckpointSource, FolderSource
from bd3_megatron.convert.to_hf import stream_folder
from bd3_megatron.data.shard_header import read_header
from bd3_megatron.data.tokenizer_open import check_folder_tokenizer
from bd3_megatron.data.vocabulary import TOKENIZER_COPY
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import CheckpointError, ConversionError, DataError, TokenizerError
from bd3_megatron.hf.configuration_bd3 import BD3Config

PROOF_TOLERANCE = 1e-5
"""Of the largest absolute logit, or of 1 where that is smaller: two fp32 forwards that add in another order."""

WEIGHTS = {"ema": "averaged", "model": "raw"}
"""What people call the two sets of weights of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did, for people."""

    out: Path
    source: Path
    step: int
    which: str
    num_parameters: int
    max_logit_difference: float
    notes: tuple[str, ...]


def find_checkpoint(run_or_checkpoint: Path, *, warn: Callable[[str], None] | None = None) -> Path:
    """The checkpoint a person means by naming a run's folder, its checkpoints folder, or one checkpoint.

    Raises:
        CheckpointError: there is none, or none that is complete.
    """
    if (run_or_checkpoint / MANIFEST).is_file():
        # Named by hand, it is checked like one that was searched for.
        verify(run_or_checkpoint)
        return run_or_checkpoint
    folder = run_or_checkpoint / "checkpoints" if (run_or_checkpoint / "checkpoints").is_dir() else run_or_checkpoint
    if not folder.is_dir():
        raise CheckpointError(f"{run_or_checkpoint} does not exist; give a run's folder or one of its checkpoints.")
    found = newest_valid(folder, warn=warn)
    if found is None:
        raise CheckpointError(
            f"{run_or_checkpoint} holds no complete checkpoint; give a run's folder or one of its checkpoints."
        )
    return found[0]


def convert_checkpoint(
    run_or_checkpoint: Path,
    out: Path,
    *,
    raw: bool = False,
    dtype: torch.dtype = torch.float32,
    licence: str | None = None,
    warn: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Write the folder of a checkpoint and prove it.

    Args:
        run_or_checkpoint: folder of a run, or one checkpoint.
        out: the folder to write; an older exported folder there is replaced.
        raw: the trained weights instead of their average.
        dtype: of the stored weights.
        licence: for the model card; a Hugging Face licence id; None: it names none.
        warn: told about checkpoints that were skipped.

    Raises:
        CheckpointError, ConversionError: see the module.
    """
    path = find_checkpoint(run_or_checkpoint, warn=warn)
    reader = open_checkpoint(path)
    manifest, config = reader.manifest, config_of(reader.manifest, path)
    which = "model" if raw or "ema" not in reader.kinds() else "ema"
    # Streamed: a parameter at a time, whatever the size of the model.
    source = CheckpointSource(reader, NameTable(config.model, manifest.vocab_size), which)
    data_dir = data_dir_of(config, path)
    # From the manifest alone where the data is gone; what is not known becomes a remark.
    described, notes = describe_model(config, manifest, data_dir)
    if which == "model" and not raw and not manifest.origin:
        notes.append("the checkpoint keeps no average; its trained weights were taken")
    tokenizer = tokenizer_of(path, data_dir, manifest)
    if tokenizer is None:
        notes.append("no tokenizer was found in the run or beside its data; copy its files into the folder")
    facts: dict[str, Any] = {
        "has_tokenizer": tokenizer is not None,
        "weights": WEIGHTS[which],
        "num_parameters": sum(math.prod(source.shape(name)) for name in source.names()),
    }
    card = model_card(described, config, manifest, licence=licence, run_dir=path.parent.parent, **facts)
    proof: list[float] = []

    def check(folder: Path) -> None:
        # The proof reads every tensor once more; the last one read for writing need not stay.
        source.release()
        proof.append(prove(reader, which, config, FolderSource(folder), described, dtype=dtype))

    stream_folder(source, described, out, tokenizer_dir=tokenizer, dtype=dtype, card=card, check=check)
    return ConversionReport(
        out=out,
        source=path,
        step=manifest.step,
        which=WEIGHTS[which],
        num_parameters=facts["num_parameters"],
        max_logit_difference=proof[0],
        notes=tuple(notes),
    )


def prove(
    reader: CheckpointReader,
    which: str,
    config: Config,
    folder: FolderSource,
    described: BD3Config,
    *,
    dtype: torch.dtype,
) -> float:
    """Compare logits of a written folder with the checkpoint's on random tokens.

    Args:
        reader: the checkpoint; its tensors are rounded to `dtype` first, as the folder's were.
        which: "ema" or "model".
        config: the run.
        folder: what was written.
        described: its configuration.
        dtype: of the folder's weights.

    Returns:
        The largest absolute difference.

    Raises:
        ConversionError: it exceeds PROOF_TOLERANCE.
    """
    span = proof_span(described.objective, described.block_size)
    vocab_size = described.vocab_size
    # Random ids reach every row of the tables alike; text would leave rare rows unproved.
    noisy_BL = random_tokens(vocab_size, NUM_BLOCKS * span)
    clean_BL = (
        random_tokens(vocab_size, NUM_BLOCKS * span, seed=2) if objective_named(described.objective).has_noise else None
    )

    there = parallel_logits(
        partial(reader.tensor, which=which),
        config.model,
        noisy_BL,
        clean_BL,
        span=span,
        vocab_size=vocab_size,
        rounded_to=dtype,
    )
    here = plain_logits(folder, described, noisy_BL, clean_BL, span=span)
    return checked_difference(there, here, "the written folder and the checkpoint")


def checked_difference(expected: Tensor, found: Tensor, what: str) -> float:
    """Largest absolute difference of two logit tensors.

    Raises:
        ConversionError: above PROOF_TOLERANCE of the largest logit, or not a number.
    """
    difference = (expected - found).abs().max().item()
    allowed = PROOF_TOLERANCE * max(1.0, expected.abs().max().item())
    # Written this way round, so that a NaN is refused.
    if not difference <= allowed:
        raise ConversionError(
            f"logits of {what} differ by {difference:.3g}, more than {allowed:.3g}; do not use the result."
        )
    return difference


def tokenizer_of(checkpoint: Path, data_dir: Path | None, manifest: Manifest) -> Path | None:
    """The folder of a run's tokenizer: the run's own copy, or the one beside its data; None: neither is there.

    Args:
        checkpoint: of the run.
        data_dir: the prepared data; None: gone.
        manifest: of the checkpoint, whose train state holds the fingerprint (older ones do not).

    Raises:
        TokenizerError: it is damaged, or another one than the run's: data prepared again, or moved.
    """
    named = [checkpoint.parent.parent / TOKENIZER_COPY, *([] if data_dir is None else [data_dir / "tokenizer"])]
    folder = next((path for path in named if path.is_dir()), None)
    # The fingerprint decides and not the path: data may be prepared again in the same folder.
    fingerprint = run_tokenizer(manifest).get("fingerprint")
    if folder is not None and fingerprint is not None:
        check_folder_tokenizer(folder, (fingerprint, f"the run at step {manifest.step}"))
    return folder


def describe_model(config: Config, manifest: Manifest, data_dir: Path | None) -> tuple[BD3Config, list[str]]:
    """BD3Config of a checkpoint, and remarks on what could not be told.

    Args:
        config: the run.
        manifest: the checkpoint's.
        data_dir: its prepared data, where the ids of special tokens stand; None: gone.
    """
    ids, notes = _special_ids(manifest, data_dir)
    try:
        described = plain_config(
            config.model,
            vocab_size=manifest.vocab_size,
            seq_len=config.data.seq_len,
            block_size=trained_block_size(config, manifest),
            mask_id=manifest.mask_id,
            objective=config.diffusion.objective,
            special_ids={f"{name}_token_id": value for name, value in ids.items()},
            evaluation=manifest.evaluation or None,
            tokenizer_fingerprint=run_tokenizer(manifest).get("fingerprint"),
        )
    except ValueError as error:
        # a manifest from outside may hold what no configuration file could
        raise ConversionError(f"the checkpoint describes no model: {error}") from None
    return described, notes


def _special_ids(manifest: Manifest, data_dir: Path | None) -> tuple[dict[str, int | None], list[str]]:
    """Begin, end and padding ids of a run, and remarks where they are not known."""
    names = ("bos", "eos", "pad")
    # what the run wrote down goes before the data, which may have been prepared again
    recorded = run_tokenizer(manifest)
    if all(name in recorded for name in names):
        return {name: recorded[name] for name in names}, []
    if data_dir is None:
        return {}, ["the run's data was not found; begin, end and padding ids are left out"]
    try:
        special = read_header(data_dir / "train").special_ids
    except (DataError, TokenizerError) as error:
        return {}, [f"ids of special tokens are unknown: {error}"]
    return {"bos": special.bos, "eos": special.eos, "pad": special.pad}, []


def trained_block_size(config: Config, manifest: Manifest) -> int:
    """Block size of the update that led to a checkpoint: what its train state says.

    Args:
        config: the run.
        manifest: the checkpoint's.
    """
    recorded: int | None = manifest.train_state.get("block_size")
    if recorded is not None:
        return recorded
    # checkpoints of older versions, and of state 0, do not say; the run's curriculum does
    return curriculum_of(config, num_steps=max(1, manifest.step)).trained_block_size(manifest.step)


def data_dir_of(config: Config, checkpoint: Path) -> Path | None:
    """The prepared data, as the run names it or beside the run."""
    # Paths of another machine are common; the run's own folder is looked into as well.
    named = [config.data.path, *config.data.mixed_folders]
    near = [checkpoint.parent.parent / "data", Path(config.run.dir) / "data"]
    return next((p for p in [*(Path(n) for n in named if n is not None), *near] if (p / "train").is_dir()), None)
