"""A command ends with an exit code and at most one line on stderr; programming mistakes keep their traceback."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bd3_megatron.command import INTERRUPTED, CommandParser, add_config_arguments, run_command, run_tool
from bd3_megatron.errors import BD3Error, DataError, NodeFailure


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(("kind", "code"), [(DataError, 2), (NodeFailure, 1)])
def test_an_error_is_one_line_and_its_own_exit_code(
    kind: type[BD3Error], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("tool", raising(kind("no\nsuch   thing; use another."))) == code
    assert capsys.readouterr().err == "tool: error: no such thing; use another.\n"


def test_a_very_long_sentence_keeps_its_beginning_and_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    run_command("tool", raising(DataError("the value " + "x" * 5000 + " is long; use a short one.")))
    line = capsys.readouterr().err
    assert len(line) < 620 and line.startswith("tool: error: the value xxx") and line.endswith("; use a short one.\n")


def test_ctrl_c_is_a_line_and_the_shells_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("tool", raising(KeyboardInterrupt()), interrupted="run it again to go on") == INTERRUPTED
    assert capsys.readouterr().err == "tool: run it again to go on\n"


def test_a_programming_mistake_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("tool", raising(ZeroDivisionError()))


def parser() -> CommandParser:
    made = CommandParser(prog="tool")
    made.add_argument("words", nargs="*")
    made.add_argument("--count", type=int, default=1)
    return made


def test_a_bad_command_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(parser(), lambda _: 0, ["--count", "x"]) == 2
    assert capsys.readouterr().err == "tool: error: argument --count: invalid int value: 'x'; see tool --help.\n"


@pytest.mark.parametrize(
    ("typed", "config", "overrides"),
    [
        (["c.yaml", "a.b=1", "--count", "2", "a.c=2"], "c.yaml", ["a.b=1", "a.c=2"]),
        (["a.b=1", "--count", "2", "a.c=2", "c.yaml"], "c.yaml", ["a.b=1", "a.c=2"]),
        (["a.b=1", "runs/a.b=1/c.yaml", "a.c=2"], "runs/a.b=1/c.yaml", ["a.b=1", "a.c=2"]),
        # a mistake keeps its place, so that its sentence names it
        (["a.b=1", "a.c=2"], "a.b=1", ["a.c=2"]),
        (["c.yaml", "d.yaml"], "c.yaml", ["d.yaml"]),
        ([], None, []),
    ],
)
def test_a_configuration_and_its_overrides_stand_in_any_order(
    typed: list[str], config: str | None, overrides: list[str]
) -> None:
    made = CommandParser(prog="tool")
    add_config_arguments(made, is_required=False)
    made.add_argument("--count", type=int, default=1)
    parsed = made.parse_intermixed_args(typed)
    assert (parsed.config, parsed.overrides) == (config, overrides)


def test_operands_stand_anywhere() -> None:
    seen: list[argparse.Namespace] = []
    assert run_tool(parser(), lambda options: seen.append(options) or 0, ["a", "--count", "2", "b"]) == 0
    assert seen[0].words == ["a", "b"] and seen[0].count == 2


def test_what_the_system_refuses_to_a_tool_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(parser(), lambda _: len(tmp_path.read_text()), []) == 2
    assert capsys.readouterr().err == f"tool: error: '{tmp_path}': Is a directory; name another file or folder.\n"
    with pytest.raises(OSError, match="no file"):
        run_tool(parser(), lambda _: raising(OSError("no file"))(), [])


def test_names_that_are_not_text_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("tool", lambda: print("caf\udce9") or 0) == 0  # type: ignore[func-returns-value]
    assert capsys.readouterr().out == "caf\\udce9\n"


def test_a_reader_that_goes_away_is_no_error(root: Path) -> None:
    """The pipe's reader is gone before the first byte, as with `tool | true`."""
    program = (
        "import sys, time; from bd3_megatron.command import run_command\n"
        "def work():\n    sys.stdin.read()\n    print('x' * 100000)\n    return 0\n"
        "sys.exit(run_command('tool', work))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stdin is not None and started.stdout is not None and started.stderr is not None
    started.stdout.close()
    started.stdin.close()
    said = started.stderr.read()
    started.stderr.close()
    assert (started.wait(timeout=60), said) == (0, b"")
