"""What every test may ask for: the checkout's root, a clean environment for child processes, and honest skips.

Refuses: warnings (see .pytest.ini), GPU tests where no device is visible (skipped with the reason).
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from launch.env import visible_gpus

ROOT = Path(__file__).resolve().parents[1]

# a test may itself run inside a job: its children must not take that job's rendezvous for theirs
FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "BD3_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, with the reason, where there is no device."""
    if visible_gpus() > 0:
        return
    skip = pytest.mark.skip(reason="no CUDA device is visible")
    for item in items:
        # the mark itself: keywords hold the names of folders too, and a checkout in one called gpu would skip everything
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


def clean_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without any job's variables, one thread a process, no hub, no tracker."""
    kept = {k: v for k, v in environment.items() if not k.startswith(FOREIGN)}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


@pytest.fixture
def clean_environment() -> Mapping[str, str]:
    """This process's environment, made clean, as a test's other fixtures left it."""
    return clean_variables(os.environ)


@pytest.fixture
def own_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of this test's own for transformers' copies of an exported folder's code.

    transformers imports the copies as the package `transformers_modules`, which a process looks for in one folder: what
    another test has imported is forgotten before and after.
    """
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    _forget_remote_code()
    yield
    _forget_remote_code()


def _forget_remote_code() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def cpu_seconds() -> Callable[..., tuple[float, subprocess.CompletedProcess[str]]]:
    """Run a command and say what it cost in processor seconds: unlike the clock's, they do not grow with the machine's load."""

    def measure(
        command: Sequence[str | Path], env: Mapping[str, str], cwd: Path
    ) -> tuple[float, subprocess.CompletedProcess[str]]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=dict(env), cwd=cwd, capture_output=True, text=True, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done

    return measure
