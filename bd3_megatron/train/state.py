"""What a run must remember beyond weights and optimizer: a few numbers, as JSON inside the checkpoint's manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """What must be the same text, cut alike, for a run to go on."""

    tokenizer: dict[str, Any]
    """Fingerprint and special ids of the tokenizer that made the ids."""
    rows: dict[str, Any]
    """train: rows, documents and tokens of each source; valid: of the held-out split, None where there is none."""

    def to_json(self) -> dict[str, Any]:
        """Both, as the train state holds them."""
        return asdict(self)


@dataclass
class TrainState:
    """Mutable; the trainer owns it."""

    step: int = 0
    """Optimizer updates made."""
    samples_consumed: int = 0
    """Samples of the data order that are used up; skipped batches count."""
    block_size: int | None = None
    """Diffusion block S of the update that led to this state; None before the first, and in checkpoints of older versions."""
    intervals: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Block size -> searched interval (beta, omega)."""
    skipped_steps: int = 0
    """Updates left out so far (loss or gradients not finite, loss spikes)."""
    skipped_in_a_row: int = 0
    """Updates left out since the last one that was made."""
    finite_step: int = 0
    """The newest state whose weights are known to give a finite loss and gradient; its checkpoint is kept."""
    recent_losses: list[float] = field(default_factory=list)
    """What the loss-spike guard compares with; empty while it is off."""
    rolled_back_to: int | None = None
    """The checkpoint a spike last sent the run back to; a second spike behind it is skipped, or a run could circle."""
    tokenizer: dict[str, Any] | None = None
    """Fingerprint and special ids of the tokenizer that made the data; None in checkpoints of older versions."""
    rows: dict[str, Any] | None = None
    """Rows, documents and tokens of the sources (see DataIdentity); None in checkpoints of older versions."""
    data: dict[str, Any] | None = None
    """What the data order must remember beside the samples consumed: the mixture's stages, or its stream shards' positions."""
    wandb_id: str | None = None
    """The tracker's run id, kept across restarts."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> TrainState:
        """The state that `to_json` wrote (JSON turns integer keys into text)."""
        # JSON turns integer keys into text and tuples into lists.
        intervals = {int(size): (pair[0], pair[1]) for size, pair in tree.get("intervals", {}).items()}
        return cls(**{**tree, "intervals": intervals})
