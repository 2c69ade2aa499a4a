"""The only place where a run is wired: grid, data, model, engine, loggers, hooks.

Decides the order: what can refuse, refuses first; rank 0 speaks; everything is handed over, nothing is looked up later.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from bd3_megatron.attention.select import Backend
from bd3_megatron.checkpoint.save import Saver
from bd3_megatron.compat.device import device_name, keep_freed_memory, limit_cpu_threads, rank_device, training_dtype
from bd3_megatron.config.load import RECORD_KEY, dump_config, replace_field
from bd3_megatron.config.schema import Config
from bd3_megatron.config.unreached import unreached_settings
from bd3_megatron.config.validate import validate
from bd3_megatron.data.sampler import BatchShare
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.parallel.topology import Topology, join
from bd3_megatron.planner.peaks import PeakTflops, peak_of
from bd3_megatron.process.preflight import preflight
from bd3_megatron.process.stop import StopRequest
from bd3_megatron.process.watchdog import Watchdog
from bd3_megatron.train.backends import agreed_backends
from bd3_megatron.train.dataset import RunData, keep_tokenizer, prepare_and_open
from bd3_megatron.train.doctor import check_rows_together, diagnose_together
from bd3_megatron.train.hooks import Hooks
from bd3_megatron.train.loggers import Console, Loggers, Record, open_mirrors
from bd3_megatron.train.plan import RunPlan
from bd3_megatron.train.resume import resume
from bd3_megatron.train.state import TrainState
from bd3_megatron.train.throughput import measure_cpu_peak_tflops
from bd3_megatron.train.timeline import Timeline, device_event_factory
from bd3_megatron.train.trainer import Trainer

# Long enough to average over the scheduler's switches, short beside the start of a run.
CPU_PEAK_SECONDS = 0.5


def meet(config: Config, *, rank: int, world_size: int, local_rank: int) -> Topology:
    """Meet the other ranks, once the configuration is known to be able to run on them. Collective; touches no file.

    Raises:
        BD3Error: whatever cannot run, as one sentence.
    """
    # Before a process group exists: a refusal here costs a second, in a collective it costs the time-out.
    validate(config, world_size=world_size)
    # what only the curriculum's arithmetic can refute, before a process group exists
    RunPlan(config).phase_at(0)
    limit_cpu_threads()
    keep_freed_memory()
    device = rank_device(local_rank)
    return join(config.parallel, rank=rank, world_size=world_size, device=device)


def build_trainer(config: Config, topology: Topology) -> Trainer:
    """Make everything a run needs. Collective.

    Args:
        config: the run.
        topology: the grid that the ranks met on.

    Raises:
        BD3Error: whatever cannot run, as one sentence.
    """
    run_dir = Path(config.run.dir)
    say = announce if topology.rank == 0 else _silent
    for sentence in unreached_settings(config):
        say(f"warning: {sentence}")
    # Devices, sums and the folder are tried before data is read and a model is built.
    if config.watch.preflight:
        preflight(config, topology, say)
    data = prepare_and_open(config, rank=topology.rank, say=say)
    config = _completed(config, topology, data)
    engine, kernels = _proved_engine(config, topology, data, say)
    # After the leak check: weights are loaded only into a model whose attention was proved.
    state = resume(engine, run_dir, config, data.identity, say)
    plan = RunPlan(config, state.step, state.samples_consumed)
    # Only now: a launch that was refused leaves the files of the attempt before.
    if topology.rank == 0:
        _keep_what_runs(config, data, run_dir)
    # After the slow part of the start: until here a signal ends the process, and nothing is lost by it.
    stop = _stop_request(config)
    loggers = _loggers(config, plan, state) if topology.rank == 0 else None
    hooks = _hooks(config, engine, data, loggers, say)
    return Trainer(
        config=config,
        plan=plan,
        topology=topology,
        data=data,
        engine=engine,
        state=state,
        hooks=hooks,
        stop=stop,
        watchdog=Watchdog(config.watch, run_dir, rank=topology.rank, world_size=topology.world_size),
        peak=device_peak(config, topology, state),
        loggers=loggers,
        timeline=hooks.timeline,
        kernels=kernels,
    )


def _completed(config: Config, topology: Topology, data: RunData) -> Config:
    """The configuration as it runs: what it left to the grid and to the data is filled in."""
    config = replace_field(config, "parallel.dp", topology.dp)
    return replace_field(config, "model.vocab_size", config.model.vocab_size or data.vocab_size)


def _proved_engine(
    config: Config, topology: Topology, data: RunData, say: Callable[[str], None]
) -> tuple[ZeroEngine, dict[str, str]]:
    """The model with its optimizer, and the kernels that run in it, found right on these devices. Collective."""
    dtype = training_dtype(config.train.precision, topology.device)
    # Before the model: its layers are made for the backends of all phases.
    backends, checked = _checked_kernels(config, topology, dtype, say)
    engine = _engine(config, topology, data, backends, dtype)
    kernels = checked | engine.kernels
    for name, what in kernels.items():
        say(f"{name}: {what}")
    return engine, kernels


def _checked_kernels(
    config: Config, topology: Topology, dtype: torch.dtype, say: Callable[[str], None]
) -> tuple[Mapping[int, Backend], dict[str, str]]:
    """Attention of every block size, and which kernels were found right for attention and rows. Collective."""
    backends, why = agreed_backends(config, topology, dtype)
    if config.watch.leak_check:
        say(diagnose_together(config, backends, topology, dtype))
    return backends, {"attention": why, "rows": check_rows_together(config, topology, dtype)}


def _keep_what_runs(config: Config, data: RunData, run_dir: Path) -> None:
    """Write the configuration and the tokenizer into the run's folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    # trained from again, the file names nothing by itself: what may change is named by each command line anew
    dump_config(replace_field(config, RECORD_KEY, ()), run_dir / "config.yaml")
    keep_tokenizer(data, run_dir)


def _stop_request(config: Config) -> StopRequest:
    """Stop signals, stop file and deadline, listened to from now on."""
    stop = StopRequest(stop_file=Path(config.train.stop_file) if config.train.stop_file else None, deadline=_deadline())
    stop.install()
    return stop


def _engine(
    config: Config, topology: Topology, data: RunData, backends: Mapping[int, Backend], dtype: torch.dtype
) -> ZeroEngine:
    """The model with its optimizer."""
    vocabulary = vocabulary_of(config, size=data.vocab_size, mask_id=data.special.mask)
    model = ParallelModel(config, vocabulary, topology, backends=backends, dtype=dtype)
    share = BatchShare(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp=topology.dp,
        dp_rank=topology.dp_rank,
    )
    return ZeroEngine(model, config, num_micro_batches=share.num_micro_batches, dtype=dtype)


def device_peak(config: Config, topology: Topology, state: TrainState) -> PeakTflops:
    """Peak of one device: given, from the table, or on CPU measured by all ranks at once. Collective.

    Args:
        config: the run.
        topology: the grid.
        state: keeps what was measured, so that a resumed run's curves go on at the same scale.
    """
    given = config.throughput.peak_tflops
    # The peak of the dtype that the products run in, which is not always the one asked for.
    precision = "bf16" if training_dtype(config.train.precision, topology.device) == torch.bfloat16 else "fp32"
    if topology.device.type == "cuda" or given is not None:
        return peak_of(device_name(topology.device), precision, given_tflops=given)
    # With other ranks on the same cores a rank's share is another one.
    if state.cpu_peak is None or state.cpu_peak["ranks"] != topology.world_size:
        rate = measure_cpu_peak_tflops(CPU_PEAK_SECONDS, dist.barrier, precision=precision)
        measured = torch.tensor(rate, dtype=torch.float64)
        dist.all_reduce(measured)
        state.cpu_peak = {"ranks": topology.world_size, "tflops": float(measured) / topology.world_size}
    source = f"CPU matrix product in {precision} measured once by all ranks together"
    return PeakTflops(state.cpu_peak["tflops"], source)


def _hooks(
    config: Config, engine: ZeroEngine, data: RunData, loggers: Loggers | None, say: Callable[[str], None]
) -> Hooks:
    """What runs between steps, with the clock that the loop shares with it."""
    folder = Path(config.run.dir) / "checkpoints"
    return Hooks(
        config=config,
        topology=engine.model.topology,
        data=data,
        engine=engine,
        saver=Saver(engine, folder, asynchronous=config.checkpoint.asynchronous, warn=say),
        timeline=Timeline(event_factory=device_event_factory()),
        loggers=loggers,
    )


def _loggers(config: Config, plan: RunPlan, state: TrainState) -> Loggers:
    run_dir = Path(config.run.dir)
    # Drawn from the operating system and not from the run's seed: two runs of one seed are two runs.
    state.wandb_id = state.wandb_id or secrets.token_hex(4)
    record = Record(run_dir / "metrics.jsonl", resumed_step=state.step)
    console = Console(plan.total_steps, state.step)
    attempt = f"attempt from step {state.step}"
    mirrors = open_mirrors(config, state.wandb_id, attempt=attempt, resumed_step=state.step, say=console.say)
    return Loggers(record, console, mirrors)


def _deadline() -> float | None:
    """When to stop for a time limit: BD3_DEADLINE, seconds since the epoch, set by the batch script."""
    text = os.environ.get("BD3_DEADLINE")
    return float(text) if text else None


def announce(sentence: str) -> None:
    """Tell the person at the console; for rank 0."""
    print(f"bd3: {sentence}", file=sys.stderr, flush=True)


def _silent(sentence: str) -> None:
    # Every rank would say what the first says.
    return None
