"""Every tool answers garbage with one sentence and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

LONGEST = 640
"""600 characters of the sentence, and the tool's name."""
COMMANDS = {
    "average_checkpoints": ["GARBAGE --last 2 --out made", "GARBAGE GARBAGE --out made"],
    "convert_checkpoint": ["GARBAGE --out made", "GARBAGE --layout sdar --out made"],
    "estimate_variance": ["GARBAGE --no-note", "--train GARBAGE --out made --no-note"],
    "export_official": ["GARBAGE --out made"],
    "import_official": ["GARBAGE --out made"],
    "inspect_checkpoint": ["GARBAGE", "GARBAGE --against GARBAGE"],
    "inspect_samples": ["GARBAGE --data GARBAGE"],
    "inspect_shards": ["GARBAGE --verify"],
    "lint_export": ["GARBAGE --engine sglang"],
    "loss_compare": ["GARBAGE GARBAGE --svg made.svg"],
    "plan": ["GARBAGE --gpus 2 --gpu h100", "CONFIG --gpus 2 --cluster GARBAGE", "CONFIG --gpus 2 --calibrate GARBAGE"],
    "prepare_data": ["--text GARBAGE --out made", "--recipe GARBAGE --out made", "--dataset GARBAGE --out made"],
    "report": ["GARBAGE -o made.html", "RUN --results GARBAGE -o made.html"],
    "report_throughput": ["GARBAGE --plots made"],
    "reproduce_mini": ["--quick --out made --text GARBAGE"],
    "start_run": ["GARBAGE CONFIG", "GARBAGE GARBAGE"],
}
"""Of each tool the command lines, with garbage in the place of what it reads."""
KINDS = ("missing", "folder", "binary", "empty", "undecodable")


def test_every_tool_is_here(root: Path) -> None:
    assert sorted(COMMANDS) == sorted(path.stem for path in (root / "tools").glob("*.py"))


def garbage(kind: str, folder: Path) -> str:
    path = folder / ("caf\udce9" if kind == "undecodable" else kind)
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 64)
    elif kind == "empty":
        path.touch()
    return str(path)


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_garbage_is_one_sentence(
    name: str,
    kind: str,
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.unit.report.written_runs import steady_run

    monkeypatch.chdir(tmp_path)
    words = {"GARBAGE": garbage(kind, tmp_path), "CONFIG": str(root / "configs/debug_cpu.yaml")}
    words["RUN"] = str(steady_run(tmp_path / "run", 1))
    before = tree(tmp_path)
    for command in COMMANDS[name]:
        code = importlib.import_module(f"tools.{name}").main([words.get(word, word) for word in command.split()])
        said = capsys.readouterr()
        assert code == 2, (command, said)
        assert said.err.startswith(f"{name}: error: ") and said.err.count("\n") == 1, (command, said.err)
        assert len(said.err) <= LONGEST and "Traceback" not in said.err
        assert tree(tmp_path) == before, command
