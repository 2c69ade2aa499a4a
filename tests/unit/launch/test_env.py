"""The environment of ranks: what the table gives, what the user keeps, and who started this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.errors import LaunchError
from launch import env
from launch.env import SETTINGS, membership, rank_settings, slurm_port, visible_gpus

STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n1,n2",
}


def test_every_setting_stands_once() -> None:
    names = [s.name for s in SETTINGS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {"RANK": "x", "WORLD_SIZE": "2"},
            r"^RANK='x' is not a whole number; start with torchrun or srun, or unset it\.$",
        ),
        (STEP | {"SLURM_PROCID": "-1"}, r"^SLURM_PROCID='-1' is not a whole number"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "many"}, r"^SLURM_STEP_NUM_TASKS='many' is not a whole number"),
        ({key: value for key, value in STEP.items() if key != "SLURM_JOB_ID"}, r"^SLURM_JOB_ID is not set; start with"),
    ],
)
def test_a_rendezvous_that_makes_no_sense_is_refused(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(LaunchError, match=sentence):
        membership({"MASTER_ADDR": "a", "MASTER_PORT": "1"} | environ if "RANK" in environ else environ)


def test_what_the_user_exported_wins() -> None:
    assert "OMP_NUM_THREADS" not in rank_settings({"OMP_NUM_THREADS": "8"}, gpu=False, local=True)
    assert rank_settings({}, gpu=False, local=True)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("gpu", "local", "inside", "outside"),
    [
        (False, True, {"GLOO_SOCKET_IFNAME", "DS_ACCELERATOR"}, {"NCCL_DEBUG", "CUDA_DEVICE_MAX_CONNECTIONS"}),
        (True, True, {"GLOO_SOCKET_IFNAME", "CUDA_DEVICE_MAX_CONNECTIONS"}, {"DS_ACCELERATOR", "NCCL_DEBUG"}),
        (True, False, {"NCCL_DEBUG", "CUDA_DEVICE_MAX_CONNECTIONS"}, {"DS_ACCELERATOR", "GLOO_SOCKET_IFNAME"}),
    ],
)
def test_settings_go_where_they_apply(gpu: bool, local: bool, inside: set[str], outside: set[str]) -> None:
    names = set(rank_settings({}, gpu=gpu, local=local))
    assert inside <= names and not outside & names and "OMP_NUM_THREADS" in names


def test_a_plain_process_belongs_to_no_job() -> None:
    assert membership({}) is None
    assert membership({"RANK": "0"}) is None


def test_a_batch_script_is_no_rank() -> None:
    assert membership({"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) is None


def test_a_step_of_one_task_starts_local_ranks() -> None:
    assert membership(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_torchrun_wins_over_the_slurm_step_it_runs_in() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    place = membership(STEP | torchrun)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, dict(place.variables)) == (5, 8, 1, {})


@pytest.mark.parametrize("absent", ["MASTER_ADDR", "MASTER_PORT"])
def test_half_a_rendezvous_is_refused_by_name(absent: str) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    del whole[absent]
    with pytest.raises(LaunchError, match=f"^RANK=0 and WORLD_SIZE=2 are set but {absent} is not; start with torchrun"):
        membership(whole)


def test_a_slurm_task_finds_its_rendezvous() -> None:
    place = membership(STEP)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank) == (3, 4, 1)
    assert place.variables["MASTER_ADDR"] == "n1"
    assert place.variables["MASTER_PORT"] == str(slurm_port(STEP))
    assert (place.variables["RANK"], place.variables["WORLD_SIZE"], place.variables["LOCAL_RANK"]) == ("3", "4", "1")


def test_a_slurm_task_keeps_the_batch_scripts_rendezvous() -> None:
    place = membership(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert place is not None
    assert not {"MASTER_ADDR", "MASTER_PORT"} & set(place.variables)


def test_one_node_meets_on_loopback() -> None:
    place = membership(STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n1"})
    assert place is not None and place.variables["MASTER_ADDR"] == "127.0.0.1"


def test_a_node_list_that_cannot_be_expanded_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(LaunchError, match=r"^scontrol cannot expand the node list n\[1-2\]; export MASTER_ADDR"):
        membership(STEP | {"SLURM_STEP_NODELIST": "n[1-2]"})


def test_ports_differ_between_requeues_steps_and_neighbouring_jobs() -> None:
    ports = {
        slurm_port({"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart), "SLURM_STEP_ID": str(step)})
        for job in (100, 101)
        for restart in range(3)
        for step in range(2)
    }
    assert len(ports) == 12 and all(20000 <= p < 32000 for p in ports)


@pytest.mark.parametrize(
    ("chosen", "expected"), [("", 0), ("-1", 0), ("0", 1), ("0,1,3", 3), ("1,-1,2", 1), ("GPU-aaa, GPU-bbb", 2)]
)
def test_the_visible_list_counts_up_to_its_first_void(
    chosen: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(env, "devices_present", lambda: 8)
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": chosen}) == expected
    assert visible_gpus({}) == 8


def test_a_cpu_build_of_torch_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "torch_has_cuda", lambda: False)
    monkeypatch.setattr(env, "devices_present", lambda: 8)
    assert visible_gpus({}) == 0


def test_the_build_is_told_from_the_files_of_the_installed_torch() -> None:
    torch = pytest.importorskip("torch")
    assert env.torch_has_cuda() == (torch.version.cuda is not None)
