"""Every legal way to run a model on N devices, what it needs and how long it takes, best first.

Tried are all grids tp x pp x cp x dp = N with every vpp that divides the layers, every ep, sequence parallelism wherever tp > 1,
micro-batches in powers of two, three recomputations, and every ZeRO stage a grid allows. `config/validate.py` says what is
illegal. A plan does not fit when the fullest stage needs more memory than the device's less its reserve. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bd3_megatron.config.schema import Config, ModelConfig, ParallelConfig
from bd3_megatron.config.validate import validate
from bd3_megatron.cost.assumptions import engine_assumptions
from bd3_megatron.cost.flops import convention_flops
from bd3_megatron.cost.memory import MemoryBytes, memory_per_device
from bd3_megatron.cost.shape import data_parallel
from bd3_megatron.errors import ConfigError, GridError, counted, divisors
from bd3_megatron.planner.constants import Constants
from bd3_megatron.planner.machines import GIB, Machine
from bd3_megatron.planner.peaks import TERA
from bd3_megatron.planner.timing import StepTime, step_time

# a bound on the search: matrices are large enough for full efficiency long before, and memory grows with it
MAX_MICRO_BATCH = 32
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """One way to run, with its prediction."""

    config: Config
    memory: MemoryBytes
    time: StepTime | None
    """None where it does not fit."""

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(tp, pp, cp, dp)."""
        parallel = self.config.parallel
        return parallel.tp, parallel.pp, parallel.cp, data_parallel(self.config)

    @property
    def devices(self) -> int:
        tp, pp, cp, dp = self.grid
        return tp * pp * cp * dp

    @property
    def tokens_per_second(self) -> float:
        if self.time is None:
            return 0.0
        return self.config.train.global_batch_size * self.config.data.seq_len / self.time.total

    def mfu(self, machine: Machine) -> float | None:
        """Share of the devices' peak by convention; None where nothing runs, and above 1, where the peak is wrong."""
        if self.time is None:
            return None
        # ranks that share cores share their peak
        flops = self.config.train.global_batch_size * convention_flops(self.config).total
        devices = min(self.devices, machine.cores) if machine.cores else self.devices
        share = flops / (self.time.total * devices * machine.peak_tflops * TERA)
        return share if share <= 1.0 else None

    def days(self, tokens: float) -> float:
        """To train on so many clean tokens."""
        return tokens / self.tokens_per_second / 86_400

    @property
    def label(self) -> str:
        """Grid and settings in short: "tp2 pp4 vpp2 dp8 sp, mb 4, full, zero 1"."""
        parallel, train = self.config.parallel, self.config.train
        sizes = {"tp": parallel.tp, "pp": parallel.pp, "vpp": parallel.vpp or 1, "cp": parallel.cp, "ep": parallel.ep}
        axes = [f"{name}{size}" for name, size in sizes.items() if size > 1] + [f"dp{data_parallel(self.config)}"]
        axes += ["sp"] if parallel.sequence_parallel else []
        return f"{' '.join(axes)}, mb {train.micro_batch_size}, {train.recompute}, zero {parallel.zero_stage}"


@dataclass(frozen=True)
class RankedPlans:
    """All plans of a model on so many devices."""

    fitting: Sequence[Plan]
    """Fastest first."""
    too_large: Sequence[Plan]
    """Smallest first."""
    illegal: int
    """Combinations that validation refuses."""


def plan_of(config: Config, machine: Machine, constants: Constants | None = None) -> Plan:
    """The prediction for one configuration, whether it fits or not.

    Args:
        config: validated, its dp set.
        machine: device and links.
        constants: of the time model; None: the machine's defaults.
    """
    memory = memory_per_device(config, engine_assumptions(machine.device_type, config))
    # the time costs more than the memory, and most candidates of a large model fail there
    fits = memory.peak <= machine.memory_bytes - machine.reserve_bytes
    return Plan(config, memory, step_time(config, machine, constants) if fits else None)


def rank_plans(config: Config, devices: int, machine: Machine, constants: Constants | None = None) -> RankedPlans:
    """Try every way to run `config` on `devices` devices.

    Args:
        config: model, data, batch; its own parallel section is replaced.
        devices: N.
        machine: device and links.
        constants: of the time model.

    Raises:
        ConfigError: not one grid is legal: says which law the last one broke.
    """
    plans: list[Plan] = []
    illegal, last_reason = 0, ""
    # validation is the law: a plan that it refuses would be refused at the start of the run, too
    for candidate in _candidates(config, devices):
        try:
            validate(candidate, world_size=devices)
        except ConfigError as error:
            illegal, last_reason = illegal + 1, str(error)
            continue
        plans.append(plan_of(candidate, machine, constants))
    if not plans:
        raise ConfigError(
            f"no grid of {counted(devices, 'device')} is legal for this configuration; the last was refused: {last_reason}"
        )
    fitting = sorted((p for p in plans if p.time is not None), key=lambda p: -p.tokens_per_second)
    too_large = sorted((p for p in plans if p.time is None), key=lambda p: p.memory.peak)
    return RankedPlans(fitting, too_large, illegal)


def on_devices(config: Config, devices: int) -> Config:
    """The configuration's own grid on `devices` devices, dp taking what the other axes leave.

    Raises:
        ConfigError: that grid is not legal there.
    """
    ranks = config.parallel.model_ranks
    if devices % ranks:
        raise GridError(f"{counted(devices, 'device is', 'devices are')} not a multiple of tp x pp x cp = {ranks}.")
    spread = replace(config, parallel=replace(config.parallel, dp=devices // ranks))
    validate(spread, world_size=devices)
    return spread


def _candidates(config: Config, devices: int) -> Iterator[Config]:
    for tp, pp, cp in _grids(config, devices):
        dp = devices // (tp * pp * cp)
        if config.train.global_batch_size % dp:
            continue
        parallels = _parallels(replace(config.parallel, tp=tp, pp=pp, cp=cp, dp=dp), config.model)
        for micro in _micro_batches(config.train.global_batch_size // dp):
            # recomputation trades the memory that a larger micro-batch needs, so all pairs are tried
            train = [replace(config.train, micro_batch_size=micro, recompute=recompute) for recompute in RECOMPUTE]
            yield from (replace(config, parallel=p, train=t) for p in parallels for t in train)


def _parallels(grid: ParallelConfig, model: ModelConfig) -> list[ParallelConfig]:
    """A grid with every interleaving, ZeRO stage and dealing of experts it allows."""
    # with tp > 1 only the sequence-parallel form is tried: it divides the memory of norms and residuals by tp, for two
    # gathers more a layer
    cut = replace(grid, sequence_parallel=grid.tp > 1, layers_per_stage=(), ep=1)
    if model.experts is not None:
        # neither ZeRO 2 nor interleaved stages are legal with experts
        ranks = math.gcd(model.experts.number, grid.tp * grid.cp * grid.replicas)
        return [replace(cut, vpp=None, zero_stage=1, ep=ep) for ep in divisors(ranks)]
    if grid.pp == 1:
        stages: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
        return [replace(cut, vpp=None, zero_stage=stage) for stage in stages]
    # the pipeline accumulates whole gradients, which ZeRO 2 and 3 do not keep: with pp > 1 only ZeRO 1 is legal
    chunks = [None, *(v for v in (2, 4) if model.num_layers % (grid.pp * v) == 0)]
    return [replace(cut, vpp=vpp, zero_stage=1) for vpp in chunks]


def _grids(config: Config, devices: int) -> Iterator[tuple[int, int, int]]:
    for tp in divisors(devices):
        # a key and value head is never split
        if config.model.kv_heads % tp:
            continue
        for pp in divisors(devices // tp):
            if pp > config.model.num_layers:
                continue
            # zigzag slices need 2 cp blocks at least
            yield from (
                (tp, pp, cp) for cp in divisors(devices // tp // pp) if cp == 1 or 2 * cp <= config.data.seq_len
            )


def _micro_batches(sequences: int) -> list[int]:
    # powers of two, to keep the search short
    return [m for m in divisors(sequences) if m & (m - 1) == 0 and m <= MAX_MICRO_BATCH]


def why_not(plan: Plan, best: Plan | None, machine: Machine) -> str:
    """One clause: what a plan lacks beside the best one."""
    if plan.time is None:
        short = plan.memory.peak - (machine.memory_bytes - machine.reserve_bytes)
        # host memory is not the device's, and the step's temporaries are gone when activations are at their peak
        parts = {k: v for k, v in plan.memory.parts().items() if k not in ("host", "step_temporaries")}
        largest = max(parts, key=lambda part: parts[part])
        return f"{short / GIB:.1f} GiB too large, most of it {largest} ({parts[largest] / GIB:.1f} GiB)"
    if best is None or best.time is None or plan is best:
        return "best"
    # the two parts that lose most explain a plan; all twelve would hide the reason
    more = {part: seconds - best.time.parts()[part] for part, seconds in plan.time.parts().items()}
    worst = sorted(more, key=lambda part: -more[part])[:2]
    slower = plan.time.total / best.time.total - 1
    causes = ", ".join(f"{part} +{more[part] / best.time.total:.0%}" for part in worst if more[part] > 0)
    return f"{slower:.0%} slower ({causes})" if causes else f"{slower:.0%} slower"


def best_by_grid(found: RankedPlans) -> list[Plan]:
    """The best plan of every grid, fitting ones first."""
    chosen: dict[tuple[int, int, int, int], Plan] = {}
    for plan in [*found.fitting, *found.too_large]:
        # plans are sorted, so the first of a grid is its best
        chosen.setdefault(plan.grid, plan)
    return list(chosen.values())
