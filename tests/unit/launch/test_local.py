"""The local launcher: torch-free, quick, and it refuses before anything is started or written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from bd3_megatron.errors import ConfigError, LaunchError
from launch import local


@pytest.fixture
def debug(root: Path) -> str:
    return str(root / "configs/debug_cpu.yaml")


def test_the_plan_is_one_process_that_holds_the_product_of_the_axes(debug: str, tmp_path: Path) -> None:
    overrides = ["parallel.tp=2", "parallel.pp=2", "parallel.dp=2", f"run.dir={tmp_path}/run"]
    launch = local.local_launch(debug, overrides, {"HOME": "/h", "CUDA_VISIBLE_DEVICES": ""})
    assert launch.command[1:5] == ("-m", "bd3_megatron.train.local_ranks", "--ranks", "8")
    assert launch.command[5:] == (debug, *overrides)
    assert launch.environment["HOME"] == "/h"
    assert (launch.environment["GLOO_SOCKET_IFNAME"], launch.environment["DS_ACCELERATOR"]) == ("lo", "cpu")
    assert not (tmp_path / "run").exists()


def test_with_gpus_there_is_one_process_a_rank(debug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "visible_gpus", lambda environ: 2)
    launch = local.local_launch(debug, ["parallel.tp=2"], {})
    assert "--gpu" in launch.command and "DS_ACCELERATOR" not in launch.environment


@pytest.mark.parametrize(
    ("gpus", "sentence"),
    [
        (1, r"^the grid asks for 4 ranks but 1 GPU is visible; use a grid of 1 or fewer, or set CUDA_VISIBLE_DEVICES="),
        (3, r"^the grid asks for 4 ranks but 3 GPUs are visible; use a grid of 3 or fewer"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused(gpus: int, sentence: str) -> None:
    with pytest.raises(LaunchError, match=sentence):
        local.check_gpus(4, gpus)


def test_without_gpus_or_with_enough_of_them_any_grid_may_start() -> None:
    local.check_gpus(64, 0)
    local.check_gpus(4, 4)


def test_a_run_folder_below_a_file_is_refused(debug: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"file' is a file; give a folder\.$"):
        local.local_launch(debug, [f"run.dir={tmp_path}/file/run"], {})


def test_an_unwritable_run_folder_is_refused(debug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local.os, "access", lambda path, mode: False)
    with pytest.raises(LaunchError, match=r"is not writable; give a folder you may write to\.$"):
        local.local_launch(debug, [f"run.dir={tmp_path}/run"], {})


def test_a_configuration_without_data_is_refused(debug: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.path is not set and data\.text is empty; name a prepared folder or text"
    ):
        local.local_launch(debug, [f"run.dir={tmp_path}/run", "data.text=[]"], {})


def test_an_evaluation_on_a_folder_without_held_out_rows_is_refused(debug: str, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}/run", f"data.path={tmp_path}/data", "evaluate.every_steps=5"]
    local.local_launch(debug, overrides, {})  # a folder that only the ranks see
    (tmp_path / "data/train").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"data' has no split valid, and evaluate\.every_steps=5 needs held-out rows; hold"
    ):
        local.local_launch(debug, overrides, {})
    local.local_launch(debug, overrides[:2], {})
    (tmp_path / "data/valid").mkdir()
    local.local_launch(debug, overrides, {})


def test_an_invalid_config_is_refused(debug: str) -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        local.local_launch(debug, ["parallel.tp=3"], {})


def test_the_launcher_needs_no_torch(debug: str, clean_environment: Mapping[str, str]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import launch.env, launch.local\n"
        f"launch.local.local_launch({debug!r}, [], {{}})\n"
        "assert not {'numpy', 'megatron', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=dict(clean_environment), check=True, timeout=60)


def test_the_module_prints_its_mistake_in_one_line(
    tmp_path: Path, debug: str, clean_environment: Mapping[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", debug, "parallel.tp=3"],
        env=dict(clean_environment),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (2, "bd3: error: tp=3 does not divide num_heads=4; use 1, 2 or 4.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0)])
def test_the_module_says_how_to_use_it(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(arguments) == code
    printed = capsys.readouterr()
    assert "usage: python -m launch.local CONFIG" in printed.out + printed.err
