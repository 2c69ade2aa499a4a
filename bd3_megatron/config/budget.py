"""How long a run is: the batch size of each update, the samples before it, and tokens turned into updates.

Everything is a closed form of the `train` section, so a launcher asks about billions of steps at no cost, and the plan of
a resumed run asks the same functions. Step n is the state after n optimizer updates.
"""

from __future__ import annotations

from bd3_megatron.config.schema import Config, PhaseConfig, TrainConfig


def batch_size_at(train: TrainConfig, step: int) -> int:
    """Samples of the update that leaves state `step`, over all ranks.

    Args:
        train: warm-up grows linearly, in multiples of warmup_batch_size.
        step: updates made so far, 0 or more.
    """
    first, whole = train.warmup_batch_size, train.global_batch_size
    if first is None or step >= train.batch_warmup_steps:
        return whole
    # first + (whole - first) * step / warm-up steps, rounded down to a multiple of first, which every grid can cut
    return first * (1 + (whole - first) * step // (train.batch_warmup_steps * first))


def samples_before(train: TrainConfig, step: int) -> int:
    """Samples of the first `step` updates of a run."""
    first, whole = train.warmup_batch_size, train.global_batch_size
    if first is None:
        return step * whole
    warm = min(step, train.batch_warmup_steps)
    # the sum of batch_size_at over the warm-up
    grown = _floor_sum(warm, whole - first, train.batch_warmup_steps * first)
    return first * (warm + grown) + (step - warm) * whole


def steps_for_tokens(train: TrainConfig, seq_len: int, tokens: int, first_step: int = 0) -> int:
    """The fewest updates from state `first_step` on that see at least `tokens` clean tokens.

    Args:
        train: gives the batch size of each update.
        seq_len: clean tokens of a sample.
        tokens: none are needed where it is 0 or less.
        first_step: updates made before.
    """
    samples = -(-tokens // seq_len) + samples_before(train, first_step)
    # the first batch is the smallest, so this many are enough
    enough = max(0, -(-tokens // (seq_len * batch_size_at(train, first_step))))
    low, high = 0, enough
    # samples_before rises with the step
    while low < high:
        middle = (low + high) // 2
        if samples_before(train, first_step + middle) >= samples:
            high = middle
        else:
            low = middle + 1
    return low


def phase_steps(train: TrainConfig, seq_len: int, phase: PhaseConfig, first_step: int) -> int | None:
    """Updates of a phase of diffusion.phases that begins at state `first_step`; None: it is open, to the end of the run."""
    if phase.tokens is None:
        return phase.steps
    # counted with the batch that runs: under a batch warm-up the same tokens are more updates
    return steps_for_tokens(train, seq_len, phase.tokens, first_step)


def phase_spans(config: Config) -> list[tuple[int, int]]:
    """First state and end of each of diffusion.phases, some beyond the end of the run; an open phase ends with the run."""
    steps, first = total_steps(config.train, config.data.seq_len), 0
    spans = []
    for phase in config.diffusion.phases:
        length = phase_steps(config.train, config.data.seq_len, phase, first)
        spans.append((first, max(first, steps) if length is None else first + length))
        first = spans[-1][1]
    return spans


def total_steps(train: TrainConfig, seq_len: int) -> int:
    """Updates of a run that begins at state 0; exactly one of train.steps and train.tokens is set."""
    if train.steps is not None:
        return train.steps
    # a run makes at least one update
    return max(1, steps_for_tokens(train, seq_len, train.tokens or 0))


def budget_setting(train: TrainConfig) -> str:
    """The setting that ends the run, as sentences name it: "train.steps=30"."""
    return f"train.tokens={train.tokens}" if train.steps is None else f"train.steps={train.steps}"


def _floor_sum(count: int, slope: int, divisor: int) -> int:
    """Sum of floor(slope * i / divisor) over 0 <= i < count, in logarithmic time.

    Source: the sum counts lattice points below a line; as in Euclid's algorithm, whole parts are taken off and the axes
    change places.
    """
    total, offset = 0, 0
    while count > 0:
        total += (count - 1) * count // 2 * (slope // divisor) + count * (offset // divisor)
        slope, offset = slope % divisor, offset % divisor
        reach = slope * count + offset
        count, offset = reach // divisor, reach % divisor
        slope, divisor = divisor, slope
    return total
