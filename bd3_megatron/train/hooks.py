"""What runs between steps, on all ranks alike: evaluation, interval search, saving.

Decides when; how is the business of evaluate/, diffusion/interval_search and checkpoint/.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bd3_megatron.checkpoint.load import load
from bd3_megatron.checkpoint.verify import newest_valid
from bd3_megatron.evaluate.in_loop import evaluate_on_grid
from bd3_megatron.train.search import search_interval
from bd3_megatron.train.state import TrainState

if TYPE_CHECKING:
    from bd3_megatron.train.trainer import Trainer


def after_step(trainer: Trainer, *, stopping: bool) -> None:
    """Whatever is due at the state just reached."""
    step, config = trainer.state.step, trainer.config
    is_last = step == trainer.plan.total_steps
    at_end = is_last and config.evaluate.at_start_and_end
    if at_end or _is_due(step, config.evaluate.every_steps):
        evaluate(trainer)
    if not is_last and _is_due(step, config.diffusion.search_every_steps):
        search(trainer)
    if is_last or stopping or _is_due(step, config.checkpoint.every_steps):
        save_checkpoint(trainer)


def finish(trainer: Trainer) -> None:
    """Wait for what still runs in the background.

    Raises:
        CheckpointError: the last checkpoint could not be written.
    """
    trainer.saver.finish()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluate(trainer: Trainer) -> None:
    """Held-out perplexity with the averaged weights, written as a record of the current step."""
    if trainer.data.valid is None:
        return
    block_size = trainer.plan.place(trainer.state.step).phase.block_size
    with trainer.timeline.span("evaluation"):
        estimate = evaluate_on_grid(
            trainer.engine, trainer.topology, trainer.data.valid, trainer.config, block_size=block_size
        )
    if trainer.loggers is not None:
        trainer.loggers.write({"step": trainer.state.step, **estimate.metrics()})


def search(trainer: Trainer) -> None:
    """Choose the interval of the phase that the next step is in; resumed runs find it in the train state."""
    if trainer.data.valid is None or trainer.config.diffusion.objective == "ar":
        return
    if not trainer.plan.is_searched(trainer.state.step):
        return
    place = trainer.plan.place(trainer.state.step)
    # one noisy copy is what the search scores; the next step takes the training rows up again
    trainer.engine.model.enter_phase(place.phase.block_size, views=1)
    with trainer.timeline.span("evaluation"):
        choice = search_interval(
            trainer.engine,
            trainer.topology,
            trainer.data.valid,
            trainer.config,
            block_size=place.phase.block_size,
            step=trainer.state.step,
        )
    trainer.state.intervals[place.phase.block_size] = (choice.interval.beta, choice.interval.omega)
    if trainer.loggers is not None:
        trainer.loggers.write({"step": trainer.state.step, **choice.metrics()})


def roll_back(trainer: Trainer) -> bool:
    """Return to the newest checkpoint after a loss spike and go on behind the data seen since.

    Returns:
        False where there is no checkpoint, or the run came back to it before: then the batch stays skipped.
    """
    trainer.saver.finish()
    found = newest_valid(Path(trainer.config.run.dir) / "checkpoints")
    if found is None or found[1].step == trainer.state.rolled_back_to:
        return False
    path = found[0]
    before = trainer.state
    trainer.state = TrainState.from_json(load(trainer.engine, path).train_state)
    trainer.state.samples_consumed = before.samples_consumed
    trainer.state.skipped_steps = before.skipped_steps
    trainer.state.rolled_back_to = trainer.state.step
    trainer.state.wandb_id = before.wandb_id
    trainer.plan = replace(trainer.plan, origin_step=trainer.state.step, origin_samples=trainer.state.samples_consumed)
    if trainer.loggers is not None:
        trainer.loggers.cut(trainer.state.step)
        trainer.loggers.write(
            {
                "step": trainer.state.step,
                "event": "rollback",
                "from_step": before.step,
                "samples_consumed": before.samples_consumed,
            }
        )
    return True


def save_checkpoint(trainer: Trainer) -> None:
    """Save the state, published whole."""
    state = trainer.state
    if trainer.batches is not None:
        state.data = trainer.batches.data_state()
    with trainer.timeline.span("checkpoint"):
        trainer.saver.save(
            step=state.step,
            samples_consumed=state.samples_consumed,
            config=trainer.config,
            train_state=state.to_json(),
        )
