"""How a model's likelihood is measured: the one record that its run's manifest and its exported config.json carry.

Contract: evaluation in the loop, of a run, of an exported folder and by lm-evaluation-harness cut the same rows from the
same documents and count the same tokens, because all of them read this record. What a caller asks for otherwise is said
aloud. Precision (sequences, draws, seed) is no part of it. Refuses records whose values no evaluation can have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bd3_megatron.data.loader import TokenDataset
from bd3_megatron.data.packing import MODES, PackingRule
from bd3_megatron.diffusion.noise_schedule import MIN_T
from bd3_megatron.errors import ConfigError, either


@dataclass(frozen=True, kw_only=True)
class EvaluationConvention:
    """Which rows are scored and which of their tokens are counted.

    Raises:
        ConfigError: an unknown packing, or a smallest noise level outside [1e-3, 1).
    """

    packing: str = "wrap"
    """How documents become rows: wrap, isolated or pad."""
    # Evaluation may use a smaller block than training; rows cut for the largest block fit all of its divisors.
    aligned_block: int = 1
    """Tokens; isolated documents begin at multiples of it: the largest diffusion block of the run."""
    append_eos: bool = True
    """An end token follows every document."""
    wrap_special: bool = False
    """Rows are BOS + L-2 tokens + EOS (wrap only)."""
    first_token_given: bool = False
    """The first token of a row is seen and not counted."""
    min_t: float = MIN_T
    """Smallest noise level of the bound, in [1e-3, 1); the largest is 1."""

    def __post_init__(self) -> None:
        if self.packing not in MODES:
            raise ConfigError(f"packing={self.packing[:80]!r} is not known; use {either(MODES)}.")
        if not MIN_T <= self.min_t < 1:
            raise ConfigError(f"min_t={self.min_t:g} is outside [{MIN_T:g}, 1); use {MIN_T:g} as in the paper.")

    def packing_rule(self, seq_len: int) -> PackingRule:
        """The rule by which rows of `seq_len` tokens are cut.

        Raises:
            ConfigError: the parts do not fit together.
        """
        return PackingRule(
            seq_len=seq_len,
            mode=self.packing,
            block_size=self.aligned_block,
            append_eos=self.append_eos,
            wrap_special=self.wrap_special,
        )

    def open_rows(self, path: Path, *, seq_len: int) -> TokenDataset:
        """The rows of one prepared split, in their own order.

        Raises:
            DataError: a split that is missing, damaged or too small for one row.
            ConfigError: the parts do not fit together.
        """
        rule = self.packing_rule(seq_len)
        return TokenDataset.open(
            path,
            seq_len=seq_len,
            packing=rule.mode,
            block_size=rule.block_size,
            append_eos=rule.append_eos,
            wrap_special=rule.wrap_special,
            # Every evaluation must score the same rows, so their order may not depend on a seed.
            shuffle=False,
        )

    def changed(self, **asked: Any) -> tuple[EvaluationConvention, tuple[str, ...]]:
        """(the convention with what was asked for, the names of what differs from the model's); None is not asked.

        Raises:
            ConfigError: a value that no evaluation can have.
        """
        # None is a command-line option that was not given.
        given = {name: value for name, value in asked.items() if value is not None}
        # rows with special tokens at both ends exist under wrap only: asking for another packing leaves them out
        if given.get("packing", "wrap") != "wrap":
            given.setdefault("wrap_special", False)
        other = replace(self, **given)
        return other, tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))

    def to_json(self) -> dict[str, Any]:
        """The record as manifests and config.json hold it."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for people."""
        rows = f"{self.packing} packing" + (f" aligned to {self.aligned_block}" if self.packing == "isolated" else "")
        special = ", rows between BOS and EOS" if self.wrap_special else ""
        end = "an end token after every document" if self.append_eos else "no end tokens"
        first = "the first token of a row given" if self.first_token_given else "every token of a row counted"
        return f"{rows}{special}, {end}, {first}, noise levels from {self.min_t:g}"


def convention_from_json(record: Mapping[str, Any], where: str) -> EvaluationConvention:
    """The convention of a manifest or config.json; what it does not name has its default.

    Args:
        record: by field name.
        where: the file, for the sentence.

    Raises:
        ConfigError: an unknown name, or a value of another type.
    """
    # The defaults are the schema: the record has no second list of types.
    kinds = {f.name: type(f.default) for f in fields(EvaluationConvention)}
    for name, value in record.items():
        kind = kinds.get(name)
        # json has one kind of number: 1 may stand for 1.0, but True for no number
        is_right = kind is not None and (type(value) is kind or (kind is float and type(value) is int))
        if not is_right:
            raise ConfigError(
                f"{where}: evaluation.{name}={str(value)[:80]!r} is no part of an evaluation convention; use "
                f"{', '.join(f'{n} ({k.__name__})' for n, k in kinds.items())}."
            )
    return EvaluationConvention(**record)
