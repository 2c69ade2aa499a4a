"""Rules of a run as a whole: every phase and stage is reached, what is asked for can happen, time-outs fit each other.

Arithmetic on the configuration of a run that begins at step 0, and a look at the stop file. Torch-free.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from bd3_megatron.config.budget import budget_setting, phase_spans, samples_before, total_steps
from bd3_megatron.config.data import DataConfig
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import ConfigError, counted, cut


def check_run(config: Config) -> None:
    """Refuse a run that would silently leave out something that the configuration asks for.

    Raises:
        ConfigError: one sentence with value, law and remedy.
    """
    _check_run_dir(config)
    _check_phases(config)
    _check_stages(config)
    _check_held_out(config)
    _check_search(config)
    _check_spikes(config)
    _check_decay(config)
    _check_watch(config)
    _check_stop_file(config)


def _check_run_dir(config: Config) -> None:
    folder = Path(config.run.dir).absolute()
    # .. and links may lead there too; a part that cannot be read is no root
    with contextlib.suppress(OSError, RuntimeError):
        folder = folder.resolve()
    if folder.parent == folder:
        raise ConfigError(
            f"run.dir={cut(config.run.dir)} is the root of the file system; name a folder of its own, such as runs/first."
        )


def _check_phases(config: Config) -> None:
    spans, steps = phase_spans(config), total_steps(config.train, config.data.seq_len)
    for number, (first, _) in enumerate(spans):
        if first >= steps:
            raise ConfigError(
                f"diffusion.phases[{number}] begins at step {first} and the run ends at step {steps} "
                f"({budget_setting(config.train)}), so it would never train; raise the budget, shorten the phases before it, "
                "or leave it out."
            )
    # the learning-rate segment of the last phase would be left behind
    if spans and spans[-1][1] < steps:
        raise ConfigError(
            f"diffusion.phases end at step {spans[-1][1]} and the run has {counted(steps, 'step')} "
            f"({budget_setting(config.train)}); lower the budget, or leave out the length of the last phase."
        )


def _check_stages(config: Config) -> None:
    train, seq_len = config.train, config.data.seq_len
    run_samples = samples_before(train, total_steps(train, seq_len))
    steps = samples = 0
    for number, stage in enumerate(config.data.stages):
        # lengths are all in steps or all in tokens, so one of the two is 0
        first_sample = max(samples, samples_before(train, steps))
        if first_sample >= run_samples:
            raise ConfigError(
                f"data.stages[{number}] begins at sample {first_sample} and the run ends at sample {run_samples} "
                f"({budget_setting(train)}), so it would never be read; raise the budget, shorten the stages before it, or "
                "leave it out."
            )
        steps += stage.steps or 0
        # as train/mixing.py: a stage ends with the sample that holds its last token
        samples += -(-(stage.tokens or 0) // seq_len)


def refuse_without_text(data: DataConfig) -> None:
    """Refuse a run that prepares its data from text and names none.

    Raises:
        ConfigError: data.text is empty.
    """
    if not data.text:
        raise ConfigError("data.path is not set and data.text is empty; name a prepared folder or text files.")


def refuse_without_held_out(config: Config, why: str) -> None:
    """Refuse an evaluation or a search where no rows are held out.

    Args:
        config: what is asked for.
        why: begins the sentence, for example "data.valid_fraction=0.0 holds no text out".

    Raises:
        ConfigError: something is asked for that needs held-out rows.
    """
    evaluate = config.evaluate
    asked: dict[str, int | bool] = {
        "evaluate.every_steps": evaluate.every_steps,
        "evaluate.at_start_and_end": evaluate.at_start_and_end,
        "diffusion.search_every_steps": config.diffusion.search_every_steps,
    }
    for name, value in asked.items():
        if value:
            off = "false" if value is True else "0"
            raise ConfigError(f"{why}, and {name}={value} needs held-out rows; hold some out, or set {name} to {off}.")


def _check_held_out(config: Config) -> None:
    data = config.data
    is_prepared_by_the_run = data.path is None and not data.mixtures and bool(data.text)
    if is_prepared_by_the_run and data.valid_fraction == 0:
        refuse_without_held_out(config, "data.valid_fraction=0.0 holds no text out")


def _check_search(config: Config) -> None:
    diffusion, evaluate = config.diffusion, config.evaluate
    # the official code scores one draw a sequence
    if evaluate.official and evaluate.draws != 1:
        raise ConfigError(
            f"evaluate.draws={evaluate.draws} with evaluate.official=true, which scores one draw; leave one of them out."
        )
    if not diffusion.search_every_steps:
        return
    if not diffusion.search_widths:
        raise ConfigError(
            f"diffusion.search_every_steps={diffusion.search_every_steps} with search_widths=[] leaves no intervals to "
            "compare; give widths such as [0.5, 0.7, 0.9], or set search_every_steps to 0."
        )
    if diffusion.phases and all(phase.interval is not None for phase in diffusion.phases):
        raise ConfigError(
            f"diffusion.search_every_steps={diffusion.search_every_steps} has nothing to search for, because every phase names "
            "its interval; leave one out, or set search_every_steps to 0."
        )


def _check_spikes(config: Config) -> None:
    train = config.train
    if train.spike_action != "rollback":
        return
    if train.spike_factor == 0:
        raise ConfigError(
            "train.spike_action=rollback with train.spike_factor=0, which looks for no spike; set spike_factor, for example "
            "to 3, or leave spike_action out."
        )
    if config.checkpoint.every_steps == 0:
        raise ConfigError(
            "train.spike_action=rollback with checkpoint.every_steps=0: no checkpoint is saved before the end, so there is "
            "none to return to; set checkpoint.every_steps, or spike_action to skip."
        )


def _check_decay(config: Config) -> None:
    lr, decay = config.optim.lr, config.optim.weight_decay
    # decoupled decay multiplies a weight by 1 - lr * decay
    if lr * decay >= 1:
        raise ConfigError(
            f"optim.lr={lr} x optim.weight_decay={decay} = {lr * decay:g} is 1 or more, so each update would take away all of "
            "a weight; lower one of them (0.1 is a usual weight decay)."
        )


def _check_watch(config: Config) -> None:
    watch, timeout = config.watch, config.parallel.collective_timeout_seconds
    # without a factor nobody watches, and the time-out alone ends a hang
    if watch.hang_factor > 0 and watch.hang_seconds >= timeout:
        raise ConfigError(
            f"watch.hang_seconds={watch.hang_seconds:g} is not below parallel.collective_timeout_seconds={timeout}, so the "
            "collective would give up before the watchdog names the rank; raise the time-out to more than "
            f"{watch.hang_seconds:g}, or lower hang_seconds."
        )


def _check_stop_file(config: Config) -> None:
    if config.train.stop_file is None:
        return
    path = Path(config.train.stop_file)
    # Obeying it removes it, which must never cost a file that somebody wrote for another purpose.
    size = 0
    # not there, or not to be seen from here: it cannot be what would be lost
    with contextlib.suppress(OSError):
        size = path.stat().st_size
    held = "is a folder" if path.is_dir() else f"holds {size} bytes" if size else None
    if held is not None:
        raise ConfigError(
            f"train.stop_file={path} {held}, and a stop file is removed once it is obeyed; name a file that is not there yet, "
            "and make it with touch when the run shall stop."
        )
