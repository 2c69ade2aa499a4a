"""What the planner expects of a job: memory of the fullest device, and where the profile names its device, speed and MFU.

An estimate warns and never refuses. It rests on link speeds and efficiencies that tools/plan.py prints. Torch-free.
"""

from __future__ import annotations

from bd3_megatron.config.budget import samples_before, total_steps
from bd3_megatron.config.schema import Config
from bd3_megatron.cost.assumptions import engine_assumptions
from bd3_megatron.cost.memory import memory_per_device
from bd3_megatron.cost.parameters import parameter_count
from bd3_megatron.planner.machines import GIB, machine_of
from bd3_megatron.planner.plans import Plan
from bd3_megatron.planner.timing import step_time
from launch.cluster import ClusterProfile


def prediction_lines(config: Config, profile: ClusterProfile) -> list[str]:
    """Lines "memory ..." and "speed ...".

    Args:
        config: validated, its dp set.
        profile: the cluster's.

    Raises:
        ConfigError: planner_gpu is not known, or has no peak.
    """
    # the tokenizer's size is known where the data is, and that may not be here
    if config.model.vocab_size is None:
        return [
            "memory   not estimated: set model.vocab_size to have it estimated (the data's tokenizer decides it otherwise)"
        ]
    memory = memory_per_device(config, engine_assumptions("cuda" if profile.gpus_per_node else "cpu", config))
    size = f"{parameter_count(config) / 1e6:,.0f} M parameters, about {memory.peak / GIB:.1f} GiB a device at the peak"
    if profile.planner_gpu is None:
        return [f"memory   {size}", "speed    not predicted: name planner_gpu and planner.peak_tflops in the profile"]
    machine = machine_of(profile.planner_gpu, peak_tflops=None, cluster=profile.planner)
    # timed even where it does not fit: the warning below says so
    plan = Plan(config, memory, step_time(config, machine))
    tokens = samples_before(config.train, total_steps(config.train, config.data.seq_len)) * config.data.seq_len
    rate, mfu = plan.tokens_per_second, plan.mfu(machine)
    speed = (
        f"{rate:,.0f} tokens/s, {rate / plan.devices:,.0f} a device, MFU {'unknown' if mfu is None else f'{mfu:.0%}'}, "
        f"{_duration(tokens / rate)} for the whole run (predicted, see tools/plan.py)"
    )
    lines = [f"memory   {size}, of {machine.memory_bytes / GIB:.0f} ({machine.name})", f"speed    {speed}"]
    free = machine.memory_bytes - machine.reserve_bytes
    if memory.peak > free:
        # an estimate must not keep a job out of the queue
        lines.append(
            f"warning  {free / GIB:.1f} GiB a device are free for that: find a grid that fits with tools/plan.py"
        )
    return lines


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds >= 2 * 86400 else f"{seconds / 3600:.1f} hours"
