"""The batch script and the launcher on a real SLURM; ranks are a few lines of bash, so that seconds suffice."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from bd3_megatron.errors import final_codes
from launch import slurm as launcher
from tests.integration.slurm_client import CPU_PROFILE, DEBUG, ROOT, Slurm, status

pytestmark = pytest.mark.slurm

PROFILES = sorted((ROOT / "configs/cluster").glob("*.yaml"))
QUICK = ("data.path=/nowhere",)
"""Stand-in ranks read no data."""


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_sbatch_would_take_every_shipped_profile(path: Path, slurm: Slurm, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(path.read_text().replace("/shared:/shared", f"{tmp_path}:{tmp_path}"))
    for kind in launcher_kinds():
        typed = [str(DEBUG), "--cluster", str(site), "--nodes", "2", "--launcher", kind, "train.global_batch_size=64"]
        options = launcher.build_parser().parse_intermixed_args([*typed, f"run.dir={tmp_path}/run"])
        script = tmp_path / f"{kind}.sh"
        script.write_text(launcher.submission_of(options, tmp_path, datetime(2026, 1, 2)).script)
        done = slurm.lab.run("sbatch", "--test-only", script)
        assert "to start at" in done.stderr


def launcher_kinds() -> tuple[str, ...]:
    return ("srun", "torchrun")


def bad_inputs() -> list[tuple[list[str], str]]:
    return [
        (["--nodes", "3", "parallel.dp=4"], "3 nodes x 2 ranks = 6 do not match tp=1 x pp=1 x cp=1 x dp=4 = 4"),
        (["--nodes", "5", "train.global_batch_size=80"], "sbatch refuses the job (Requested node configuration"),
        (["--time", "00:02:30"], "cluster.time=00:02:30 leaves no time to train: ranks are told to save 120 s"),
        (["run.dir=/proc/nowhere/run"], "cannot be written"),
    ]


@pytest.mark.parametrize(("arguments", "sentence"), bad_inputs())
def test_bad_input_is_a_sentence_and_nothing_is_submitted(
    arguments: list[str], sentence: str, slurm: Slurm, tmp_path: Path
) -> None:
    folder = [] if any(a.startswith("run.dir") for a in arguments) else [f"run.dir={tmp_path}/run"]
    done = slurm.launch(str(DEBUG), "--cluster", str(CPU_PROFILE), *folder, *arguments, check=False)
    refused(slurm, done.returncode, done.stderr, sentence)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("partition: main", "partition: mian"), "sbatch refuses the job (invalid partition specified: mian"),
        (("partition: main", ""), "cluster.partition is not set and has no default"),
    ],
)
def test_a_bad_profile_is_a_sentence_and_nothing_is_submitted(
    change: tuple[str, str], sentence: str, slurm: Slurm, tmp_path: Path
) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text(CPU_PROFILE.read_text().replace(*change))
    done = slurm.launch(str(DEBUG), "--cluster", str(profile), f"run.dir={tmp_path}/run", check=False)
    refused(slurm, done.returncode, done.stderr, sentence)


def refused(slurm: Slurm, code: int, err: str, sentence: str) -> None:
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("slurm: error: ") and sentence in lines[0], err
    assert not slurm.jobs and not slurm.lab.run("squeue", "-h").stdout.strip()


def test_an_array_runs_each_task_with_its_own_overrides(slurm: Slurm, tmp_path: Path) -> None:
    profile = slurm.rank('sed -n "s/^  lr: //p" "${!#}" > "$run_dir/lr"; end finished none')
    rates = ["0.001", "0.002", "0.003"]
    job = slurm.train(*QUICK, *(word for lr in rates for word in ("--array", f"optim.lr={lr}")), profile=profile)
    assert all(slurm.wait(f"{job}_{task}")["JobState"] == "COMPLETED" for task in range(3))
    assert [(tmp_path / f"run-{task}/lr").read_text().strip() for task in range(3)] == rates
    assert all(status(tmp_path / f"run-{task}")["status"] == "finished" for task in range(3))


def test_a_chain_runs_one_job_after_another_until_the_run_is_finished(slurm: Slurm, tmp_path: Path) -> None:
    profile = slurm.rank(
        'echo "$SLURM_JOB_ID" >> "$run_dir/jobs"\n'
        '[ "$(wc -l < "$run_dir/jobs")" = 2 ] && { end finished none; exit 0; }\n'
        "end stopped deadline"
    )
    slurm.train(*QUICK, "--chain", "3", profile=profile)
    assert len(slurm.jobs) == 3
    assert [slurm.wait(job)["JobState"] for job in slurm.jobs] == ["COMPLETED"] * 3
    assert (tmp_path / "run/jobs").read_text().split() == [str(job) for job in slurm.jobs[:2]]
    assert "the next job of the chain continues" in slurm.log(slurm.jobs[0])
    assert "an earlier job of the chain has finished the run" in slurm.log(slurm.jobs[2])


def test_a_crash_loop_ends_and_says_why(slurm: Slurm, tmp_path: Path) -> None:
    profile = slurm.rank('echo "$attempt" >> "$run_dir/attempts"; end failed "n1 is slow" 1; exit 1')
    job = slurm.train(*QUICK, "--max-attempts", "2", profile=profile)
    assert slurm.wait(job)["JobState"] == "FAILED"
    assert (tmp_path / "run/attempts").read_text().split() == ["0", "1"]
    assert "gives up: 2 attempts in a row failed without a new checkpoint (newest: none)" in slurm.log(job)


def test_what_another_attempt_would_not_change_is_not_tried_again(slurm: Slurm) -> None:
    """One array task an exit code; the last one's ranks could not report."""
    codes = final_codes()
    body = (
        f"codes=({' '.join(map(str, codes))})\n"
        f"[ $SLURM_ARRAY_TASK_ID = {len(codes)} ] && exit 2\n"
        # kill-on-bad-exit may flatten srun's code, so that the report decides
        'end failed "there is no such data" "${codes[$SLURM_ARRAY_TASK_ID]}"; exit 1'
    )
    tasks = [word for number in range(len(codes) + 1) for word in ("--array", f"run.seed={number}")]
    job = slurm.train(*QUICK, *tasks, profile=slurm.rank(body))
    for task in range(len(codes) + 1):
        ended = slurm.wait(f"{job}_{task}")
        assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0"
        said = "there is no such data" if task < len(codes) else "exit code 2, which another attempt would not change"
        assert f"gives up: {said}" in slurm.log(f"{job}_{task}")


def test_a_full_disk_ends_the_job_and_says_what_to_do(slurm: Slurm, tmp_path: Path) -> None:
    # the ranks of a full disk cannot say why they ended
    job = slurm.train(*QUICK, profile=slurm.rank('ln -sf /dev/full "$run_dir/.probe"; exit 1'))
    ended = slurm.wait(job)
    assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0"
    said = f"gives up: {tmp_path}/run takes no more files (full, over quota or read-only); free space and submit again"
    assert said in slurm.log(job)


def test_a_node_named_bad_is_left_out_of_the_next_attempt(slurm: Slurm, tmp_path: Path) -> None:
    profile = slurm.rank(
        'echo "$attempt $SLURMD_NODENAME" >> "$run_dir/nodes"\n'
        '[ "$attempt" -gt 0 ] && { end finished none; exit 0; }\n'
        '[ "$SLURM_PROCID" = 1 ] || sleep 300\n'
        # the other rank has said its node before the job is ended
        'until [ "$(wc -l < "$run_dir/nodes")" = 2 ]; do sleep 0.1; done\n'
        'echo "$SLURMD_NODENAME" >> "$BD3_BAD_NODES"; exit 1',
        exclude="n4",
    )
    job = slurm.train(*QUICK, "--nodes", "2", "--exclude-bad", profile=profile)
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    runs = [line.split() for line in (tmp_path / "run/nodes").read_text().splitlines()]
    assert {node for attempt, node in runs if attempt == "0"} == {"n1", "n2"}
    assert {node for attempt, node in runs if attempt == "1"} == {"n1", "n3"}


def test_a_stop_file_ends_the_job_without_a_requeue(slurm: Slurm) -> None:
    job = slurm.train(*QUICK, profile=slurm.rank("end stopped file"))
    assert slurm.wait(job)["JobState"] == "COMPLETED" and slurm.job(job)["Restarts"] == "0"
    assert "submit again to continue" in slurm.log(job)
