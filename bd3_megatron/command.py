"""Where a command ends: a mistake of its user is one line on stderr and an exit code, never a traceback.

`bd3`, the launcher and every tool run through `run_command`. Programming mistakes keep their traceback on purpose.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from bd3_megatron.errors import BD3Error, FileError, UsageError, cut, sentence

LONGEST_COMPLAINT = 500
"""Characters: argparse repeats whatever was typed."""
INTERRUPTED = 130
"""What shells report for a program ended by Ctrl-C (128 + SIGINT)."""


class CommandParser(argparse.ArgumentParser):
    """argparse whose complaints are UsageErrors, with operands anywhere between the options."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{cut(message, LONGEST_COMPLAINT)}; see {self.prog} --help.")


class _AnyOrder(argparse.Action):
    """Overrides, the first of which may stand before the configuration."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        given = [] if namespace.config is None else [namespace.config]
        namespace.overrides = config_first([*given, *values])
        if namespace.overrides:
            namespace.config = namespace.overrides.pop(0)


def add_config_arguments(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
    """The operands CONFIG and section.key=value, in any order.

    Args:
        parser: its options get `config` and `overrides`.
        is_required: otherwise `config` is None where there is none.
    """
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs=None if is_required else "?",
        help="a YAML file, for example configs/debug_cpu.yaml",
    )
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        action=_AnyOrder,
        help="settings that replace those of the file; values are YAML",
    )


def config_first(operands: Sequence[str]) -> list[str]:
    """The operands of a command with the configuration before its overrides: the first word that is none of them."""
    words = list(operands)
    first = next((number for number, word in enumerate(words) if not is_override(word)), 0)
    return [*words[first : first + 1], *words[:first], *words[first + 1 :]]


def is_override(word: str) -> bool:
    """Whether a word is meant as section.key=value."""
    name = word.partition("=")[0]
    # a path may hold = or a dot, but the key of an override has a dot and no slash
    return "=" in word and "." in name and "/" not in name


def run_tool(
    parser: CommandParser,
    work: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None,
    *,
    interrupted: str = "interrupted",
) -> int:
    """Parse the command line of a tool and do its work on files.

    Args:
        parser: its `prog` is the tool's name.
        work: from the parsed arguments to the exit code.
        arguments: without the program's name; None: the process's.
        interrupted: what to say after Ctrl-C.

    Returns:
        The exit code.
    """

    def whole() -> int:
        try:
            return work(parser.parse_intermixed_args(arguments))
        except BrokenPipeError:
            raise
        except OSError as error:
            # a tool reads what its user names: a folder in place of a file or a missing right is the user's to mend
            if error.filename is None:
                raise
            raise FileError(f"'{error.filename}': {error.strerror}; name another file or folder.") from error

    return run_command(parser.prog, whole, interrupted=interrupted)


def run_command(name: str, work: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Run a command up to its exit code.

    Args:
        name: stands before every error.
        work: returns the exit code.
        interrupted: what to say after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BD3Error as error:
        print_error(name, error)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output (head, less) is gone; without this Python complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def print_error(name: str, error: BD3Error, *, where: str = "") -> None:
    """Print an error as the one line users read.

    Args:
        name: of the command.
        error: its sentence; the middle of a very long one is left out.
        where: in front of the sentence, such as "[rank 3] ".
    """
    print(f"{name}: error: {where}{sentence(error)}", file=sys.stderr, flush=True)
