"""SLURM jobs before the queue sees them: the script says what the profile says, and what cannot run is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

import pytest

from bd3_megatron.config.load import load_config
from bd3_megatron.errors import BD3Error, ConfigError, GridError, LaunchError
from launch import slurm
from launch.submission import copy_code, with_absolute_paths

ROOT = Path(__file__).resolve().parents[3]
PROFILES = sorted((ROOT / "configs/cluster").glob("*.yaml"))
NOW = datetime(2026, 1, 2, 3, 4, 5)
DRY_RUN_SECONDS = 1.0
"""Of processor time."""


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text("partition: main\nranks_per_node: 2\ntime: '01:00:00'\n")
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text((ROOT / "configs/debug_cpu.yaml").read_text().replace("runs/debug_cpu", str(tmp_path / "run")))
    return path


def planned(profile: Path, config: Path, *arguments: str) -> slurm.Submission:
    options = slurm.build_parser().parse_intermixed_args([str(config), "--cluster", str(profile), *arguments])
    return slurm.submission_of(options, config.parent, NOW)


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ").strip('"') for line in script.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_every_shipped_profile_renders_a_script_that_bash_and_shellcheck_accept(
    path: Path, launcher: str, config: Path, tmp_path: Path
) -> None:
    site = tmp_path / "shared.yaml"
    site.write_text(path.read_text().replace("/shared:/shared", f"{tmp_path}:{tmp_path}"))
    submission = planned(site, config, "--launcher", launcher, "train.global_batch_size=64")
    script = tmp_path / "job.sh"
    script.write_text(submission.script)
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    assert all(line.startswith("--") for line in directives(submission.script))
    try:
        done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("shellcheck is not installed")
    assert done.returncode == 0, done.stdout


def test_shipped_profiles_are_the_four_we_speak_of() -> None:
    assert {p.stem for p in PROFILES} == {"a100_dgx", "a100_cloud", "h100", "cpu"}


def test_one_task_a_rank_or_one_torchrun_a_node(profile: Path, config: Path) -> None:
    plain = directives(planned(profile, config, "--nodes", "2").script)
    assert {"--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"} <= set(plain)
    agent = directives(planned(profile, config, "--nodes", "2", "--launcher", "torchrun").script)
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2"} <= set(agent)


def test_every_key_of_a_profile_reaches_the_script(profile: Path, config: Path, tmp_path: Path) -> None:
    profile.write_text(
        """
partition: main
account: acc
qos: high
constraint: "a100&ib"
gpus_per_node: 4
gpu_type: a100
cpus_per_rank: 6
memory_gb: 500
time: "1-02:03:04"
signal_lead_seconds: 240
exclusive: true
exclude: n[3,7]
mail_user: a@b.c
modules: [cuda/12]
setup: ["ulimit -l unlimited"]
environment_file: /etc/site env
environment: {NCCL_DEBUG: INFO, ODD: "a b"}
python: /opt/py/bin/python3
extra: ["--comment=two words"]
container: {kind: pyxis, image: "site#bd3", mounts: ["/a:/a", "FOLDER:FOLDER"]}
""".replace("FOLDER", str(tmp_path))
    )
    script = planned(profile, config, "--nodes", "2").script
    assert set(directives(script)) >= {
        "--account=acc",
        "--qos=high",
        "--constraint=a100&ib",
        "--gpus-per-node=a100:4",
        "--cpus-per-task=6",
        "--mem=500G",
        "--time=1-02:03:04",
        "--signal=B:USR1@240",
        "--exclusive",
        "--exclude=n[3,7]",
        "--mail-user=a@b.c",
        "--mail-type=END,FAIL",
        "--comment=two words",
        "--requeue",
        "--open-mode=append",
    }
    for line in (
        "module load cuda/12",
        "source '/etc/site env'",
        "ulimit -l unlimited",
        "export NCCL_DEBUG=INFO",
        "export ODD='a b'",
        f"srun_options=('--container-image=site#bd3' --container-mounts=/a:/a,{tmp_path}:{tmp_path} --no-container-mount-home)",
        "python=python3",
    ):
        assert line in script.splitlines(), line


def test_values_with_blanks_survive_bash(profile: Path, config: Path) -> None:
    config.write_text(config.read_text().replace(str(config.parent / "run"), str(config.parent / "my run; rm -rf x")))
    script = planned(profile, config).script
    head = script.split("# ---- the same")[0] + 'printf "%s\\n" "${run_dirs[0]}"\n'
    done = subprocess.run(["bash", "-c", head], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(config.parent / "my run; rm -rf x")


@pytest.mark.parametrize(
    ("arguments", "nodes"),
    [
        ([], 1),
        (["--nodes", "3", "train.global_batch_size=24"], 3),
        (["parallel.tp=2", "parallel.dp=2"], 2),
        (["parallel.tp=4", "--nodes", "2"], 2),
        (["--ranks-per-node", "4", "parallel.dp=8"], 2),
    ],
)
def test_nodes_are_asked_for_or_what_a_given_dp_needs(
    profile: Path, config: Path, arguments: list[str], nodes: int
) -> None:
    assert planned(profile, config, *arguments).job.nodes == nodes


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        (
            ["--nodes", "3", "parallel.dp=4"],
            GridError,
            r"^3 nodes x 2 ranks = 6 do not match tp=1 x pp=1 x cp=1 x dp=4 = 4; use --nodes 2 or leave",
        ),
        (
            ["parallel.dp=3"],
            GridError,
            r"^2 nodes x 2 ranks = 4 do not match .* = 3; use --ranks-per-node or leave parallel\.dp unset\.$",
        ),
        (
            ["parallel.tp=4"],
            GridError,
            r"^1 node x 2 ranks = 2 is not a multiple of tp=4 x pp=1 x cp=1 = 4; use --nodes 2 or a multiple",
        ),
        (["--nodes", "0"], GridError, r"^--nodes 0 is outside \[1, 100000\]; ask for the nodes of the grid\.$"),
        (["--nodes", "-2"], GridError, r"^--nodes -2 is outside"),
        (["--nodes", str(10**9)], GridError, r"^--nodes 1000000000 is outside"),
        (
            ["--name", "a\nb"],
            ConfigError,
            r"^--name='a\\nb' is not a job's name: one line without quotes and / , %; give one\.$",
        ),
        (["--name", ""], ConfigError, r"^--name='' is not a job's name"),
        (
            ["run.dir=50%"],
            ConfigError,
            r"50%' is not a path that SLURM reads as it stands: without double quotes, backslashes and",
        ),
        (["--nodes", "8"], GridError, r"^global_batch_size=8 is not a multiple of dp x micro_batch_size=16"),
        (["parallel.tp=3", "--nodes", "3"], GridError, r"^tp=3 does not divide num_heads=4"),
        (
            ["--time", "00:02:00"],
            LaunchError,
            r"^cluster\.time=00:02:00 leaves no time to train: ranks are told to save 180 s before",
        ),
        (["--time", "90"], LaunchError, r"^cluster\.time='90' is not \[days-\]hours:minutes:seconds"),
        (["--time", "9999-00:00:00"], LaunchError, r"^cluster\.time='9999-00:00:00' is not \[days-\]"),
        (["--time", "01:99:00"], LaunchError, r"^cluster\.time='01:99:00' is not \[days-\]"),
        (
            ["--time", "1-30:00:00"],
            LaunchError,
            r"^cluster\.time='1-30:00:00' is more than 365 days, or has days and more than",
        ),
        (
            ["--ranks-per-node", "0"],
            ConfigError,
            r"^cluster\.ranks_per_node=0 is outside \[1, 1000\]; give a whole number",
        ),
        (["--chain", "0"], LaunchError, r"^--chain 0 is outside \[1, 1000\]; give a number inside\.$"),
        (["--chain", "5000"], LaunchError, r"^--chain 5000 is outside"),
        (["--max-attempts", "0"], LaunchError, r"^--max-attempts 0 is outside \[1, 1000\]"),
        (
            ["--array", "optim.lr=1"] * 1001,
            LaunchError,
            r"^1001 --array tasks are more than SLURM takes; give at most 1000\.$",
        ),
        (["--chain", "2", "--array", "optim.lr=1"], LaunchError, r"^--chain with --array"),
        (
            ["--array", "run.dir=/tmp/x optim.lr=1", "--array", "run.dir=/tmp/x optim.lr=2"],
            LaunchError,
            r"^--array tasks share a run folder",
        ),
        (
            ["--array", "optim.lr=1 run.seed=2", "--array", "optim.lr=2", "--array", "run.seed=2 optim.lr=1.0"],
            LaunchError,
            r"^--array 'optim\.lr=1 run\.seed=2' and --array 'run\.seed=2 optim\.lr=1\.0' are the same run; leave one of them",
        ),
        (
            ["--array", "optim.lr='1"],
            LaunchError,
            r'^--array "optim\.lr=\'1" is no shell text \(No closing quotation\); mend',
        ),
        (
            ["optim.lr=1", "optim.lr=2"],
            ConfigError,
            r"^'optim\.lr=1' and 'optim\.lr=2' set the same key, and only the last",
        ),
        (["--array", "optim.lr=fast"], ConfigError, r"^optim\.lr='fast' is not a number"),
        (["run.dir=run.yaml/x"], LaunchError, r"run\.yaml' is a file; give a folder\.$"),
        (["model.num_layer=3"], ConfigError, r"^unknown key model\.num_layer; did you mean model\.num_layers\?$"),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_is_written(
    profile: Path, config: Path, arguments: list[str], kind: type[BD3Error], sentence: str
) -> None:
    before = sorted(p.name for p in config.parent.iterdir())
    with pytest.raises(kind, match=sentence):
        planned(profile, config, *arguments)
    assert sorted(p.name for p in config.parent.iterdir()) == before


CONTAINER = "container: {{kind: {kind}, image: site#bd3, mounts: [{mounts}]}}\n"


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_what_the_container_does_not_show_is_refused(profile: Path, config: Path, tmp_path: Path, kind: str) -> None:
    text = profile.read_text()

    def plan(mounts: str, *overrides: str) -> slurm.Submission:
        profile.write_text(text + CONTAINER.format(kind=kind, mounts=mounts))
        return planned(profile, config, *overrides)

    whole = f'"{tmp_path}:{tmp_path}:rw"'
    assert plan(whole, "data.path=data").job.folder.is_relative_to(tmp_path)
    with pytest.raises(
        LaunchError, match=r"run is not visible in the container, which mounts no folder under its own name;"
    ):
        plan("")
    with pytest.raises(
        LaunchError,
        match=r"^run\.dir=.*/run is not visible in the container, which mounts /data under its own name; name a folder below "
        r"one that is, or add it to cluster\.container\.mounts with the same path on both sides, as in /shared:/shared\.$",
    ):
        plan("/data:/data")
    with pytest.raises(LaunchError, match="mounts no folder under its own name"):
        plan(f'"{tmp_path}:/work"')
    for key, value in (
        ("data.path", "/other/data"),
        ("train.stop_file", "/other/stop"),
        ("data.text", "[/other/a.txt]"),
    ):
        name = "data.text[0]" if key == "data.text" else key
        with pytest.raises(LaunchError, match=rf"^{re.escape(name)}=/other/.* is not visible in the container"):
            plan(whole, f"{key}={value}")
    # what hides a folder of a mount is what the ranks would see there
    with pytest.raises(LaunchError, match=r"run is not visible in the container"):
        plan(f'{whole}, "/elsewhere:{tmp_path}/run"')
    profile.write_text(text)
    assert planned(profile, config).job.name == "bd3-run", "without a container every path is seen"


@pytest.mark.parametrize("flags", ["ro", "x-create=dir+ro"])
def test_what_the_ranks_write_may_not_lie_on_a_read_only_mount(
    profile: Path, config: Path, tmp_path: Path, flags: str
) -> None:
    text = profile.read_text()
    read_only, writable = f'"{tmp_path}:{tmp_path}:{flags}"', f'"{tmp_path}/run:{tmp_path}/run"'

    def plan(mounts: str, *overrides: str, environment: str = "") -> slurm.Submission:
        profile.write_text(text + CONTAINER.format(kind="pyxis", mounts=mounts) + environment)
        return planned(profile, config, *overrides)

    with pytest.raises(
        LaunchError,
        match=rf"^run\.dir=.*/run is written by the ranks, and the container mounts {tmp_path} read-only; drop ro from",
    ):
        plan(read_only)
    # the deepest mount is what a path leads to, in whatever order they stand
    assert plan(f"{writable}, {read_only}", "data.path=data").job.name == "bd3-run"
    with pytest.raises(LaunchError, match=rf"^train\.stop_file={tmp_path}/stop is written by the ranks"):
        plan(f"{writable}, {read_only}", "train.stop_file=stop")
    cache = "environment: {{TRITON_CACHE_DIR: {}}}\n"
    with pytest.raises(LaunchError, match=r"^cluster\.environment\.TRITON_CACHE_DIR=.*/cache is written by the ranks"):
        plan(f"{writable}, {read_only}", environment=cache.format(tmp_path / "cache"))
    # the container's own
    assert plan(f"{writable}, {read_only}", environment=cache.format("/tmp/cache")).job.name == "bd3-run"


def test_a_job_is_named_after_its_folder_whatever_that_holds(profile: Path, config: Path) -> None:
    assert planned(profile, config, "run.dir=my run, (2)").job.name == "bd3-my-run---2-"


def test_an_array_gives_each_task_its_config_and_run_folder(profile: Path, config: Path) -> None:
    submission = planned(profile, config, "--array", "optim.lr=1e-3", "--array", "optim.lr=3e-4 optim.warmup_steps=5")
    assert [c.optim.lr for c in submission.configs] == [1e-3, 3e-4]
    assert submission.configs[1].optim.warmup_steps == 5
    assert [Path(c.run.dir).name for c in submission.configs] == ["run-0", "run-1"]
    assert "--array=0-1" in directives(submission.script)


def test_a_chain_waits_for_its_own_name_and_does_not_requeue(profile: Path, config: Path) -> None:
    submission = planned(profile, config, "--chain", "3")
    assert submission.copies == 3
    assert {"--dependency=singleton", "--no-requeue"} <= set(directives(submission.script))
    assert "chained=1" in submission.script


def test_relative_paths_become_absolute_once(config: Path) -> None:
    loaded = load_config(
        config,
        [
            "run.dir=r",
            "data.path=d",
            "data.text=[builtin:python-docs, t]",
            "data.mixture={m: 1.0}",
            "train.stop_file=s",
        ],
    )
    absolute = with_absolute_paths(loaded, Path("/base"))
    assert (absolute.run.dir, absolute.data.path, absolute.train.stop_file) == ("/base/r", "/base/d", "/base/s")
    assert absolute.data.text == ("builtin:python-docs", "/base/t")
    assert absolute.data.mixture == {"/base/m": 1.0} and absolute.data.tokenizer == "bytes"
    assert with_absolute_paths(absolute, Path("/other")) == absolute


def test_folders_of_stages_and_a_local_stream_become_absolute_and_a_hub_name_does_not(
    config: Path, tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    stages = load_config(config, ["data.stages=[{mixture: {m: 1.0}, steps: 2}, {mixture: {n: 1.0}}]"])
    assert with_absolute_paths(stages, Path("/base")).data.mixed_folders == ("/base/m", "/base/n")
    for name, expected in (("corpus", str(tmp_path / "corpus")), ("someone/corpus", "someone/corpus")):
        stream = load_config(config, [f"data.stream.dataset={name}"])
        absolute = with_absolute_paths(stream, tmp_path).data.stream
        assert absolute is not None and absolute.dataset == expected


def test_the_snapshot_is_what_a_rank_imports(tmp_path: Path, clean_environment: Mapping[str, str]) -> None:
    copy_code(tmp_path / "code")
    code = "import bd3_megatron.cli as c, launch.env as e; print(c.__file__, e.__file__)"
    environment = dict(clean_environment) | {"PYTHONPATH": str(tmp_path / "code")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "code", env=environment, capture_output=True, text=True, check=True
    )
    assert all(word.startswith(str(tmp_path)) for word in done.stdout.split())


def test_submission_hands_sbatch_what_it_wrote(
    profile: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = fake_sbatch(tmp_path, monkeypatch, "echo 77")
    monkeypatch.setenv("SBATCH_PARTITION", "leaked")
    assert slurm.main([str(config), "--cluster", str(profile), "train.steps=3"]) == 0
    folder = next((tmp_path / "run/slurm").iterdir())
    assert sorted(p.name for p in folder.iterdir()) == ["code", "config.0.yaml", "job.json", "job.sh"]
    assert load_config(folder / "config.0.yaml").train.steps == 3
    record = json.loads((folder / "job.json").read_text())
    assert record["command"][0] == str(config)
    assert (folder / "code/COMMIT").read_text().strip() == (record["git_commit"] or "")
    calls = log.read_text()
    assert "--test-only" in calls and "--parsable" in calls and "leaked" not in calls
    out = capsys.readouterr().out
    assert "job id   77" in out and "scancel 77" in out and f"{folder}/77.log" in out


def test_what_sbatch_refuses_is_one_line_and_nothing_is_written(
    profile: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    assert slurm.main([str(config), "--cluster", str(profile)]) == 2
    assert capsys.readouterr().err == (
        "slurm: error: sbatch refuses the job (invalid partition specified: x); nothing was submitted: "
        "mend the cluster profile or --nodes.\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_machine_without_sbatch_is_told_so(
    profile: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.main([str(config), "--cluster", str(profile)]) == 2
    assert "sbatch is not on this machine; run this on a login node, or look with --dry-run." in capsys.readouterr().err


def test_a_dry_run_answers_within_a_second_without_torch(
    profile: Path,
    config: Path,
    tmp_path: Path,
    clean_environment: Mapping[str, str],
    cpu_seconds: Callable[..., tuple[float, subprocess.CompletedProcess[str]]],
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('a login node has no torch')\n")
    environment = dict(clean_environment) | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "launch/slurm.py"), str(config), "--cluster", str(profile), "--dry-run"]
    seconds, done = cpu_seconds(command, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert seconds < DRY_RUN_SECONDS
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "# grid     1 node x 2 ranks = tp 1 x pp 1 x cp 1 x dp 2, srun" in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_plan_names_memory_and_warns_of_tensor_parallel_across_nodes(profile: Path, config: Path) -> None:
    lines = slurm.plan_lines(planned(profile, config, "parallel.tp=4", "--nodes", "2", "model.vocab_size=300"))
    assert any("GiB a device at the peak" in line for line in lines)
    assert any(line.startswith("warning  tp=4 spans nodes of 2 ranks") for line in lines)
    assert any("set model.vocab_size" in line for line in slurm.plan_lines(planned(profile, config)))


def test_the_plan_says_once_what_the_budget_ends_before(profile: Path, config: Path) -> None:
    sweep = ("--array", "optim.lr=1e-3", "--array", "optim.lr=1e-4")
    lines = slurm.plan_lines(planned(profile, config, "evaluate.every_steps=31", *sweep))
    assert [line for line in lines if line.startswith("warning")] == [
        "warning  evaluate.every_steps=31 is not reached in a run of 30 steps (train.steps=30): nothing is evaluated"
    ]


def test_the_plan_predicts_speed_where_the_profile_names_the_device(profile: Path, config: Path) -> None:
    def lines(*overrides: str) -> list[str]:
        found = slurm.plan_lines(planned(profile, config, "model.vocab_size=300", *overrides))
        return [line for line in found if line.startswith(("speed", "warning"))]

    assert lines() == ["speed    not predicted: name planner_gpu and planner.peak_tflops in the profile"]
    text = profile.read_text()
    profile.write_text(f"{text}planner_gpu: a100-80g\nplanner: {{peak_tflops: 312}}\n")
    (speed,) = lines()
    assert re.fullmatch(
        r"speed    [\d,]+ tokens/s, [\d,]+ a device, MFU \d+%, [\d.]+ hours for the whole run \(.*\)", speed
    )
    assert " days for the whole run" in lines("train.steps=null", "train.tokens=1000000000000")[0]
    profile.write_text(
        f"{text}planner_gpu: a100-80g\nplanner: {{peak_tflops: 312, memory_gib: 0.1, reserve_gib: 0.099}}\n"
    )
    assert lines()[1] == "warning  0.0 GiB a device are free for that: find a grid that fits with tools/plan.py"
    profile.write_text(f"{text}planner_gpu: a1000\n")
    with pytest.raises(ConfigError, match="gpu 'a1000' is not known; use a100, a100-40g"):
        lines()
    profile.write_text(f"{text}planner_gpu: a100-80g\n")
    with pytest.raises(
        ConfigError, match="gpu 'a100-80g' has no known peak at this precision; give planner.peak_tflops"
    ):
        lines()


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """An sbatch that records how it was called; the real one is met in the tests with a real SLURM."""
    program, log = folder / "bin/sbatch", folder / "sbatch.log"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "$@" "$SBATCH_PARTITION" >> {log}\ncat >/dev/null\n{body}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return log
