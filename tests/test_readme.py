"""Every command in README.md and .github/CONTRIBUTING.md is understood: parsed by its own parser, or its options looked up.

Refuses: a command whose program is not known here. Long commands are not run; the quickstart and the debug run are, by
tests/integration.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bd3_megatron.cli import build_parser
from bd3_megatron.config.load import load_config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import EXIT_CODES

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = ("README.md", ".github/CONTRIBUTING.md")
SHELL = {
    "pre-commit",
    "cd",
    "export",
    "source",
    "git",
    "tail",
    "cat",
    "less",
    "ls",
    "squeue",
    "scancel",
    "sbatch",
    "tensorboard",
    "wandb",
}
"""Programs that are not ours and need no proof."""


def commands() -> list[str]:
    text = "\n".join((ROOT / document).read_text("utf-8") for document in DOCUMENTS if (ROOT / document).is_file())
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_readme_shows_the_two_commands() -> None:
    starts = [c.split(" #")[0].strip() for c in commands()]
    assert "bash launch/quickstart.sh" in starts
    assert "bash tests/run.sh" in starts


@pytest.mark.parametrize("command", commands() if (ROOT / "README.md").is_file() else [])
def test_a_command_in_the_readme_is_understood(command: str) -> None:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    check_words(words)


def test_the_table_of_exit_codes_is_the_one_in_errors() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| ([0-9+ N]+) \| (.*) \| (yes|no) \|$", text, re.MULTILINE)
    assert rows == [(row.code, row.meaning, "yes" if row.may_retry else "no") for row in EXIT_CODES]


def check_words(words: list[str]) -> None:
    program = Path(words[0]).name
    if program in SHELL:
        return
    if program == "bd3":
        check_bd3(words[1:])
    elif program in ("torchrun", "srun", "mpirun"):
        check_launched(words[1:])
    elif program == "bash":
        check_options((ROOT / words[1]).read_text("utf-8"), words)
    elif program.startswith("python"):
        check_python(words[1:])
    else:
        pytest.fail(f"README shows `{' '.join(words)}`, whose program no test knows")


def check_launched(words: list[str]) -> None:
    for position, word in enumerate(words):
        if word == "bd3_megatron.cli":
            return check_bd3(words[position + 1 :])
        if Path(word).name == "bd3":
            return check_bd3(words[position + 1 :])
    pytest.fail(f"no bd3 in {words}")


def check_bd3(words: list[str]) -> None:
    options = build_parser(words).parse_args(words)
    if words[0] != "train":
        return
    path = ROOT / options.config
    if path.is_file():
        config = load_config(path, options.overrides)
        validate(config)


def check_python(words: list[str]) -> None:
    if words[0] == "-m" and words[1] == "bd3_megatron.cli":
        return check_bd3(words[2:])
    if words[0] == "-m" and words[1] in ("pytest", "venv", "pip"):
        return None
    module = ["-m", words[1]] if words[0] == "-m" else [str(ROOT / words[0])]
    done = subprocess.run([sys.executable, *module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    check_options(done.stdout, words)
    return None


def check_options(known: str, words: list[str]) -> None:
    for word in words[1:]:
        option = word.split("=")[0]
        # tests/run.sh passes on whatever pytest takes
        if option.startswith("--") and "pytest" not in known:
            assert option in known, f"{words[1]} has no option {option}"
