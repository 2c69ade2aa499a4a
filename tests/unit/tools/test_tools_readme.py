"""tools/README.md names every tool and every benchmark, and each of its commands is one that the tool parses."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "tools" / "README.md").read_text("utf-8")
COMMANDS = [
    line.removeprefix("$ ") for block in re.findall(r"^```\n(.*?)^```", TEXT, re.M | re.S) for line in block.splitlines()
    if line.startswith("$ ")
]  # fmt: skip


def test_every_tool_has_a_heading_and_an_example() -> None:
    tools = {path.name for path in (ROOT / "tools").glob("*.py")}
    assert set(re.findall(r"^### (\w+\.py)$", TEXT, re.M)) == tools
    assert {Path(shlex.split(command)[1]).name for command in COMMANDS if "-m" not in command.split()} == tools


def test_every_benchmark_is_named() -> None:
    shared = {"harness", "runs", "official_form", "official_step", "host_reads", "cuda_path"}
    benchmarks = {path.stem for path in (ROOT / "tools" / "bench").glob("*.py")} - shared
    assert set(re.findall(r"python -m tools\.bench\.(\w+)", TEXT)) == benchmarks


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_parsed_by_its_tool(command: str) -> None:
    program, script, *words = shlex.split(command)
    if script == "-m":
        script, *words = words
    module = script.removesuffix(".py").replace("/", ".")
    assert program == "python"
    importlib.import_module(module).build_parser().parse_intermixed_args(words)
