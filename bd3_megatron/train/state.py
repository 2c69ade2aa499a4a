"""What a run must remember beyond weights and optimizer: a few numbers, as JSON inside the checkpoint's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from bd3_megatron.config.load import build
from bd3_megatron.config.ranges import Range
from bd3_megatron.config.schema import NoiseLevel
from bd3_megatron.data.held_out import GREATEST_FRACTION
from bd3_megatron.errors import CheckpointError, ConfigError

# what a float64 of a record still tells apart
Count = Annotated[int, Range(0, 2**53)]
BlockSize = Annotated[int, Range(1, 1e8)]


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """What must be the same text, cut alike, for a run to go on."""

    tokenizer: dict[str, Any]
    """Fingerprint and special ids of the tokenizer that made the ids."""
    rows: dict[str, Any]
    """train: rows, documents and tokens of each source; valid: of the held-out split, None where there is none;
    held_out_fraction: share of documents held out by content, which the training text leaves out."""

    def to_json(self) -> dict[str, Any]:
        """Both, as the train state holds them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CountedSource:
    """Size of one source, as the train state holds it."""

    rows: Count
    documents: Count
    tokens: Count
    supervised: Count | None = None
    """Tokens that are predicted; None: all are."""


@dataclass(frozen=True, kw_only=True)
class CountedData:
    """What `DataIdentity.rows` holds."""

    train: tuple[CountedSource, ...]
    """By source."""
    valid: CountedSource | None
    """Of the held-out split."""
    held_out_fraction: Annotated[float, Range(0, GREATEST_FRACTION)] | None = None
    """Share of documents held out by content; None in checkpoints of older versions."""


@dataclass
class TrainState:
    """Mutable; the trainer owns it."""

    step: Count = 0
    """Optimizer updates made."""
    samples_consumed: Count = 0
    """Samples of the data order that are used up; skipped batches count."""
    origin_step: Count | None = None
    """The state at which the attempt began to count by its own batch sizes; None in checkpoints of older versions."""
    origin_samples: Count | None = None
    """Samples consumed there: with the batch sizes since, they give the samples consumed now."""
    block_size: BlockSize | None = None
    """Diffusion block S of the update that led to this state; None before the first, and in checkpoints of older versions."""
    intervals: dict[BlockSize, tuple[NoiseLevel, NoiseLevel]] = field(default_factory=dict)
    """Block size -> searched interval (beta, omega)."""
    skipped_steps: Count = 0
    """Updates left out so far (loss or gradients not finite, loss spikes)."""
    skipped_in_a_row: Count = 0
    """Updates left out since the last one that was made."""
    finite_step: Count = 0
    """The newest state whose weights are known to give a finite loss and gradient; its checkpoint is kept."""
    recent_losses: list[float] = field(default_factory=list)
    """What the loss-spike guard compares with; empty while it is off."""
    rolled_back_to: Count | None = None
    """The checkpoint a spike last sent the run back to; a second spike behind it is skipped, or a run could circle."""
    tokenizer: dict[str, Any] | None = None
    """Fingerprint and special ids of the tokenizer that made the data; None in checkpoints of older versions."""
    rows: dict[str, Any] | None = None
    """Rows, documents and tokens of the sources (see DataIdentity); None in checkpoints of older versions."""
    data: dict[str, Any] | None = None
    """What the data order must remember beside the samples consumed: the mixture's stages, or its stream shards' positions."""
    cpu_peak: dict[str, float] | None = None
    """Measured peak of a CPU rank (TFLOP/s) and the ranks that shared the machine; a resumed run goes on with it."""
    wandb_id: str | None = None
    """The tracker's run id, kept across restarts."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], where: str) -> TrainState:
        """The state that `to_json` wrote.

        Args:
            tree: plain data.
            where: the file it is from, for the sentence.

        Raises:
            CheckpointError: an unknown field, or a value of another type or outside its range.
        """
        intervals = tree.get("intervals", {})
        if isinstance(intervals, Mapping):
            # JSON turns whole numbers into text where they are keys
            whole = {int(size) if str(size).isdecimal() else size: pair for size, pair in intervals.items()}
            tree = {**tree, "intervals": whole}
        try:
            made: TrainState = build(cls, tree, where="train_state")
            if made.rows is not None:
                build(CountedData, made.rows, where="train_state.rows")
        except ConfigError as error:
            raise CheckpointError(f"{where} is damaged ({str(error).rstrip('.')}); use another checkpoint.") from error
        return made
