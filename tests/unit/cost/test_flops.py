"""FLOPs in closed form equal those of real forward and backward passes; the conventions equal the published ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bd3_megatron.attention import structured
from bd3_megatron.attention.streams import Stream
from bd3_megatron.attention.visibility import Visibility, sees
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.plain_config import plain_config
from bd3_megatron.cost.flops import (
    Execution,
    RowsKind,
    convention_flops,
    executed_flops,
    execution_of,
    min_flops,
    row_flops,
)
from bd3_megatron.cost.pairs import attended_pairs, executed_pairs
from bd3_megatron.cost.shape import expected_masked_fraction, shape_of
from bd3_megatron.cost.step import step_flops
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.plain_bd3 import PlainBD3, run_layers
from tests.unit.cost.cases import KINDS, MIXTURES, STYLES, case, gpt2_small

RELATIVE = 1e-3


def _plain_shape(config: Config) -> BD3Config:
    """The plain model's view of a configuration."""
    shape = shape_of(config)
    return plain_config(
        config.model,
        vocab_size=shape.vocab,
        seq_len=shape.length,
        block_size=shape.block,
        mask_id=59,
        objective=config.diffusion.objective,
    )


def _cpu_forward(q: Any, k: Any, v: Any, dropout: Any = 0, causal: bool = False, *_: Any, **__: Any) -> float:
    # a causal rectangle is a square here: only its lower triangle is needed
    pairs = q[2] * (q[2] + 1) // 2 if causal else q[2] * k[2]
    return 4 * q[0] * q[1] * pairs * q[3]


def _cpu_backward(
    g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, p: Any = 0, causal: bool = False, **_: Any
) -> float:
    return 2 * _cpu_forward(q, k, v, p, causal)


def _counted(run: Callable[[], Tensor]) -> tuple[float, float]:
    """(matrix FLOPs, attention FLOPs) of a forward and its backward, counted by the dispatcher."""
    ops = torch.ops.aten
    attention = {
        ops._scaled_dot_product_flash_attention_for_cpu: _cpu_forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        run().sum().backward()
    by_op = counter.get_flop_counts()["Global"]
    inside = sum(count for op, count in by_op.items() if "scaled_dot_product" in str(op))
    return counter.get_total_flops() - inside, inside


def _ids(config: Config, batch: int = 2) -> Tensor:
    return torch.randint(0, 60, (batch, config.data.seq_len), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("style", [*STYLES, *MIXTURES])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_model_runs_what_is_counted(style: str, kind: str) -> None:
    config = case(style=style, kind=kind)
    model, ids = PlainBD3(_plain_shape(config)), _ids(config)
    context = None if kind == "ar" else ids
    matrices, attention = _counted(lambda: model(ids, context))
    # all rows of all layers, a dense mask, logits of the noisy half over the unpadded vocabulary
    execution = Execution(backend="dense", head_rows="noisy", attention_backward=2.0, padded=False)
    closed = executed_flops(config, execution, 0.5)
    assert attention == pytest.approx(2 * closed.part("attention"), rel=RELATIVE)
    assert matrices == pytest.approx(2 * (closed.total - closed.part("attention")), rel=RELATIVE)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", [None, [16, 12, 4]])
def test_a_forward_without_dead_work_runs_min(style: str, kind: str, documents: list[int] | None) -> None:
    config = case(style=style, kind=kind)
    pairs = attended_pairs(32, shape_of(config).block, documents)
    run = _MinimalPass(config, documents or [32])
    matrices, _ = _counted(run)
    closed = min_flops(config, run.masked_fraction, pairs=pairs)
    # the counter sees no pair here: the pass counts the pairs its mask lets through
    assert run.attended_flops == pytest.approx(closed.part("attention"), rel=RELATIVE)
    assert matrices == pytest.approx(closed.total - closed.part("attention"), rel=RELATIVE)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("views", [2, 3])
def test_several_views_share_one_clean_pass(style: str, views: int) -> None:
    config = case(style=style, diffusion={"block_size": 4, "views": views})
    run = _MinimalPass(config, [32])
    matrices, _ = _counted(run)
    closed = min_flops(config, run.masked_fraction)
    assert run.attended_flops == pytest.approx(closed.part("attention"), rel=RELATIVE)
    assert matrices == pytest.approx(closed.total - closed.part("attention"), rel=RELATIVE)


class _MinimalPass:
    """The plain model on the rows that matter: no dead clean row, in the last layer masked noisy rows only."""

    def __init__(self, config: Config, documents: list[int]) -> None:
        self.config, self.shape = config, shape_of(config)
        self.model = PlainBD3(_plain_shape(config))
        length, block = self.shape.length, self.shape.block
        document_L = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
        ends = torch.tensor(documents).cumsum(0)[document_L] - 1
        alive_L = torch.arange(length) // block != ends // block
        noisy = torch.arange(length).repeat(0 if not self.shape.noisy_rows else self.shape.views)
        clean = torch.arange(length)[alive_L] if self.shape.clean_rows else torch.arange(0)
        self.position_R = torch.cat([noisy, clean])
        is_noisy_R = torch.arange(len(self.position_R)) < len(noisy)
        if not self.shape.noisy_rows:
            self.keep_Q = torch.arange(len(clean))
        else:
            drawn = torch.rand(len(noisy), generator=torch.Generator().manual_seed(3))
            self.keep_Q = torch.arange(len(noisy))[drawn < 0.5]
        self.masked_fraction = len(self.keep_Q) / max(len(noisy), 1)
        document_R, block_R = document_L[self.position_R], self.position_R // block
        self.sees_RR = sees(
            q_is_noisy=is_noisy_R[:, None],
            q_block=block_R[:, None],
            k_is_noisy=is_noisy_R[None, :],
            k_block=block_R[None, :],
            q_document=document_R[:, None],
            k_document=document_R[None, :],
        )
        # rows of one view never see rows of another; the clean stream is view 0 to everyone
        view_R = torch.cat([torch.arange(len(noisy)) // length, torch.zeros(len(clean), dtype=torch.long)])
        self.sees_RR &= (view_R[:, None] == view_R[None, :]) | ~is_noisy_R[None, :]
        self.attended_flops = 0.0

    def __call__(self) -> Tensor:
        last = self.shape.layers - 1

        # dense over all rows; only what the mask lets through is counted as pairs
        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            seen = self.sees_RR[self.keep_Q] if layer == last else self.sees_RR
            self.attended_flops += 3 * 4 * self.shape.q_width * _exact_pairs(self, seen, layer == last)
            share = self.shape.heads // self.shape.kv_heads
            k, v = (x.repeat_interleave(share, dim=2).transpose(1, 2) for x in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen)
            return out.transpose(1, 2)

        ids = _ids(self.config, batch=1)[:, self.position_R]
        keep = self.keep_Q[None]
        hidden = run_layers(self.model.model, ids, self.position_R[None], attend, keep_BQ=keep)
        return self.model.lm_head(hidden)


def _exact_pairs(run: _MinimalPass, seen: Tensor, is_last: bool) -> float:
    """Pairs of the mask; for the last layer's random choice of rows the mean over choices of as many rows."""
    if not is_last or not run.shape.noisy_rows:
        return float(seen.sum())
    noisy = run.sees_RR[: run.shape.noisy_rows]
    return float(noisy.sum()) * run.masked_fraction


@pytest.mark.parametrize("kind", ["s4", "s16", "mdlm", "ar"])
def test_structured_attention_runs_what_is_counted(kind: str) -> None:
    config = case(kind=kind)
    shape = shape_of(config)
    length = shape.length

    def stream() -> Stream:
        q = torch.ones(1, length, shape.heads, shape.head_width, requires_grad=True)
        k, v = (torch.ones(1, length, shape.kv_heads, shape.head_width, requires_grad=True) for _ in range(2))
        return Stream(q, k, v)

    def run() -> Tensor:
        if kind == "ar":
            out = structured.attend(None, stream(), Visibility.clean_only(length, 1), scale=1.0)
        elif kind == "mdlm":
            out = structured.attend(stream(), None, Visibility.noisy_only(length), scale=1.0)
        else:
            out = structured.attend(stream(), stream(), Visibility.pair(length, shape.block), scale=1.0)
        return torch.stack([o for o in out if o is not None])

    _, attention = _counted(run)
    closed = executed_flops(config, Execution(attention_backward=2.0), 0.5)
    assert attention * shape.layers == pytest.approx(closed.part("attention"), rel=RELATIVE)


def test_a_causal_run_agrees_with_megatrons_published_formula() -> None:
    """Narayanan et al. 2021 (arXiv 2104.04473) eq. 3, without recomputation: 72 B s l h^2 (1 + s/(6h) + V/(12 l h)).

    It counts 12 B s^2 h l for attention, the full square. Megatron-LM's num_floating_point_operations halves that for
    causal masks (s^2 / 2 pairs); the visibility rule allows s (s + 1) / 2, one part in s more.
    """
    config = gpt2_small({"objective": "ar"})
    layers, hidden, length, vocab = 12, 768, 1024, 50258
    full = 72 * length * layers * hidden**2 * (1 + length / (6 * hidden) + vocab / (12 * layers * hidden))
    causal = full - 6 * length**2 * hidden * layers
    ours = convention_flops(config)
    assert ours.total - 6 * length * hidden * layers == pytest.approx(causal, rel=1e-12)
    assert ours.total == pytest.approx(causal, rel=RELATIVE)


@pytest.mark.parametrize("views", [1, 2, 4])
def test_the_convention_is_its_formula(views: int) -> None:
    config = case(kind="s4", diffusion={"block_size": 4, "views": views})
    n, length, block, width = 3, 32, 4, 32
    lin = 2 * 32 * (32 + 32) + 2 * 32 * 2 * 2 * 8 + 6 * 32 * 48
    pairs = (views + 1) * length * (length + block) / 2
    forward = n * (views + 1) * length * lin + n * pairs * 4 * width + views * length * 2 * 32 * 60
    assert convention_flops(config).total == 3 * forward


@pytest.mark.parametrize("views", [1, 3])
def test_min_is_its_formula(views: int) -> None:
    config = case(kind="s4", diffusion={"block_size": 4, "views": views})
    n, length, block, mu = 3, 32, 4, 0.4
    kv = 2 * 32 * 2 * 2 * 8
    lin = 2 * 32 * (32 + 32) + kv + 6 * 32 * 48
    rows = (views + 1) * length - block
    live = (views + 1) * length * (length + block) / 2 - block * length
    masked = mu * views * length
    forward = (n - 1) * rows * lin + rows * kv + masked * (lin - kv)
    forward += 4 * 32 * ((n - 1) * live + mu * views * length * (length + block) / 2) + masked * 2 * 32 * 60
    assert min_flops(config, mu).total == pytest.approx(3 * forward, rel=1e-12)


def test_masked_diffusion_is_one_stream() -> None:
    config = case(kind="mdlm")
    lin = 2 * 32 * (32 + 32) + 2 * 32 * 2 * 2 * 8 + 6 * 32 * 48
    assert convention_flops(config).total == 3 * (3 * 32 * lin + 3 * 32 * 32 * 4 * 32 + 32 * 2 * 32 * 60)


@pytest.mark.parametrize(
    ("length", "naive", "convention", "minimum"),
    [(1024, 1.98, 1.40, 1.21), (2048, 4.89, 3.03, 2.64), (8192, 41.8, 17.7, 15.8)],
)
def test_the_paper_shape_costs_what_the_design_notes_derive(
    length: int, naive: float, convention: float, minimum: float
) -> None:
    config = gpt2_small(data={"seq_len": length})
    # what most code runs: a dense mask, all rows in all layers, logits of all rows
    usual = Execution(backend="dense", head_rows="all", attention_backward=2.0, padded=False)
    assert round(executed_flops(config, usual, 0.5).total / 1e12, 3) == pytest.approx(naive, abs=0.05)
    assert convention_flops(config).total / 1e12 == pytest.approx(convention, abs=0.05)
    assert min_flops(config, 0.5).total / 1e12 == pytest.approx(minimum, abs=0.05)


def test_what_runs_is_at_least_what_is_needed() -> None:
    for kind in KINDS:
        config = case(kind=kind)
        mu = expected_masked_fraction(config)
        assert executed_flops(config, execution_of(config), mu).total >= min_flops(config, mu).total


def test_full_recomputation_adds_one_forward_of_every_layer() -> None:
    config = case(train={"steps": 1, "global_batch_size": 8, "recompute": "full"})
    plain = case()
    forward = executed_flops(plain, execution_of(plain), 0.5).forward
    more = (
        executed_flops(config, execution_of(config), 0.5).total - executed_flops(plain, execution_of(plain), 0.5).total
    )
    assert more == pytest.approx(forward["projections"] + forward["attention"] + forward["mlp"])


def test_recomputation_of_the_first_layers_adds_their_forwards_only() -> None:
    def again(**parallel: int) -> float:
        train = {"steps": 1, "global_batch_size": 8, "recompute": "full", "recompute_layers": 1}
        config = case(train=train, parallel=parallel)
        return executed_flops(config, execution_of(config), 0.5).backward["recompute"]

    every = case(train={"steps": 1, "global_batch_size": 8, "recompute": "full"})
    row, shape = row_flops(shape_of(every)), shape_of(every)
    pairs = executed_pairs(shape, "structured", pairs=attended_pairs(32, 4), dropped_rows=4)
    one = 60 * sum(row.values()) + 4 * shape.q_width * pairs
    assert again() == pytest.approx(one)
    # two stages, the second of one layer: the model's last, of scored rows
    whole = executed_flops(every, execution_of(every), 0.5).backward["recompute"]
    assert again(pp=2) == pytest.approx(whole - one)
    assert again(pp=3) == pytest.approx(whole)


def test_the_last_layer_of_fewer_rows_costs_less() -> None:
    config = case(kind="s4")
    rows: tuple[RowsKind, ...] = ("all", "noisy", "masked")
    totals = [executed_flops(config, Execution(last_layer=kind, last_pairs=kind), 0.5).total for kind in rows]
    assert totals[0] > totals[1] > totals[2]
    dense = executed_flops(config, Execution(backend="dense", last_pairs="noisy"), 0.5).part("attention")
    assert dense == executed_flops(config, Execution(backend="dense"), 0.5).part("attention") * (2 + 0.5) / 3


def test_the_engine_drops_the_last_clean_block_where_it_may() -> None:
    assert execution_of(case(kind="s4")).dropped_rows == 4
    assert execution_of(case(kind="s4", train={"steps": 1, "skip_dead_rows": False})).dropped_rows == 0
    assert execution_of(case(kind="mdlm")).dropped_rows == 0
    assert execution_of(case(kind="s4", parallel={"cp": 2, "dp": 1})).dropped_rows == 0
    # 64 - 4 = 60 rows, which 8 sequence-parallel ranks cannot share
    eight = {"tp": 8, "sequence_parallel": True}
    assert execution_of(case(kind="s4", model={"num_heads": 8}, parallel=eight)).dropped_rows == 0


def test_the_engines_last_layer_goes_on_with_scored_rows_only() -> None:
    ran = execution_of(case(kind="s4"))
    assert (ran.last_layer, ran.last_pairs, ran.head_rows) == ("masked", "noisy", "masked")
    assert execution_of(case(kind="s4", parallel={"tp": 2, "sequence_parallel": True})) == ran
    whole = execution_of(case(kind="s4", train={"skip_dead_rows": False}))
    assert (whole.last_layer, whole.last_pairs) == ("all", "all")
    off = execution_of(case(kind="s4", train={"steps": 1, "skip_dead_rows": False}))
    assert (off.last_layer, off.last_pairs) == ("all", "all")


@pytest.mark.parametrize("kind", ["s4", "s16", "mdlm", "ar"])
def test_what_runs_is_close_to_what_is_needed(kind: str) -> None:
    """At training lengths the engine's rows and pairs are within 3 % of MIN when both are counted alike (3 forwards)."""
    base: dict[str, Any] = (
        {"objective": "ar"} if kind == "ar" else {"block_size": {"s4": 4, "s16": 16, "mdlm": 1024}[kind]}
    )
    config = gpt2_small(base)
    mu = expected_masked_fraction(config)
    alike = replace(execution_of(config), attention_backward=2.0, padded=False)
    assert 1.0 <= executed_flops(config, alike, mu).total / min_flops(config, mu).total < 1.03


def test_a_step_is_its_sequences() -> None:
    config = case()
    one, all_of_them = step_flops(config, 0.5, sequences=1), step_flops(config, 0.5)
    assert all_of_them.convention == 8 * one.convention
    assert all_of_them.minimum == pytest.approx(8 * one.minimum)
    assert all_of_them.executed == pytest.approx(8 * one.executed)
