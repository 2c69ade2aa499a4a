"""Typed errors and the sentences users read.

Every error a user can cause is a `BD3Error`. Its message is one sentence with the value, the law and the remedy; the
command line prints that sentence and exits with `exit_code`, never a traceback. Programming mistakes stay ordinary
Python exceptions on purpose: a traceback is the right report for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SHOWN_CHARACTERS = 80
"""A value or path that a sentence repeats is cut to this length: the sentence must stay readable."""
SENTENCE_CHARACTERS = 600
"""A message is never longer, whatever it repeats."""
LISTED_OPTIONS = 24
"""A sentence that names the legal values names at most this many."""
LARGEST_FACTORED = 10**12
"""Trial division to the square root answers in a tenth of a second up to here."""


@dataclass(frozen=True)
class ExitCode:
    """One row of the table of exit codes."""

    code: str
    """The number, or "128 + N" for a process that signal N ended."""
    meaning: str
    """What happened, as README says it."""
    may_retry: bool
    """Whether the same command may go on without a change: batch scripts submit only such runs again."""


# Batch systems act on these numbers, so a code keeps its meaning between releases.
EXIT_CODES = (
    ExitCode("0", "finished, or stopped on request after saving", True),
    ExitCode("1", "a rank or node failed, hung, or met a programming error (the only case with a traceback)", True),
    ExitCode(
        "2",
        "a mistake in the input (configuration, data, checkpoint, command line), or a disk that takes no more",
        False,
    ),
    ExitCode("3", "a block sees what it must not, found by `bd3 doctor` or at the start of a run", False),
    ExitCode("4", "another launch holds the folder", False),
    ExitCode("5", "the run learns nothing: too many updates in a row were not finite", False),
    ExitCode("128 + N", "ended by signal N before it could save (130: Ctrl-C)", True),
)
"""All exit codes of `bd3`; README shows this table, and launch/templates/job.sh decides by it."""


def final_codes() -> list[int]:
    """Exit codes after which the same command would fail again."""
    return [int(row.code) for row in EXIT_CODES if not row.may_retry]


class BD3Error(Exception):
    """A mistake in the input that the user can mend. `exit_code` is what the command line returns for it."""

    exit_code = 2


class UsageError(BD3Error):
    """A command line that its command cannot read."""


class ConfigError(BD3Error):
    """A configuration that cannot be run: unknown key, wrong type, or values that contradict each other."""


class GridError(ConfigError):
    """A parallel grid that is illegal for this model, sequence length or world size."""


# Also ValueError, which callers of tensor functions expect.
class ShapeError(BD3Error, ValueError):
    """A tensor whose shape or dtype is not what the function's law asks for."""


class RangeError(BD3Error, ValueError):
    """A number outside the range in which the function is defined."""


class DataError(BD3Error):
    """Text, shards or batches that are missing, damaged or do not fit the configuration."""


class FileError(BD3Error, OSError):
    """A file or folder that cannot be read or written; `errno` is the operating system's."""


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


class NodeFailure(BD3Error):
    """A node of the job that is broken, slow or unlike the others; names it. Another attempt elsewhere may succeed."""

    exit_code = 1


class LeakError(BD3Error):
    """A noisy block sees what it must not, or does not see what it must; the table of violations is in the message."""

    exit_code = 3


class FolderHeldError(BD3Error):
    """Another launch holds the folder; names its host, process and SLURM job."""

    exit_code = 4


class NonFiniteError(BD3Error):
    """Too many updates in a row were not finite: the run learns nothing."""

    exit_code = 5


def check_shape(name: str, actual: Sequence[int], expected: Sequence[int | None]) -> None:
    """Refuse a tensor shape that differs from `expected` (None matches any size).

    Raises:
        ShapeError: "NAME has shape [..]; expected [..] ..." when ranks or sizes differ.
    """
    # Ranks first: zip with strict=True raises on lists of different length.
    same_rank = len(actual) == len(expected)
    if same_rank and all(e is None or a == e for a, e in zip(actual, expected, strict=True)):
        return
    wanted = ", ".join("any" if e is None else str(e) for e in expected)
    raise ShapeError(f"{name} has shape {list(actual)}; expected [{wanted}].")


def divisors(number: int) -> list[int]:
    """All positive divisors of `number`, ascending (for the remedies in error sentences).

    Raises:
        RangeError: number above 10^12, where trial division takes too long.
    """
    if number > LARGEST_FACTORED:
        raise RangeError(f"{shown(number)} has too many digits to list its divisors; use at most {LARGEST_FACTORED:g}.")
    # Divisors come in pairs around the square root, so half of them give the others.
    small = [d for d in range(1, math.isqrt(max(0, number)) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def check_divides(
    divisor_name: str, divisor: int, number_name: str, number: int, *, kind: type[BD3Error] = ConfigError
) -> None:
    """Refuse a divisor that does not divide `number`, naming the legal divisors.

    Raises:
        kind: "tp=3 does not divide num_heads=16; use 1, 2, 4, 8 or 16."
    """
    # Zero and negative divisors come from user input and must not raise ZeroDivisionError.
    if divisor > 0 and number % divisor == 0:
        return
    # A huge number gets no list: an error must not take minutes to write.
    legal = either(divisors(number)) if 0 < number <= LARGEST_FACTORED else "one of its divisors"
    raise kind(f"{divisor_name}={shown(divisor)} does not divide {number_name}={shown(number)}; use {legal}.")


def check_multiple(
    number_name: str, number: int, factor_name: str, factor: int, *, kind: type[BD3Error] = ConfigError
) -> None:
    """Refuse a number that is not a positive multiple of `factor`, naming the nearest two that are.

    Raises:
        kind: "seq_len=1000 is not a multiple of block_size=16; use 992 or 1008."
    """
    if number > 0 and number % factor == 0:
        return
    # A negative or small number has no positive multiple below it, hence the filter.
    below = number // factor * factor
    near = [n for n in (below, below + factor) if n > 0] or [factor]
    wrong = f"{number_name}={shown(number)} is not a multiple of {factor_name}={shown(factor)}"
    raise kind(f"{wrong}; use {either(map(shown, near))}.")


def either(options: Iterable[object]) -> str:
    """'1, 2 or 4' from [1, 2, 4]; of a long list the first ones and the last."""
    words = [str(o) for o in options]
    # The first options and the last show the range; thousands of divisors would bury the sentence.
    if len(words) > LISTED_OPTIONS:
        words = [*words[: LISTED_OPTIONS - 2], "...", words[-1]]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """'1 part' or '2 parts'.

    Args:
        count: 0 is many.
        one: what there is one of, with its verb where that differs: "GPU is".
        many: of several: "GPUs are"; None: `one` and an s.
    """
    return f"{count} {one}" if count == 1 else f"{count} {many or f'{one}s'}"


def shown(value: object) -> str:
    """A value as a sentence repeats it: its repr in one line, the middle of a long one left out."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes no int of more than 4300 digits
        text = "a number of thousands of digits"
    return cut(text)


def cut(text: str, characters: int = SHOWN_CHARACTERS) -> str:
    """A text or path in one line of at most so many characters, the middle of a long one left out."""
    # One line: logs and batch systems show errors line by line.
    line = " ".join(text.split())
    if len(line) <= characters:
        return line
    # Both ends stay: of a path the name matters, of a message the remedy at its end.
    half = (characters - 3) // 2
    return f"{line[:half]}...{line[-half:]}"


def sentence(error: BaseException) -> str:
    """The message of an error as programs print it: one line of at most 600 characters."""
    return cut(str(error), SENTENCE_CHARACTERS)
