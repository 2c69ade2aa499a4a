"""Perplexity of an exported folder or a run's checkpoint with the plain model, on one device or on several ranks.

Contract: the same rows, noise and sums as on the training grid, so the same checkpoint gives the same number. Refuses
folders that hold no model, text of another vocabulary or tokenizer, a split shorter than one sequence.
Costs one pass over [noisy; clean] of every row; under torchrun every rank holds the whole model and scores its share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.checkpoint.describe import config_of
from bd3_megatron.checkpoint.layout import MANIFEST
from bd3_megatron.checkpoint.read import CheckpointReader, open_checkpoint
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.from_checkpoint import data_dir_of, describe_model, find_checkpoint
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.plain_source import CheckpointSource
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.convention import EvaluationConvention, convention_from_json
from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.tokenizer_fingerprint import check_same_tokenizer
from bd3_megatron.data.tokenizer_open import check_folder_tokenizer
from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.diffusion.objective import NextToken
from bd3_megatron.errors import CheckpointError, DataError
from bd3_megatron.evaluate.noise_plan import NoisePlan
from bd3_megatron.evaluate.perplexity import (
    Estimate,
    HeldOut,
    ScoreSettings,
    ScoreSums,
    deal,
    estimate,
    read_share,
    score_table,
)
from bd3_megatron.evaluate.plain_forward import next_token_hidden, noisy_hidden, token_scores
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.plain_bd3 import PlainBD3, plain_model
from bd3_megatron.sampling.folder import check_model_tokenizer, read_config, read_weights


@dataclass(frozen=True)
class Work:
    """Where and how a plain model computes."""

    device: torch.device = torch.device("cpu")
    batch_size: int = 8
    """Rows of one forward; the result does not depend on it."""
    rank: int = 0
    ranks: int = 1
    """Processes that split the rows; more than one needs an initialised process group."""


@dataclass(frozen=True)
class ModelFolder:
    """A model that can be loaded: what it is is read, its weights are not."""

    path: Path
    config: BD3Config
    run_config: Config | None
    """The configuration of the run whose checkpoint it is; None for an exported folder."""
    reader: CheckpointReader | None
    """That checkpoint."""

    def load(self, *, device: torch.device, dtype: torch.dtype | None = None) -> PlainBD3:
        """The plain model in eval mode; of a checkpoint the averaged weights, or the raw ones where no average was kept.

        Args:
            device: where it goes.
            dtype: of its parameters; None: as stored.

        Raises:
            CheckpointError: weights that are damaged, or of another shape.
        """
        state = read_weights(self.path) if self.reader is None else self._checkpoint_state(self.reader)
        # before the model is built: a float64 request must not pass through a float32 model
        if dtype is not None:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        try:
            model = plain_model(self.config, state)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path} holds weights of another model ({error}); export the folder again."
            ) from None
        return model.to(device)

    def _checkpoint_state(self, reader: CheckpointReader) -> dict[str, Tensor]:
        assert self.run_config is not None  # open_model gives both or neither
        table = NameTable(self.run_config.model, reader.manifest.vocab_size)
        # The averaged weights, as an export of this checkpoint would hold.
        source = CheckpointSource(reader, table, "ema" if "ema" in reader.kinds() else "model")
        return {name: source.tensor(name) for name in source.names()}


def open_model(folder: Path) -> ModelFolder:
    """What a folder holds: an exported model, or the newest checkpoint of a run.

    Args:
        folder: made by tools/convert_checkpoint.py; or a run folder, or one checkpoint of it.

    Raises:
        CheckpointError: nothing there, or damaged.
        TokenizerError: an exported folder's tokenizer is not the one its model learned.
    """
    is_run = (folder / "checkpoints").is_dir() or (folder / MANIFEST).is_file()
    # An export may lie inside a run's folder; it is what the path names.
    if not is_run or (folder / "config.json").is_file():
        config = read_config(folder)
        check_model_tokenizer(folder, config)
        return ModelFolder(folder, config, None, None)
    path = find_checkpoint(folder)
    reader = open_checkpoint(path)
    run_config = config_of(reader.manifest, path)
    described, _ = describe_model(run_config, reader.manifest, data_dir_of(run_config, path))
    return ModelFolder(folder, described, run_config, reader)


def load_model(folder: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> tuple[PlainBD3, BD3Config]:
    """The plain model of a folder and its configuration; see `open_model` and `ModelFolder.load`."""
    opened = open_model(folder)
    return opened.load(device=device, dtype=dtype), opened.config


def model_convention(config: BD3Config) -> EvaluationConvention:
    """The convention that a model's run recorded; the default one where there is no record.

    Raises:
        ConfigError: a record that no evaluation can have.
    """
    if config.evaluation is None:
        return EvaluationConvention(aligned_block=config.block_size)
    return convention_from_json(config.evaluation, "config.json")


def open_split(
    data: Path, folder: Path, config: BD3Config, convention: EvaluationConvention, *, split: str = "valid"
) -> TokenDataset:
    """The rows of prepared text, cut as the convention says, whatever the text's own recipe.

    Args:
        data: folder made by tools/prepare_data.py, or one split of it.
        folder: of the model; its tokenizer must have made the text.
        config: of the model.
        convention: the model's, or what was asked for instead.
        split: taken where `data` is the whole folder.

    Raises:
        DataError: missing, damaged or empty text, or ids that the model does not have.
        TokenizerError: the text was made by another tokenizer.
    """
    # The split itself may be named.
    path = data / split if (data / split).is_dir() else data
    dataset = convention.open_rows(path, seq_len=config.max_position_embeddings)
    # Fewer ids are possible: the model's table may be larger than its tokenizer.
    if dataset.vocab_size > config.vocab_size:
        raise DataError(
            f"{path} has a vocabulary of {dataset.vocab_size} and the model of {config.vocab_size}; "
            "prepare the text with the model's tokenizer."
        )
    # Equal sizes do not make equal tokenizers; perplexity under the wrong one is a number without meaning.
    text = (dataset.sources[0].shards.tokenizer_fingerprint, str(path))
    recorded = config.tokenizer_fingerprint
    if recorded is not None:
        check_same_tokenizer(text, (recorded, f"the model in {folder}"))
    else:
        # an older folder names no tokenizer; the one that lies in it is the best witness
        check_folder_tokenizer(folder, text)
    return dataset


def evaluate_plain(
    model: PlainBD3, dataset: HeldOut, settings: ScoreSettings, work: Work, *, mask_id: int | None
) -> Estimate:
    """Perplexity of a plain model; collective over `work.ranks` processes.

    Args:
        model: in eval mode on work.device.
        dataset: held-out rows.
        settings: what is asked.
        work: how.
        mask_id: the model's mask token.

    Returns:
        The same estimate on every rank.

    Raises:
        RangeError: nothing to score, or a request the model cannot serve.
    """
    return estimate(*score_plain(model, dataset, settings, work, mask_id=mask_id))


def score_plain(
    model: PlainBD3, dataset: HeldOut, settings: ScoreSettings, work: Work, *, mask_id: int | None
) -> tuple[NoisePlan, ScoreSums]:
    """The plan and the complete sums of all rows, as `estimate` and `sequence_scores` take them; arguments as above."""
    shape = model.model.shape
    plan = settings.plan(objective=shape.objective, block_size=shape.block_size, mask_id=mask_id)
    table = score_table(plan, num_rows=dataset.num_rows, num_sequences=settings.num_sequences)
    sums = ScoreSums(table, work.device)
    for share in deal(table, batch_size=work.batch_size, rank=work.rank, ranks=work.ranks):
        # a rank may have fewer rows than others; only the final sum is collective here
        if share.num_real == 0:
            continue
        clean, draw_B = read_share(dataset, table, share)
        noisy = plan.noisy(clean, draw_B)
        sums.put_counts(share, plan.counted(clean))
        sums.put_sums(share, weighted_sums(model, clean, noisy, work.device, mask_id=mask_id))
    if work.ranks > 1:
        # Rows of other ranks are zero here, so the sum is a gather.
        dist.all_reduce(sums.both_2R)
    return plan, sums


@torch.inference_mode()
def weighted_sums(
    model: PlainBD3, clean: CleanBatch, noisy: NoisyBatch | None, device: torch.device, *, mask_id: int | None
) -> Tensor:
    """The weighted NLL of each sequence of a batch: float64 [B] on `device`.

    Args:
        model: plain, on `device`.
        clean, noisy: the batch on the CPU; noisy None for the autoregressive objective.
        device: where to compute.
        mask_id: never predicted.
    """
    clean_BL = clean.tokens_BL.to(device)
    if noisy is None:
        rows = NextToken().loss_rows(
            clean.tokens_BL, [], document_id_BL=clean.document_id_BL, is_scored_BL=clean.scored_BL
        )[0]
        target_BL, is_loss_BL, weight_BL = rows.target_BL, rows.has_loss_BL, rows.weight_BL
        hidden_BLD = next_token_hidden(model, clean_BL, clean.document_id_BL)
    else:
        target_BL, is_loss_BL, weight_BL = noisy.clean_BL, noisy.is_masked_BL, noisy.weight_BL
        hidden_BLD = noisy_hidden(model, noisy.noisy_BL.to(device), clean_BL, clean.document_id_BL)
    rows_R = is_loss_BL.flatten().nonzero()[:, 0]
    hidden_RD = hidden_BLD.flatten(0, 1).index_select(0, rows_R.to(device))
    target_R = target_BL.flatten()[rows_R].to(device)
    nll_R, _ = token_scores(model, hidden_RD, target_R, mask_id=None if noisy is None else mask_id)
    # Sums in float64, so that the batch size shows in their last digits only.
    weighted_R = nll_R.double() * weight_BL.flatten()[rows_R].double().to(device)
    sample_R = (rows_R // clean.tokens_BL.shape[1]).to(device)
    return torch.zeros(len(clean_BL), dtype=torch.float64, device=device).index_add_(0, sample_R, weighted_R)
