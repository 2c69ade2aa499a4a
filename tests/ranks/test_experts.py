"""Mixtures of experts on every grid equal the plain model: loss, every gradient, norms, parameters and averages after clipped
AdamW steps, through the trainer's own step. A covering subset here; `tests/run.sh --matrix` walks the rest."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from bd3_megatron.attention.select import named
from bd3_megatron.config.schema import Config
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.metrics import begin_loads
from tests import tolerances
from tests.ranks.harness import run_ranks
from tests.ranks.parity import (
    MASK_ID,
    VOCAB,
    Outcome,
    RandomRows,
    clean_batch,
    job_config,
    join_ranks,
    make_batch,
    plain_job,
    rank_job,
)
from tests.ranks.test_parity import compare

SP = {"tp": 2, "sequence_parallel": True}
SOFTMAX = {"number": 4, "top_k": 2, "width": 24, "shared_width": 16, "leading_dense_layers": 1}
SIGMOID = {
    **SOFTMAX,
    "number": 8,
    "score": "sigmoid",
    "bias": True,
    "bias_rate": 0.01,
    "scaling_factor": 2.5,
    "groups": 4,
    "group_top_k": 2,
}
KINDS: dict[str, dict[str, Any]] = {"softmax": SOFTMAX, "sigmoid": SIGMOID}

COVERING: list[tuple[str, dict[str, Any]]] = [
    ("softmax", {}),
    ("sigmoid", {"ep": 2, "dp": 2}),
    ("softmax", {"ep": 2, "dp": 4}),
    ("sigmoid", {"ep": 4, **SP, "dp": 2}),
    ("softmax", {"ep": 1, **SP}),
    ("softmax", {"ep": 2, **SP, "cp": 2, "pp": 2}),
]


SEEDS = {"softmax": 1, "sigmoid": 2}
"""Initial weights with which no row's choice is as close to a tie as rounding: `tolerances.SMALLEST_CHOICE_GAP`."""


def experts_config(kind: str, parallel: dict[str, Any], **sections: Any) -> Config:
    sections["run"] = {"seed": SEEDS[kind], **sections.get("run", {})}
    model = {"experts": KINDS[kind], "rotary_fraction": 0.5, **sections.pop("model", {})}
    # untied and shallow: q and k norms turn the rounding of a router's gradient into steps of Adam
    return job_config("modern", layers=3, parallel=parallel, model=model, **sections)


@functools.cache
def plain(kind: str) -> Outcome:
    return plain_job(experts_config(kind, {}))


def check(config: Config, expected: Outcome, *, documents: bool = False, rows: RandomRows | None = None) -> None:
    """Everything that dense models are compared by; counts equal, and so biases."""
    job = rank_job(config, documents=documents, rows=rows, steps=len(expected.losses))
    found = join_ranks(config, run_ranks(job, config.parallel))
    print(f"smallest gap between chosen and left-out experts: {expected.smallest_gap:.1e}")
    # at a tie two grids may choose otherwise and both be right
    assert expected.smallest_gap >= tolerances.SMALLEST_CHOICE_GAP
    compare(found, expected)
    assert found.loads == expected.loads
    assert found.masked_loads == expected.masked_loads
    # none without their factors
    for here, there in zip(found.terms, expected.terms, strict=bool(expected.terms)):
        for layer, terms in there.items():
            assert here[layer] == pytest.approx(terms, rel=tolerances.GRID_LOSSES_LATER)
    assert set(found.biases) == set(expected.biases)
    assert all(torch.equal(found.biases[name], bias) for name, bias in expected.biases.items())


@pytest.mark.parametrize(("kind", "parallel"), COVERING, ids=str)
def test_experts_on_every_grid_equal_the_plain_model(kind: str, parallel: dict[str, Any]) -> None:
    config = experts_config(kind, parallel)
    check(config, plain(kind))


SWITCHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"ep": 4, **SP, "dp": 2}, {"train": {"recompute": "full"}}),
    ({"ep": 2, "dp": 2}, {"train": {"recompute": "selective", "micro_batch_size": 2}}),
    ({"ep": 2, **SP}, {"train": {"skip_dead_rows": False}}),
    ({"ep": 2, "dp": 2, "pp": 2}, {"train": {"skip_dead_rows": False, "recompute": "full"}}),
    ({"ep": 2, "cp": 2}, {"train": {"recompute": "full", "recompute_layers": 1}}),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("parallel", "sections"), SWITCHED, ids=str)
def test_recomputation_and_skipping_change_neither_weights_nor_counts(
    parallel: dict[str, Any], sections: dict[str, Any]
) -> None:
    check(experts_config("sigmoid", parallel, **sections), plain("sigmoid"))


@pytest.mark.matrix
def test_documents_with_experts_equal_the_plain_model() -> None:
    config = experts_config("softmax", {"ep": 4, **SP, "cp": 2})
    expected = plain_job(experts_config("softmax", {}), documents=True)
    check(config, expected, documents=True)


def test_rows_of_padding_are_in_no_count() -> None:
    rows, data = RandomRows(padded=True), {"packing": "pad"}
    expected = plain_job(experts_config("sigmoid", {}, data=data), rows=rows, steps=2)
    whole = [sum(load) for load in plain("sigmoid").loads[0].values()]
    # padded samples have fewer rows, in the last layer too
    assert all(sum(load) < n for load, n in zip(expected.loads[0].values(), whole, strict=True))
    check(experts_config("sigmoid", {"ep": 2, **SP}, data=data), expected, rows=rows)


TERMS = {"balance_loss": 1.0, "z_loss": 0.1}
"""Large, so that they show in every gradient of a router."""


@pytest.mark.parametrize(
    ("kind", "parallel", "train"),
    [("softmax", {"ep": 2, **SP, "cp": 2}, {}), ("sigmoid", {"ep": 2, "dp": 2, "pp": 2}, {"recompute": "full"})],
    ids=["softmax", "sigmoid"],
)
def test_terms_of_the_router_equal_the_plain_model(kind: str, parallel: dict[str, Any], train: dict[str, Any]) -> None:
    model = {"experts": {**KINDS[kind], **TERMS}}
    expected = plain_job(experts_config(kind, {}, model=model), steps=2)
    # without them the router learns otherwise
    router = "model.layers.1.mlp.gate.weight"
    apart = (expected.first_grads[router] - plain(kind).first_grads[router]).abs().max()
    assert apart > 100 * tolerances.GRID_GRADIENT * expected.first_grads[router].abs().max()
    check(experts_config(kind, parallel, model=model, train=train), expected)


PHASES = [{"block_size": 8, "steps": 2}, {"block_size": 4, "axes": {"row_weight": "cart", "positions": "exact"}}]
PAIRED = {"views": 2, "axes": {"pairing": "complementary", "denominator": "loss_rows"}}
OBJECTIVES: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({"ep": 2, **SP}, PAIRED, 6),
    ({"ep": 2, "dp": 2, "pp": 2}, {"phases": PHASES}, 3),
]
"""(grid, objective, seed without near ties)."""


@pytest.mark.parametrize(("parallel", "diffusion", "seed"), OBJECTIVES, ids=["views", "phases"])
def test_views_and_phases_with_experts_equal_the_plain_model(
    parallel: dict[str, Any], diffusion: dict[str, Any], seed: int
) -> None:
    sections = {"diffusion": diffusion, "run": {"seed": seed}}
    # the phases meet between the second step and the third
    expected = plain_job(experts_config("softmax", {}, **sections), documents=True, steps=3)
    check(experts_config("softmax", parallel, **sections), expected, documents=True)


def test_experts_train_in_bf16_beside_an_fp32_bias() -> None:
    config = experts_config("sigmoid", {"ep": 2, "dp": 2})
    results = run_ranks(rank_job(config, steps=2, dtype=torch.bfloat16), config.parallel)
    found = join_ranks(config, results)
    # the first step starts from the same weights, rounded
    assert found.losses[0] == pytest.approx(plain("sigmoid").losses[0], rel=tolerances.FAST_PATH_BF16)
    assert found.norms[0] == pytest.approx(plain("sigmoid").norms[0], rel=tolerances.FAST_PATH_BF16)
    assert found.losses[1] == pytest.approx(plain("sigmoid").losses[1], rel=tolerances.FAST_PATH_BF16)
    # which rows are counted does not depend on the dtype, and neither do steps of the bias
    assert [sum(load) for load in found.loads[1].values()] == [sum(load) for load in plain("sigmoid").loads[1].values()]
    rate = SIGMOID["bias_rate"]
    for bias_E in found.biases.values():
        assert bias_E.dtype == torch.float32 and bias_E.abs().max() in (torch.tensor(rate), torch.tensor(2 * rate))


def test_a_bias_stays_where_the_update_was_left_out() -> None:
    config = experts_config("sigmoid", {"ep": 2, "dp": 2})

    def on_rank(topology: Topology) -> list[bool]:
        vocabulary = vocabulary_of(config, size=VOCAB, mask_id=MASK_ID)
        model = ParallelModel(config, vocabulary, topology, backends={4: named("dense")}, dtype=torch.float32)
        engine = ZeroEngine(model, config, num_micro_batches=1, dtype=torch.float32)
        batch = make_batch(config, clean_batch(torch.arange(2) + 2 * topology.dp_rank, documents=False), model.layout)
        moved = []
        for scale, veto in ((1e-3, None), (float("inf"), None), (1e-3, lambda _: True), (1e-3, None)):
            before = [bias_E.clone() for _, bias_E in model.root.named_biases()]
            loads = engine.train_step([batch], loss_scale=scale, lr=1e-3, veto=veto).loads
            # loads are recorded all the same
            assert begin_loads(loads, topology, config.model).metrics()["experts/load_entropy_layer_01"] > 0
            pairs = zip(before, model.root.named_biases(), strict=True)
            moved.append(any(not torch.equal(old_E, bias_E) for old_E, (_, bias_E) in pairs))
        return moved

    assert run_ranks(on_rank, config.parallel) == [[True, False, False, True]] * 2
