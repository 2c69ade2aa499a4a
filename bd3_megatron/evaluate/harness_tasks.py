"""Tasks of EleutherAI's lm-evaluation-harness on a model's folder, from parsed options to printed lines.

Refuses: an absent harness, tasks that it does not know. Costs: one task's requests; the harness's own 14,000 task files
are read only for a task that no file of the user names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bd3_megatron.errors import ConfigError
from bd3_megatron.evaluate.tables import Column, render
from bd3_megatron.evaluate.tasks import device_of

TASK_COLUMNS = (
    Column("task", "task"),
    Column("num_fewshot", "shots"),
    Column("num_samples", "n"),
    Column("metric", "metric"),
    Column("value", "value", ".4f"),
    Column("stderr", "+-", ".4f"),
)
BOOTSTRAP_SAMPLES = 1000
"""Resamplings for the standard error of metrics that are no means."""


def evaluate_tasks(folder: str, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The harness's results: metrics by task, and its record of how they came about.

    Args:
        folder: exported model folder.
        names: of tasks, groups or tags.
        options: device, dtype, batch_size, seed, draws of the model and the convention asked for; include_path, num_fewshot
            and limit of the harness.

    Raises:
        ConfigError: the harness is not installed, or knows no such task.
        CheckpointError, TokenizerError, RangeError: see `HarnessModel`.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness, which is not installed; pip install 'bd3-megatron[eval]', or lm_eval."
        )
    # Optional and slow to import: only --tasks pays for it.
    from lm_eval import simple_evaluate

    from bd3_megatron.evaluate.harness import HarnessModel

    manager = _task_manager(names, options.include_path)
    model = HarnessModel(
        folder,
        device=str(device_of(options)),
        dtype=options.dtype,
        batch_size=options.batch_size,
        draws=options.draws,
        exact=options.exact,
        seed=options.seed,
        packing=options.packing,
        append_eos=options.append_eos,
        wrap_special=options.wrap_special,
        first_token_given=options.first_token_given,
        min_t=options.min_t,
    )
    # The harness's own loop: few-shot examples, filters and metrics are its definitions, not ours.
    found = simple_evaluate(
        model,
        tasks=list(names),
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        # Texts of every request: gigabytes with some tasks, and nothing of them is printed here.
        log_samples=False,
        bootstrap_iters=BOOTSTRAP_SAMPLES,
    )
    assert found is not None  # one process
    return dict(found)


def print_tasks(options: argparse.Namespace) -> int:
    """`--tasks`."""
    names = [name for part in options.tasks for name in part.split(",") if name]
    if not Path(options.folder).is_dir():
        raise ConfigError(f"{options.folder} is not a folder; give an exported model folder.")
    found = evaluate_tasks(options.folder, names, options)
    if options.format == "json":
        # What a reader needs to compare; the rest is the harness's book-keeping.
        kept = {name: found[name] for name in ("results", "n-shot", "n-samples", "config", "versions")}
        print(json.dumps(kept, indent=2, default=str))
        return 0
    print(render(TASK_COLUMNS, task_rows(found), options.format))
    told = found["config"]
    overridden = ", ".join(told["bd3_overridden"])
    whose = f"overridden: {overridden}" if overridden else "the model's own"
    print(f"scores: {told['bd3_likelihood']}; convention ({whose}): {told['bd3_convention']}")
    return 0


def task_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for every metric of every task, in the harness's order."""
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            # keys are "metric,filter"; what has no comma is no metric
            metric, comma, how = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{how}")
            rows.append(
                {
                    "task": task,
                    "num_fewshot": found["n-shot"].get(task),
                    "num_samples": found["n-samples"].get(task, {}).get("effective"),
                    "metric": metric if how == "none" else f"{metric} ({how})",
                    "value": value,
                    "stderr": error if isinstance(error, float) else None,
                }
            )
    return rows


def _task_manager(names: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks: the user's files, and its own where they are needed.

    Raises:
        ConfigError: a folder that is not there, or a name that nobody knows.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include-path {include_path} is not a folder; give the folder of the tasks' YAML files.")
    if include_path is not None:
        # The user's files first: the harness's own index means reading all of its task files.
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise ConfigError(
            f"--tasks: the harness knows no {', '.join(unknown)[:200] or 'task without a name'}; see `lm-eval ls tasks`, "
            "or give --include-path DIR with the task's YAML file."
        )
    return manager
