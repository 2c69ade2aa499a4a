"""A step's batch is a function of (seed, samples consumed): however it is cut, resumed or counted."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.config.objective import objective_of
from bd3_megatron.config.schema import Config
from bd3_megatron.data.sampler import BatchShare
from bd3_megatron.diffusion.axes import BD3_LM, ObjectiveAxes
from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.diffusion.objective import NextToken
from bd3_megatron.errors import DataError
from bd3_megatron.model.attention_context import layout_function
from bd3_megatron.parallel.pair_split import PairLayout, pair_layout
from bd3_megatron.train.batches import Noise, StepBatch, StepBatches, make_micro_batch
from bd3_megatron.train.dataset import isolation_remark
from bd3_megatron.train.plan import RunPlan
from tests.unit.cost.cases import case
from tests.unit.parallel.places import place
from tests.unit.train.samples import LENGTH, WORDS, Samples, SourceRows, rows_by_place

MASK_ID = WORDS
SPLITS = [(dp, size) for dp in (1, 2, 4, 8) for size in (1, 2, 4, 8) if 8 % (dp * size) == 0]
"""(data-parallel ranks, micro-batch size) of a global batch of 8; what is left is gradient accumulation."""


def layout_of(config: Config, block_size: int) -> PairLayout:
    return pair_layout(objective_of(config, block_size=block_size), length=LENGTH)


def held(config: Config, source: Samples, *, dp: int = 1, first: int = 0, steps: int = 3, block_size: int = 4) -> Any:
    """Everything the data-parallel ranks hold over some steps, by sample and place, and (tokens, masked) a step."""
    plan, layout = RunPlan(config), layout_of(config, block_size)
    tokens: dict[Any, Any] = {}
    noise: dict[Any, Any] = {}
    counts = {step: [0, 0] for step in range(first, first + steps)}
    for dp_rank in range(dp):
        topology = place(dp=dp, dp_rank=dp_rank)
        batches = StepBatches(SourceRows(source), plan, topology, first_step=first, mask_id=MASK_ID, num_workers=0)
        for step in counts:
            batch = batches.next(step, layout, Interval(0.2, 0.9))
            share = BatchShare(
                global_batch_size=plan.batch_size(step),
                micro_batch_size=config.train.micro_batch_size,
                dp=dp,
                dp_rank=dp_rank,
            )
            for micro, index_B in zip(batch.micro_batches, share.step(plan.samples_before(step)), strict=True):
                found = rows_by_place(micro, index_B, layout)
                assert not found[0].keys() & tokens.keys(), "a sample was given to two ranks"
                tokens |= found[0]
                noise |= found[1]
            counts[step][0] += batch.token_count
            counts[step][1] += batch.masked_count
    return tokens, noise, counts


@pytest.mark.parametrize(
    "diffusion", [{}, {"resample": True}, {"noise_schedule": "cosine"}, {"objective": "ar"}], ids=str
)
def test_a_sample_is_the_same_for_every_split(diffusion: dict[str, Any]) -> None:
    block_size = 1 if "objective" in diffusion else 4
    expected = held(case(diffusion={"block_size": 4, **diffusion}), Samples(), block_size=block_size)
    assert {key[0] for key in expected[0]} == set(range(24))
    for dp, size in SPLITS:
        config = case(diffusion={"block_size": 4, **diffusion}, train={"micro_batch_size": size})
        assert held(config, Samples(), dp=dp, block_size=block_size) == expected


def test_a_phase_has_one_layout_however_its_axes_are_named() -> None:
    """Backends keep tables with a layout: two of one phase would make them twice."""
    config = case(diffusion={"axes": {"row_weight": "flat"}})
    layout_at = layout_function(
        objective_of(config), length=LENGTH, parallel=config.parallel, cp_rank=0, skip_dead_rows=True
    )
    assert layout_at(4, 1, None) is layout_at(4, 1, ObjectiveAxes(row_weight="flat"))
    assert layout_at(4, 1, None).objective.axes.row_weight == "flat"
    assert layout_at(4, 1, BD3_LM) is not layout_at(4, 1, None)


def test_loader_processes_change_nothing() -> None:
    config, layout = case(), layout_of(case(), 4)
    made = []
    for workers in (0, 2):
        batches = StepBatches(
            SourceRows(Samples()), RunPlan(config), place(), first_step=1, mask_id=MASK_ID, num_workers=workers
        )
        batch = batches.next(1, layout, Interval())
        made.append([rows_by_place(micro, torch.tensor([n]), layout) for n, micro in enumerate(batch.micro_batches)])
    assert made[0] == made[1]


def everything(batch: StepBatch) -> Any:
    """All that is in a step's micro-batches."""
    tensors = [
        {name: value.tolist() for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
        for one in batch.micro_batches
    ]
    documents = [one.visibility.document_layouts for one in batch.micro_batches]
    return tensors, documents, batch.token_count, batch.masked_count


@pytest.mark.parametrize(("dp", "size"), SPLITS)
def test_a_step_drawn_ahead_is_the_step(dp: int, size: int) -> None:
    """Bit for bit, by a thread of its own, and anew where a search or a new phase proved the assumption wrong."""
    config = case(train={"micro_batch_size": size})
    plan, layouts = RunPlan(config), [layout_of(config, 4), layout_of(config, 8)]
    drawers: list[str] = []

    def remember(visibility: Visibility, device: torch.device) -> None:
        drawers.append(threading.current_thread().name)

    def steps(*, assumed: list[tuple[int, float]] | None) -> list[Any]:
        topology = place(dp=dp, dp_rank=dp - 1)
        batches = StepBatches(
            SourceRows(Samples()), plan, topology, first_step=0, mask_id=MASK_ID, num_workers=0, prepare=remember
        )
        found = []
        for step, (layout, beta) in enumerate([(0, 0.2), (0, 0.2), (1, 0.2), (1, 0.4)]):
            if assumed is not None and step:
                batches.draw_ahead(step, layouts[assumed[step][0]], Interval(assumed[step][1], 0.9))
            found.append(everything(batches.next(step, layouts[layout], Interval(beta, 0.9))))
        return found

    assert steps(assumed=[(0, 0.2), (0, 0.2), (0, 0.2), (1, 0.2)]) == steps(assumed=None)
    own = threading.current_thread().name
    micro = 8 // (dp * size)
    # step 1 was assumed rightly; steps 2 and 3 were drawn a second time, here
    expected = [own, "next step", "next step", own, "next step", own, *[own] * 4]
    assert drawers == [name for name in expected for _ in range(micro)]


@pytest.mark.parametrize(
    ("data", "diffusion", "is_said"),
    [
        ({"packing": "isolated"}, {"block_size": LENGTH}, True),
        ({"packing": "isolated"}, {"phases": [{"block_size": LENGTH, "steps": 1}, {"block_size": 4}]}, True),
        ({"packing": "isolated"}, {"block_size": 4}, False),
        ({"packing": "isolated"}, {"objective": "ar"}, False),
        ({"packing": "wrap"}, {"block_size": LENGTH}, False),
    ],
    ids=str,
)
def test_what_a_block_of_the_whole_row_does_to_documents_is_said(
    data: dict[str, Any], diffusion: dict[str, Any], is_said: bool
) -> None:
    said = isolation_remark(case(data={"seq_len": LENGTH, **data}, diffusion=diffusion))
    assert (said is not None) == is_said
    assert said is None or f"block_size=seq_len={LENGTH}: a document begins" in said


def test_what_goes_wrong_ahead_is_told_where_the_batch_is_asked_for() -> None:
    class Broken(Samples):
        def batch_for(self, index_B: torch.Tensor) -> Any:
            if int(index_B[0]) >= 8:
                raise DataError("row 8 cannot be read")
            return super().batch_for(index_B)

    config = case()
    batches = StepBatches(SourceRows(Broken()), RunPlan(config), place(), first_step=0, mask_id=MASK_ID, num_workers=0)
    batches.next(0, layout_of(config, 4), Interval())
    batches.draw_ahead(1, layout_of(config, 4), Interval())
    with pytest.raises(DataError, match="row 8 cannot be read"):
        batches.next(1, layout_of(config, 4), Interval())


def test_a_resumed_run_goes_on_with_the_same_batches() -> None:
    config = case(train={"warmup_batch_size": 2, "batch_warmup_steps": 4, "global_batch_size": 8})
    tokens, noise, counts = held(config, Samples(), steps=7)
    for first in (1, 3, 4):
        later = held(config, Samples(), first=first, steps=7 - first)
        assert later[0].items() <= tokens.items() and later[1].items() <= noise.items()
        assert later[2] == {step: counts[step] for step in range(first, 7)}
    assert {key[0] for key in tokens} == set(range(RunPlan(config).samples_before(7)))


def test_a_row_that_comes_again_is_masked_otherwise() -> None:
    config = case(train={"global_batch_size": 8})
    tokens, _, _ = held(config, Samples(num_rows=8), steps=2)
    clean = [{k[2]: v for k, v in tokens.items() if k[:2] == (sample, "clean")} for sample in (3, 11)]
    noisy = [{k[2]: v for k, v in tokens.items() if k[:2] == (sample, "noisy")} for sample in (3, 11)]
    assert clean[0] == clean[1] and noisy[0] != noisy[1]


def noise_of(block_size: int = 4) -> Noise:
    return Noise(seed=1, mask_id=MASK_ID, group_size=8, block_size=block_size, interval=Interval())


def noisy_of(source: Samples, config: Config) -> NoisyBatch:
    return noise_of().corrupt(source.batch_for(torch.arange(8)), config.diffusion)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "diffusion", [{}, {"never_mask_first": True}, {"never_mask_first": True, "axes": {"denominator": "all"}}], ids=str
)
def test_counts_are_those_of_the_objective(padded: bool, diffusion: dict[str, Any]) -> None:
    config, source = case(diffusion=diffusion), Samples(padded=padded)
    made = make_micro_batch(source.batch_for(torch.arange(8)), noise_of(), config.diffusion, layout_of(config, 4))
    text = 8 * LENGTH - sum(row % 9 for row in range(8)) * padded
    # the first token is text, and counts where all tokens do
    exempt = 8 if config.diffusion.never_mask_first and config.diffusion.axes.denominator != "all" else 0
    assert made.token_count == text - exempt
    assert made.masked_count == noisy_of(source, config).is_masked_BL.sum()


def test_every_view_has_noise_of_its_own_and_the_first_that_of_a_run_without_views() -> None:
    config, clean = case(diffusion={"views": 3}), Samples().batch_for(torch.arange(8))
    layout = layout_of(config, 4)
    pair = make_micro_batch(clean, noise_of(), config.diffusion, layout).pair
    copies = pair.token_BP[:, : layout.num_noisy].unflatten(1, (3, LENGTH)).unbind(1)
    assert torch.equal(copies[0], noisy_of(Samples(), config).noisy_BL)
    masked = [copy == MASK_ID for copy in copies]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        # 256 positions at levels over (0, 1): independent masks agree on about two thirds, equal ones on all
        assert (masked[a] == masked[b]).float().mean() < 0.9


def test_rows_with_loss_are_the_masked_ones() -> None:
    config = case()
    layout = layout_of(config, 4)
    clean = Samples().batch_for(torch.arange(8))
    batch = make_micro_batch(clean, noise_of(), config.diffusion, layout).pair
    noisy = noisy_of(Samples(), config)
    _, found = rows_by_place(batch, torch.arange(8), layout)
    assert found.keys() == {tuple(place) for place in noisy.is_masked_BL.nonzero().tolist()}
    for (sample, position), (target, weight, level, block) in found.items():
        assert target == clean.tokens_BL[sample, position] and block == position // 4
        assert weight == noisy.weight_BL[sample, position] > 0
        assert level == noisy.t_BK[sample, position // 4].float()


def test_the_ar_baseline_counts_its_predictions() -> None:
    config = case(kind="ar")
    clean = Samples(padded=True).batch_for(torch.arange(8))
    made = make_micro_batch(clean, noise_of(1), config.diffusion, layout_of(config, 1))
    (rows,) = NextToken().loss_rows(clean.tokens_BL, [], is_scored_BL=clean.scored_BL)
    assert made.token_count == made.masked_count == rows.has_loss_BL.sum() == len(made.pair.loss_row_R)
    _, found = rows_by_place(made.pair, torch.arange(8), layout_of(config, 1))
    assert all(found[tuple(p)][0] == rows.target_BL[tuple(p)] for p in rows.has_loss_BL.nonzero().tolist())
