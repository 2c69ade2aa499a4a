"""Legal values of a field, declared beside it: `Annotated[int, Range(1, 64)]`, also inside tuples, mappings and options.

`config/load.py` checks every value that it types, so a file, an override and a stored configuration obey the same laws.
Both ends of every range are finite: no value makes the arithmetic of a launcher overflow or hang.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from dataclasses import dataclass
from typing import Annotated, Any

from bd3_megatron.errors import ConfigError, cut, shown

LONGEST_PATH_BYTES = 4000
"""Linux takes 4096, and files are made below a folder that is named here."""
SMALLEST_FP32 = 2.0**-126
"""The least normal number of fp32, in which runs compute: below it digits are lost, and many devices read 0."""
# ranges end where a longer run is certainly a slip: arithmetic on the login node stays exact and quick
MOST_STEPS = 10**9
MOST_TOKENS = 10**18
"""With the greatest batch and length, counts of samples and tokens still fit 63 bits."""
# of ext4, xfs, NFS and Lustre alike
LONGEST_NAME_BYTES = 255


@dataclass(frozen=True)
class Range:
    """Legal numbers: from `lower` to `upper`, both included unless an end is open.

    A number that fp32 rounds onto an open end, or to 0, is not legal: the run would compute with that end, or with 0.
    """

    lower: float
    upper: float
    _: dataclasses.KW_ONLY
    open_lower: bool = False
    """Every legal number is greater than `lower`."""
    open_upper: bool = False
    """Every legal number is smaller than `upper`."""
    even: bool = False
    """Odd numbers are refused."""
    or_zero: bool = False
    """0 is legal too; it switches something off."""

    def holds(self, value: float) -> bool:
        """Whether a number is legal."""
        if self.or_zero and value == 0:
            return True
        # comparisons that NaN fails
        above = value > self.lower if self.open_lower else value >= self.lower
        below = value < self.upper if self.open_upper else value <= self.upper
        return above and below and not (self.even and value % 2) and not self._is_lost_in_fp32(value)

    def _is_lost_in_fp32(self, value: float) -> bool:
        """Whether fp32 takes a number inside the ends for 0 or for an end that is open."""
        # ranges below 0 are of numbers that are compared and not computed with
        if isinstance(value, int) or self.lower < 0:
            return False
        kept = _in_fp32(value)
        onto_end = (self.open_lower and kept <= self.lower) or (self.open_upper and kept >= self.upper)
        return onto_end or 0 < value < SMALLEST_FP32

    @property
    def interval(self) -> str:
        """The ends as mathematics writes them: "[0, 1)"."""
        lower = f"{'(' if self.open_lower else '['}{_short(self.lower)}"
        return f"{lower}, {_short(self.upper)}{')' if self.open_upper else ']'}"

    def check(self, value: Any, where: str) -> None:
        """Refuse a number outside the range; a value that is no number passes.

        Raises:
            ConfigError: "optim.min_lr_ratio=-1.0 is outside [0, 1]; give a number of at least 0 and at most 1."
        """
        # a field may hold a text or a number; true is no 1
        if isinstance(value, bool) or not isinstance(value, int | float) or self.holds(value):
            return
        law = f"{'0 or ' if self.or_zero else ''}{self.interval}{', even' if self.even else ''}"
        said = f"{where}={shown(value)}"
        if 0 < value < SMALLEST_FP32 and self.lower == 0 and not self.open_lower:
            raise ConfigError(f"{said} is 0 in fp32; give 0 or a number of at least {SMALLEST_FP32:.3g} in {law}.")
        if self.lower < value < self.upper and self._is_lost_in_fp32(value):
            said += f" is {_in_fp32(value):g} in fp32, which"
        raise ConfigError(f"{said} is outside {law}; {self._remedy(type(value))}.")

    def _remedy(self, kind: type) -> str:
        # the words say which ends are open, so that nobody has to know the brackets
        noun = "an even number" if self.even else "a whole number" if kind is int else "a number"
        lower = f"{'above' if self.open_lower else 'of at least'} {_short(self.lower)}"
        upper = f"{'below' if self.open_upper else 'at most'} {_short(self.upper)}"
        return f"give {'0 or ' if self.or_zero else ''}{noun} {lower} and {upper}"


@dataclass(frozen=True)
class Matches:
    """A text of one form."""

    pattern: str
    """Regular expression that matches all of it."""
    form: str
    """In words, after "is not"."""

    def check(self, value: str, where: str) -> None:
        """Refuse a text of another form.

        Raises:
            ConfigError: "cluster.partition='a b' is not a name of letters, digits and . _ -; give one."
        """
        if not re.fullmatch(self.pattern, value):
            raise ConfigError(f"{where}={shown(value)} is not {self.form}; give one.")


@dataclass(frozen=True)
class Pattern:
    """A regular expression as Python reads it."""

    def check(self, value: str, where: str) -> None:
        """Refuse a text that is none.

        Raises:
            ConfigError: "matches='(' is no regular expression (missing ), unterminated subpattern at position 0); mend it."
        """
        try:
            re.compile(value)
        # the two others: repetitions beyond 32 bits, brackets thousands deep
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{where}={shown(value)} is no regular expression ({cut(str(error))}); mend it."
            ) from error


@dataclass(frozen=True)
class FilePath:
    """A path as a program opens it: nothing replaces ~ or variables in it."""

    def check(self, value: str, where: str) -> None:
        """Refuse a text that cannot be a path.

        Raises:
            ConfigError: empty, with a leading ~, with control characters, or too long for a file system.
        """
        if not value:
            raise ConfigError(f"{where}='' is empty; give a path, or leave the key out.")
        # unreplaced, a folder named ~ would be made beside the caller
        if value.startswith("~"):
            raise ConfigError(
                f"{where}={shown(value)} begins with ~, which only a shell replaces; write the whole path ($HOME/... in a shell)."
            )
        # a line break would end a directive of a batch script
        if any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise ConfigError(f"{where}={shown(value)} holds a control character, such as a line break; remove it.")
        if len(value.encode("utf-8", "replace")) > LONGEST_PATH_BYTES or _longest_name(value) > LONGEST_NAME_BYTES:
            raise ConfigError(
                f"{where}={shown(value)} is too long for a file system: {LONGEST_PATH_BYTES} bytes, {LONGEST_NAME_BYTES} "
                "between two slashes; shorten it."
            )


def _longest_name(path: str) -> int:
    return max(len(name.encode("utf-8", "replace")) for name in path.split("/"))


def _in_fp32(number: float) -> float:
    # an upper end is far below the largest number of fp32
    return float(struct.unpack("f", struct.pack("f", number))[0])


def _short(number: float) -> str:
    # 1e12 reads better than thirteen digits, where it says the same
    text = f"{number:g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return text if float(text) == number else str(number)


PathText = Annotated[str, FilePath()]
