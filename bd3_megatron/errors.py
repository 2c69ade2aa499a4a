"""Typed errors and the sentences users read.

Every error a user can cause is a `BD3Error`. Its message is one sentence with the value, the law and the remedy; the
command line prints that sentence and exits with `exit_code`, never a traceback. Programming mistakes stay ordinary
Python exceptions on purpose: a traceback is the right report for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BD3Error(Exception):
    """A mistake in the input that the user can mend. `exit_code` is what the command line returns for it."""

    exit_code = 2


class ConfigError(BD3Error):
    """A configuration that cannot be run: unknown key, wrong type, or values that contradict each other."""


class GridError(ConfigError):
    """A parallel grid that is illegal for this model, sequence length or world size."""


class ShapeError(BD3Error, ValueError):
    """A tensor whose shape or dtype is not what the function's law asks for."""


class RangeError(BD3Error, ValueError):
    """A number outside the range in which the function is defined."""


class DataError(BD3Error):
    """Text, shards or batches that are missing, damaged or do not fit the configuration."""


class FileError(BD3Error, OSError):
    """A file or folder that cannot be written; `errno` is the operating system's."""


class WorkStopped(DataError):
    """Preparation that stopped for a reason outside the text (full disk, killed worker); what is finished is kept."""


class TokenizerError(DataError):
    """A tokenizer that lacks what training needs, or does not match the shards."""


class CheckpointError(BD3Error):
    """A checkpoint that is missing, torn, corrupt or of another model."""


class ConversionError(BD3Error):
    """Weights that cannot be translated exactly between two formats."""


class BackendError(BD3Error):
    """An attention backend or engine that was asked for and cannot serve the request; says why."""


class SamplingError(BD3Error):
    """A request the sampler cannot serve exactly as asked."""


class LaunchError(BD3Error):
    """A job that cannot be started as described."""


class RankFailure(BD3Error):
    """Another rank of the job died or stopped answering; names it."""

    exit_code = 1


def check_shape(name: str, actual: Sequence[int], expected: Sequence[int | None]) -> None:
    """Refuse a tensor shape that differs from `expected` (None matches any size).

    Raises:
        ShapeError: "NAME has shape [..]; expected [..] ..." when ranks or sizes differ.
    """
    same_rank = len(actual) == len(expected)
    if same_rank and all(e is None or a == e for a, e in zip(actual, expected, strict=True)):
        return
    wanted = ", ".join("any" if e is None else str(e) for e in expected)
    raise ShapeError(f"{name} has shape {list(actual)}; expected [{wanted}].")


def divisors(number: int) -> list[int]:
    """All positive divisors of `number`, ascending (for the remedies in error sentences)."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def check_divides(
    divisor_name: str, divisor: int, number_name: str, number: int, *, kind: type[BD3Error] = ConfigError
) -> None:
    """Refuse a divisor that does not divide `number`, naming the legal divisors.

    Raises:
        kind: "tp=3 does not divide num_heads=16; use 1, 2, 4, 8 or 16."
    """
    if divisor > 0 and number % divisor == 0:
        return
    raise kind(f"{divisor_name}={divisor} does not divide {number_name}={number}; use {either(divisors(number))}.")


def check_multiple(
    number_name: str, number: int, factor_name: str, factor: int, *, kind: type[BD3Error] = ConfigError
) -> None:
    """Refuse a number that is not a positive multiple of `factor`, naming the nearest two that are.

    Raises:
        kind: "seq_len=1000 is not a multiple of block_size=16; use 992 or 1008."
    """
    if number > 0 and number % factor == 0:
        return
    below = number // factor * factor
    near = [n for n in (below, below + factor) if n > 0] or [factor]
    raise kind(f"{number_name}={number} is not a multiple of {factor_name}={factor}; use {either(near)}.")


def either(options: Iterable[object]) -> str:
    """'1, 2 or 4' from [1, 2, 4]."""
    words = [str(o) for o in options]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


class LeakError(BD3Error):
    """A noisy block sees what it must not, or does not see what it must; the table of offenders is in the message."""

    exit_code = 3


class NodeFailure(BD3Error):
    """A node of the job that is broken, slow or unlike the others; names it. Another attempt elsewhere may succeed."""

    exit_code = 1
