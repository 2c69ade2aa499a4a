"""What the time model must be told about a machine's software: rates reached, passes made, waits.

The defaults are typical of data-centre GPUs; CPU_CONSTANTS are those of cores under gloo. Calibration fits the factors at
the end to measured runs, the rest stays. Every shipped prediction prints them. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from bd3_megatron.planner.machines import Machine


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a roofline must be told; defaults are typical of data-centre GPUs, calibration replaces the factors."""

    # efficiencies are of large kernels in long runs: a short benchmark reaches more, before the device slows down to its
    # power limit
    matrix_efficiency: float = 0.65
    """Of peak, large matrix products in a long run (one H200 was measured at 0.78 of its peak, before power capping)."""
    attention_forward: float = 0.45
    """Of peak, executed pairs."""
    attention_backward: float = 0.35
    memory_efficiency: float = 0.8
    """Of the memory rate, element-wise kernels and the optimizer."""
    link_efficiency: float = 0.75
    """Of a link's rate, large messages."""
    gather_efficiency: float = 0.75
    """The same, of all-gathers and reduce-scatters."""
    softmax_columns: float = 0.0
    """Exponentials and sums of a pair, in columns of the head that cost as much; 0: within the attention efficiencies."""
    halving_seconds: float = 0.0
    """Of one halving of the structured backend, a layer and micro-batch; 0 where launches run ahead of the device."""
    rectangle_seconds: float = 0.0
    """Of one of its rectangles and heads, beyond its arithmetic."""
    logits_passes: float = 8.0
    """Times the head's logits are read or written."""
    optimizer_passes: float = 7.0
    """Times Adam reads or writes a number a parameter; fused, 4 reads and 3 writes."""
    hidden_share: float = 0.8
    """Of data-parallel traffic under way during a backward, and of interleaved sends: the share that fits behind compute."""
    # Overheads are what small models and small micro-batches pay; at hidden sizes of thousands they vanish behind compute.
    layer_overhead_seconds: float = 40e-6
    """Launches and host work a layer and micro-batch that the device waits for, forward and backward."""
    step_overhead_seconds: float = 10e-3
    """Fixed work a step: optimizer launches, loss reduction, data."""
    layer_jitter: float = 0.0
    """Range of a layer's time from rank to rank and call to call, over its mean; ranks that meet in every layer wait for
    the slowest."""
    compute_factor: float = 1.0
    """On matrix, attention, head and element-wise time; fitted."""
    communication_factor: float = 1.0
    """On all collectives; fitted."""
    optimizer_factor: float = 1.0
    """On the optimizer; fitted."""
    overhead_factor: float = 1.0
    """On both overheads; fitted."""
    shared_factor: float = 1.0
    """On compute where ranks fill the cores of a shared host; fitted."""


# from profiles of small models and of gloo on loopback; `tools/bench/plan.py` holds the predictions against 17 measured runs
CPU_CONSTANTS = Constants(
    matrix_efficiency=0.92,
    attention_forward=0.7,
    attention_backward=0.85,
    softmax_columns=26.0,
    halving_seconds=0.65e-3,
    rectangle_seconds=1.2e-6,
    memory_efficiency=0.8,
    optimizer_passes=17.0,
    link_efficiency=0.6,
    gather_efficiency=0.2,
    hidden_share=0.0,
    layer_jitter=0.6,
    shared_factor=1.05,
    layer_overhead_seconds=1.2e-3,
    step_overhead_seconds=35e-3,
)
"""Of one core under torch 2.13, from profiles of small models and of gloo on loopback: kernels are not fused, Python's cost
shows, heads of 32 columns run at three quarters the rate of 64, all-gathers at a third of the rate of all-reduces, and
what moves data takes the cores that would compute meanwhile."""


def constants_for(machine: Machine) -> Constants:
    """Constants to begin with on a machine."""
    return CPU_CONSTANTS if machine.cores else Constants()
