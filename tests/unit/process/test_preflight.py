"""The verdict over what ranks report of themselves: who is named, and whether the run stops for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bd3_megatron.process import preflight
from bd3_megatron.process.preflight import NodeRemark, RankReport, Severity, remarks_on, summary

CPU = torch.device("cpu")


def reports(*changes: dict[str, Any]) -> list[RankReport]:
    """Two ranks a node, healthy but for the changes, one a rank."""
    healthy = RankReport(rank=0, node="", versions={"python": "3", "torch": "2"}, product_seconds=0.01, clock=1e9)
    return [
        dataclasses.replace(healthy, rank=rank, node=f"n{rank // 2 + 1}", **change)
        for rank, change in enumerate(changes)
    ]


def verdict(*changes: dict[str, Any], device_type: str = "cuda") -> list[NodeRemark]:
    return remarks_on(reports(*changes), device_type=device_type)


def test_healthy_ranks_have_no_findings() -> None:
    assert verdict({}, {}, {}, {}) == []
    assert verdict({}) == []


@pytest.mark.parametrize(
    ("change", "severity", "sentence"),
    [
        ({"versions": {"python": "3", "torch": "1"}}, Severity.FAULT, "rank 3 on node n2 has torch 1, others 2"),
        ({"product_is_right": False}, Severity.FAULT, "rank 3 on node n2 computes a wrong matrix product"),
        ({"wrong_axes": ("tp",)}, Severity.FAULT, "rank 3 on node n2 gets a wrong sum from the all-reduce over tp"),
        (
            {"unseen_ranks": (0,)},
            Severity.FAULT,
            "rank 3 on node n2 does not share the run folder with rank 0, or cannot write there",
        ),
        (
            {"occupied": 0.5},
            Severity.FAULT,
            "rank 3 on node n2 finds 50 % of its device's memory in use before training",
        ),
        ({"clock": 1e9 + 90}, Severity.NOTE, "rank 3 on node n2 has a clock +90 s from the others'"),
        (
            {"product_seconds": 0.02},
            Severity.SLOW,
            "rank 3 on node n2 is slow: a matrix product takes 20.0 ms against 10.0 ms",
        ),
    ],
)
def test_the_odd_rank_is_named_with_its_node(change: dict[str, Any], severity: Severity, sentence: str) -> None:
    assert verdict({}, {}, {}, change) == [NodeRemark(node="n2", sentence=sentence, severity=severity)]


def test_what_rank_0_does_not_see_is_laid_on_the_rank_that_wrote_it() -> None:
    assert [f.node for f in verdict({"unseen_ranks": (2,)}, {}, {}, {})] == ["n2"]
    assert [f.node for f in verdict({"unseen_ranks": (0,)}, {}, {}, {})] == ["n1"]


def test_a_node_that_is_slow_as_a_whole_is_found_too() -> None:
    found = verdict({}, {}, {}, {}, {"product_seconds": 0.02}, {"product_seconds": 0.02})
    assert [(f.node, f.severity) for f in found] == [("n3", Severity.SLOW)] * 2
    assert verdict({}, {}, {"product_seconds": 0.02}, {}, device_type="cpu") == [], "processors' times scatter more"


def test_a_product_is_timed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, right = preflight.time_product(CPU)
    assert 0 < seconds < 1 and right
    true_product = torch.Tensor.__matmul__

    def flipped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = true_product(a, b)
        if product.dtype == torch.float32 and product.dim() == 2:
            product[3, 5] += 1.0
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", flipped)
    assert not preflight.time_product(CPU)[1]


def test_the_summary_is_one_line() -> None:
    found = reports({"bandwidth": {"tp": 2e9}}, {}, {})
    assert summary(found, 0.25) == (
        "preflight: 3 ranks on 2 nodes, matrix product 10.00 ms, all-reduce tp 2.00 GB/s; 0.2 s"
    )
    assert summary(found[:1], 0.25).startswith("preflight: 1 rank on 1 node, ")


def test_a_thousand_reports_are_compared_in_one_pass() -> None:
    """Every report is looked at a few times, however many there are."""
    looks = 0

    class Counting(RankReport):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looks
            looks += name == "product_seconds"
            return super().__getattribute__(name)

    found = [Counting(**vars(one)) for one in reports(*[{}] * 1024)]
    looks = 0
    assert remarks_on(found, device_type="cuda") == []
    assert looks <= 4 * 1024
