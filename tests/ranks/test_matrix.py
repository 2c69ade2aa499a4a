"""Every legal grid of {tp 1,2,4} x {sp} x {pp 1,2,4} x {vpp 2} x {cp 1,2,4} x {dp 1,2} x {zero 1,2,3} up to eight ranks, in
both layer styles, tied and untied, with and without packed documents, against the plain model.

Run by `tests/run.sh --matrix`; writes tools/bench/results/parity_matrix.md, one line a grid with the worst deviation over
its six models. Each grid's ranks are forked once and train all six."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import GridError
from bd3_megatron.parallel.topology import Topology
from tests import tolerances
from tests.ranks.harness import run_ranks
from tests.ranks.parity import BATCH, Outcome, job_config, join_ranks, plain_job, rank_job

RESULTS = Path(__file__).parents[2] / "tools" / "bench" / "results" / "parity_matrix.md"
MODELS: list[tuple[str, bool, bool]] = [
    (style, tied, documents)
    for style, tied in (("paper", False), ("modern", False), ("modern", True))
    for documents in (False, True)
]
"""(style, tied, packed documents)."""
HEADER = (
    "| tp | sp | pp | vpp | cp | dp | zero | loss, relative | gradient, relative | parameters after 5 steps | s |\n"
)


def grid_config(style: str, tied: bool, parallel: dict[str, Any]) -> Config:
    """Eight layers where four stages of two chunks need them; as many key heads as four ranks need; two micro-batches, or
    as many as there are stages."""
    layers = 8 if parallel["pp"] * (parallel["vpp"] or 1) > 4 else 4
    size = BATCH // parallel["dp"] // max(2, parallel["pp"])
    return job_config(
        style,
        tied=tied,
        layers=layers,
        kv_heads=4 if parallel["tp"] == 4 else 2,
        parallel=parallel,
        train={"micro_batch_size": size},
    )


def legal_grids() -> Iterator[dict[str, Any]]:
    """All grids of the axes that fit eight ranks and that the configuration alone does not refuse."""
    axes = itertools.product((1, 2, 4), (False, True), (1, 2, 4), (None, 2), (1, 2, 4), (1, 2), (1, 2, 3))
    for tp, sp, pp, vpp, cp, dp, zero in axes:
        if tp * pp * cp * dp > 8:
            continue
        parallel = {
            "tp": tp,
            "sequence_parallel": sp,
            "pp": pp,
            "vpp": vpp,
            "cp": cp,
            "dp": dp,
            "zero_stage": zero,
        }
        try:
            validate(grid_config("modern", False, parallel))
        except GridError:
            continue
        yield parallel


@functools.cache
def plain(style: str, tied: bool, documents: bool, layers: int, kv_heads: int) -> Outcome:
    return plain_job(job_config(style, tied=tied, layers=layers, kv_heads=kv_heads), documents=documents)


def deviations(config: Config, found: Outcome, documents: bool) -> tuple[float, float, float]:
    """Worst relative loss, worst gradient relative to its tensor's largest, worst parameter."""
    model = config.model
    expected = plain(model.style, model.tie_embeddings, documents, model.num_layers, model.kv_heads)
    loss = max(abs(a - b) / b for a, b in zip(found.losses[:1], expected.losses[:1], strict=True))
    grad = max(
        (
            float((g - expected.first_grads[n]).abs().max() / expected.first_grads[n].abs().max())
            for n, g in found.first_grads.items()
        ),
        default=0.0,
    )
    parameters = max(float((p - expected.parameters[n]).abs().max()) for n, p in found.parameters.items())
    return loss, grad, parameters


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("parallel", list(legal_grids()), ids=lambda p: "-".join(f"{k}{v}" for k, v in p.items()))
def test_a_grid_equals_the_plain_model_in_every_model(parallel: dict[str, Any]) -> None:
    configs = [(grid_config(style, tied, parallel), documents) for style, tied, documents in MODELS]

    def all_models(topology: Topology) -> list[dict[str, Any]]:
        return [rank_job(config, documents=documents)(topology) for config, documents in configs]

    start = time.monotonic()
    by_rank = run_ranks(all_models, configs[0][0].parallel, timeout=800)
    seconds = time.monotonic() - start
    worst = [0.0, 0.0, 0.0]
    for number, (config, documents) in enumerate(configs):
        outcome = join_ranks(config, [results[number] for results in by_rank])
        worst = [max(pair) for pair in zip(worst, deviations(config, outcome, documents), strict=True)]
    _note(parallel, worst, seconds)
    assert worst[0] <= tolerances.GRID_LOSS
    assert worst[1] <= tolerances.GRID_GRADIENT
    assert worst[2] <= tolerances.GRID_PARAMETERS


def _note(parallel: dict[str, Any], worst: list[float], seconds: float) -> None:
    """One line of the table; an earlier line of the same grid is replaced."""
    key = "| " + " | ".join(str(parallel[axis] or "-") for axis in parallel_order()) + " |"
    line = f"{key} {worst[0]:.1e} | {worst[1]:.1e} | {worst[2]:.1e} | {seconds:.0f} |\n"
    lines = RESULTS.read_text("utf-8").splitlines(keepends=True) if RESULTS.exists() else _title()
    kept = [old for old in lines if not old.startswith(key)]
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text("".join([*kept, line]), "utf-8")
    temporary.replace(RESULTS)


def parallel_order() -> tuple[str, ...]:
    return ("tp", "sequence_parallel", "pp", "vpp", "cp", "dp", "zero_stage")


def _title() -> list[str]:
    return [
        "# Parity of every legal grid with the plain model\n\n",
        "    bash tests/run.sh --matrix -k every_model\n\n",
        "fp32, CPU, gloo, against the plain model in fp64; worst over both layer styles, tied and untied, with and without\n",
        "packed documents. Bounds: loss ",
        f"{tolerances.GRID_LOSS}, gradient {tolerances.GRID_GRADIENT}, parameters {tolerances.GRID_PARAMETERS}. ",
        "ZeRO 2 and 3 cut gradients as they appear: there the\nparameters stand for them.\n\n",
        HEADER,
        "|" + "---|" * 11 + "\n",
    ]
