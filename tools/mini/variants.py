"""What the miniature trains: models that differ in the objective only, at equal tokens and parameters.

Decides the two-phase recipe at small scale: masked diffusion over the whole sequence (S = L) first, then blocks of S from
the same weights, optimizer state and data order. The first phase is the same for every S, so it is trained once a seed
and branched. The trunk itself, trained to the end, is the MDLM of the comparison. The AR model trains from scratch on the
same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bd3_megatron.diffusion.constants import MIN_T
from bd3_megatron.diffusion.objective import objective_named

MINI_SEQ_LEN = 128
TRUNK = "mdlm"
WHOLE_INTERVAL = (MIN_T, 1.0)


@dataclass(frozen=True, kw_only=True)
class MiniSize:
    """How much is trained and measured."""

    steps: int
    """Updates of every model."""
    branch_step: int
    """Updates of the first phase."""
    seeds: tuple[int, ...]
    num_sequences: int
    """Held-out sequences scored."""
    draws: int
    """Noise draws a sequence."""
    variants: tuple[str, ...]
    with_frontier: bool
    global_batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model of the comparison."""

    name: str
    label: str
    objective: str = "block"
    block_size: int = MINI_SEQ_LEN
    interval: tuple[float, float] | None = None
    """Noise interval of the second phase; None: what the search finds (or full masking at S = 1)."""

    @property
    def is_branch(self) -> bool:
        """Trained from the trunk's checkpoint."""
        return objective_named(self.objective).has_noise and self.block_size < MINI_SEQ_LEN


VARIANTS = {
    one.name: one
    for one in (
        Variant(name="ar", label="AR", objective="ar", block_size=1),
        Variant(name="s1", label="S = 1, all masked", block_size=1, interval=(1.0, 1.0)),
        Variant(name="s1_uniform", label="S = 1, t in [0, 1]", block_size=1, interval=WHOLE_INTERVAL),
        Variant(name="s4", label="S = 4", block_size=4),
        Variant(name="s4_uniform", label="S = 4, t in [0, 1]", block_size=4, interval=WHOLE_INTERVAL),
        Variant(name="s8", label="S = 8", block_size=8),
        Variant(name="s16", label="S = 16", block_size=16),
        Variant(name="s16_uniform", label="S = 16, t in [0, 1]", block_size=16, interval=WHOLE_INTERVAL),
        Variant(name=TRUNK, label="MDLM (S = L)"),
    )
}
"""By name, in the order of the table."""

QUICK = MiniSize(
    steps=400,
    branch_step=240,
    seeds=(1,),
    num_sequences=256,
    draws=4,
    variants=("ar", "s1", "s4", "s4_uniform", "s8", "s16", TRUNK),
    with_frontier=False,
)
WHOLE = MiniSize(
    steps=6000,
    branch_step=3600,
    seeds=(1, 2, 3),
    num_sequences=1024,
    draws=8,
    variants=tuple(VARIANTS),
    with_frontier=True,
)


def base_tree(size: MiniSize, *, data: str) -> dict[str, Any]:
    """The configuration that all models share.

    Args:
        size: of the miniature.
        data: prepared folder.
    """
    return {
        "run": {"dir": "runs/mini"},
        "model": {"style": "modern", "num_layers": 4, "hidden_size": 128, "num_heads": 4},
        "data": {"path": data, "seq_len": MINI_SEQ_LEN},
        "diffusion": {"block_size": MINI_SEQ_LEN},
        "parallel": {"dp": 1},
        "train": {
            "steps": size.steps,
            "global_batch_size": size.global_batch_size,
            "micro_batch_size": size.global_batch_size,
        },
        "optim": {
            # The same for all: warm-up, constant, linear decay over the end of the budget. The trunk's checkpoint lies
            # before the decay.
            "lr": 2e-3,
            "schedule": "wsd",
            "warmup_steps": min(100, size.steps // 20),
            "decay_fraction": 0.2,
            "betas": [0.9, 0.95],
            "weight_decay": 0.01,
            "ema_decay": 0.995,
        },
        # One lies exactly where the branches begin, and all are kept.
        "checkpoint": {"every_steps": size.branch_step, "keep_last": 0},
        "evaluate": {"every_steps": max(1, size.steps // 10), "num_sequences": 64, "draws": 2},
        "log": {"every_steps": max(1, size.steps // 100)},
        # a machine without a neighbour to hang on, and a model that is checked by the suite
        "watch": {"preflight": False, "leak_check": False},
    }


def overrides(variant: Variant, size: MiniSize, *, seed: int, run_dir: str) -> list[str]:
    """What a model's command names beside the shared configuration."""
    named = [f"run.dir={run_dir}", f"run.seed={seed}"]
    if not objective_named(variant.objective).has_noise:
        return [*named, "diffusion.objective=ar"]
    if not variant.is_branch:
        return named
    # The first phase repeats the trunk's: a branch finds itself at its end when it starts.
    second = {"block_size": variant.block_size}
    phases = f"[{{block_size: {MINI_SEQ_LEN}, steps: {size.branch_step}}}, {_flow(second, variant.interval)}]"
    named += [f"diffusion.block_size={variant.block_size}", f"diffusion.phases={phases}"]
    if variant.interval is None:
        # Four searches in the second phase: the interval follows the model.
        every = max(1, (size.steps - size.branch_step) // 4)
        named += [f"diffusion.search_every_steps={every}", "diffusion.search_batches=8"]
    return named


def _flow(second: dict[str, int], interval: tuple[float, float] | None) -> str:
    content = [f"{key}: {value}" for key, value in second.items()]
    if interval is not None:
        content.append(f"interval: [{interval[0]}, {interval[1]}]")
    return "{" + ", ".join(content) + "}"
