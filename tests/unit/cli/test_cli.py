"""The `bd3` command: help at once and without torch, mistakes in one line with exit code 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bd3_megatron import cli
from bd3_megatron.errors import BD3Error, NodeFailure

CpuSeconds = Callable[..., tuple[float, subprocess.CompletedProcess[str]]]
HELP_SECONDS = 1.0
"""Of processor time, which is what a person waits for --help where nothing else runs."""

ROOT = Path(__file__).resolve().parents[3]
TOOLS = sorted((ROOT / "tools").glob("*.py")) + [ROOT / "launch/slurm.py", ROOT / "launch/quickstart.py"]
TOOLS = [path for path in TOOLS if path.name != "__init__.py"]
NO_TORCH = "import sys; sys.modules['torch'] = None; from bd3_megatron.cli import main; sys.exit(main(sys.argv[1:]))"
"""A process in which `import torch` raises."""


def run_cli(*arguments: str, env: Mapping[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bd3_megatron.cli", *arguments],
        env=dict(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_answers_within_a_second(
    arguments: list[str], root: Path, clean_environment: Mapping[str, str], cpu_seconds: CpuSeconds
) -> None:
    seconds, done = cpu_seconds([sys.executable, "-m", "bd3_megatron.cli", *arguments], clean_environment, root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: bd3")
    assert seconds < HELP_SECONDS


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)], ids=" ".join)
def test_help_needs_no_torch(arguments: list[str], root: Path, clean_environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *arguments],
        env=dict(clean_environment),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_every_tool_and_launcher_says_how_to_use_it_without_torch(
    tool: Path, tmp_path: Path, clean_environment: Mapping[str, str], cpu_seconds: CpuSeconds
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('help needs no torch')\n")
    environment = dict(clean_environment) | {"PYTHONPATH": str(tmp_path)}
    seconds, done = cpu_seconds([sys.executable, tool, "--help"], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert seconds < HELP_SECONDS


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.num_layer=3"], "unknown key model.num_layer; did you mean model.num_layers?"),
        (["data.seq_len=66"], "seq_len=66 is not a multiple of block_size=4; use 64 or 68."),
        (["parallel.tp=3"], "tp=3 does not divide num_heads=4; use 1, 2 or 4."),
        (["run.dir=README.md"], "'README.md' is a file; give a folder."),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(
    tmp_path: Path, root: Path, clean_environment: Mapping[str, str], overrides: list[str], sentence: str
) -> None:
    (tmp_path / "README.md").touch()
    done = run_cli("train", str(root / "configs/debug_cpu.yaml"), *overrides, env=clean_environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("bd3: error: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr.replace(f"{tmp_path}/", "")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"], "a refused run leaves nothing behind"


def test_a_missing_config_is_one_line(tmp_path: Path, clean_environment: Mapping[str, str]) -> None:
    done = run_cli("train", "gone.yaml", env=clean_environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "bd3: error: config file 'gone.yaml' does not exist; give the path of a YAML file such as configs/debug_cpu.yaml.\n"
    )


def test_a_world_that_does_not_fit_is_said_by_rank_0_only(root: Path, clean_environment: Mapping[str, str]) -> None:
    lines = []
    for rank in range(3):
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
        }
        done = run_cli("train", str(root / "configs/debug_cpu.yaml"), "parallel.tp=2", env=clean_environment | place)
        assert done.returncode == 2
        lines.append(done.stderr)
    assert lines == [
        "bd3: error: world size 3 is not a multiple of tp=2 x pp=1 x cp=1 = 2; start 2 or 4 ranks.\n",
        "",
        "",
    ]


def test_half_a_rendezvous_is_refused(root: Path, clean_environment: Mapping[str, str]) -> None:
    half = {"RANK": "0", "WORLD_SIZE": "2"}
    done = run_cli("train", str(root / "configs/debug_cpu.yaml"), env=clean_environment | half)
    assert done.returncode == 2
    assert done.stderr == (
        "bd3: error: RANK=0 and WORLD_SIZE=2 are set but MASTER_ADDR is not; "
        "start with torchrun, or unset RANK and WORLD_SIZE to start local ranks.\n"
    )


@pytest.mark.parametrize(("error", "code"), [(BD3Error("a is b;\nuse c."), 2), (NodeFailure("n1 is slow."), 1)])
def test_every_error_of_the_package_becomes_one_line_and_its_code(
    error: BD3Error, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", command_raising(error))
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == f"bd3: error: {' '.join(str(error).split())}\n"


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", command_raising(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "bd3: interrupted\n"


def test_a_programming_mistake_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", command_raising(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError, match="bug"):
        cli.main(["doctor"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: COMMAND; see bd3 --help."),
        (["bogus"], "argument COMMAND: invalid choice: 'bogus' (choose from 'train', 'evaluate', "),
        (["train"], "the following arguments are required: CONFIG, section.key=value; see bd3 train --help."),
        (["train", "a.yaml", "--steps", "3"], "unrecognized arguments: --steps 3; see bd3 --help."),
        (["sample", "a", "--num-tokens", "x" * 5000], "argument --num-tokens: invalid int value: 'xxx"),
    ],
)
def test_wrong_usage_is_one_line_with_the_prefix_of_all_errors(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("bd3: error: ") and sentence in said and said.count("\n") == 1 and len(said) < 640


def test_the_installed_command_is_this_module(clean_environment: Mapping[str, str]) -> None:
    program = Path(sys.executable).parent / "bd3"
    assert os.access(program, os.X_OK), "run launch/install.sh"
    done = subprocess.run(
        [program, "--version"], env=dict(clean_environment), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("bd3 ")


def command_raising(error: BaseException) -> cli.Command:
    def run(options: object) -> int:
        raise error

    return cli.Command(summary="raises", add_arguments=lambda parser: None, run=run)
