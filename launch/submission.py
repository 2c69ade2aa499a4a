"""The folder of a submission: script, resolved configuration and a snapshot of the code, whole or not at all.

A requeued job must not pick up code or settings that were edited meanwhile, so it runs from copies, with every relative
path of the configuration made absolute. A copy has about 2 MB.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from bd3_megatron.config.load import dump_config, replace_field
from bd3_megatron.config.schema import Config
from bd3_megatron.files import whole, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
COMMIT_FILE = "COMMIT"
"""Read by checkpoint.describe.source_commit where there is no .git."""
# Compiled kernels, streamed files and temporary ones: a rank that cannot write there dies hours after it was queued.
CACHE_VARIABLES = (
    "HF_HOME",
    "HF_DATASETS_CACHE",
    "HF_HUB_CACHE",
    "TMPDIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "WANDB_DIR",
    "XDG_CACHE_HOME",
)
SNAPSHOT = ("bd3_megatron", "launch", "tools", "setup.py")


def with_absolute_paths(config: Config, base: Path) -> Config:
    """The configuration as it reads from any working directory.

    Args:
        config: with paths relative to `base`.
        base: the working directory of the person who submits.
    """
    data = config.data
    tokenizer = base / data.tokenizer
    absolute = dataclasses.replace(
        data,
        path=None if data.path is None else str(base / data.path),
        text=tuple(t if t.startswith("builtin:") else str(base / t) for t in data.text),
        # `bytes` and `sentencepiece` are names, unless a folder of that name is meant
        tokenizer=str(tokenizer) if tokenizer.is_dir() else data.tokenizer,
        mixture=_absolute_keys(data.mixture, base),
        stages=tuple(dataclasses.replace(s, mixture=_absolute_keys(s.mixture, base)) for s in data.stages),
        # a hub name is none of the files here
        stream=dataclasses.replace(data.stream, dataset=str(base / data.stream.dataset))
        if data.stream is not None and (base / data.stream.dataset).exists()
        else data.stream,
    )
    config = dataclasses.replace(config, data=absolute)
    config = replace_field(config, "run.dir", str(base / config.run.dir))
    if config.train.stop_file is not None:
        config = replace_field(config, "train.stop_file", str(base / config.train.stop_file))
    return config


def paths_of(config: Config) -> dict[str, Path]:
    """What ranks open on shared file systems: the key that names it, and the path.

    Args:
        config: of `with_absolute_paths`.
    """
    data = config.data
    named = {"run.dir": config.run.dir, "data.path": data.path, "train.stop_file": config.train.stop_file}
    named |= {f"data.text[{number}]": text for number, text in enumerate(data.text)}
    named |= {f"data.mixture[{number}]": folder for number, folder in enumerate(data.mixed_folders)}
    named |= {"data.tokenizer": data.tokenizer, "data.stream.dataset": data.stream.dataset if data.stream else None}
    # what is not absolute by now is a name: of a builtin text, a tokenizer, or a dataset of the hub
    return {key: Path(value) for key, value in named.items() if value is not None and value.startswith("/")}


def written_paths(config: Config, environment: Mapping[str, str]) -> dict[str, Path]:
    """What ranks write to: the key or variable that names it, and the path.

    Args:
        config: of `with_absolute_paths`.
        environment: that the profile sets on every rank.
    """
    named = {"run.dir": config.run.dir, "train.stop_file": config.train.stop_file}
    named |= {f"cluster.environment.{name}": environment.get(name) for name in CACHE_VARIABLES}
    return {key: Path(value) for key, value in named.items() if value is not None and value.startswith("/")}


def _absolute_keys(weights: Mapping[str, float], base: Path) -> dict[str, float]:
    return {str(base / folder): weight for folder, weight in weights.items()}


def write_submission(folder: Path, configs: Sequence[Config], script: str, command: Sequence[str]) -> None:
    """Make `folder` with job.sh, config.N.yaml of every array task, code/ and job.json.

    Args:
        folder: must not exist; its parents are made.
        configs: resolved, one an array task.
        script: text of the sbatch script.
        command: what the person typed, for the record.
    """
    with whole(folder) as building:
        for number, config in enumerate(configs):
            dump_config(config, building / f"config.{number}.yaml")
        write_text(building / "job.sh", script)
        copy_code(building / "code")
        state = git_state()
        # the copy is no checkout, and checkpoints and trackers name the commit
        write_text(building / "code" / COMMIT_FILE, f"{state['git_commit'] or ''}\n")
        write_json(building / "job.json", {"command": list(command), **state})


def copy_code(target: Path) -> None:
    """Copy what a rank imports from this checkout."""
    target.mkdir(parents=True)
    leave_out = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
    for name in SNAPSHOT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=leave_out)
        elif source.is_file():
            shutil.copy2(source, target / name)


def git_state() -> dict[str, str | bool | None]:
    """Commit of the checkout and whether files differ from it; None outside a git checkout."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain")
    return {"git_commit": commit, "git_dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
