"""The variance tool on a real run: a table that says what the paper's does, plots, and refusals in one line."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bd3_megatron.diffusion.interval_search import FULL
from tests.ranks.train_runs import train, train_config, write_data
from tools import estimate_variance
from tools.variance import measure

SMALL = ["--batches", "2", "--gradient-batches", "2", "--batch-rows", "8"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variance")
    write_data(root / "data")
    for name, diffusion in (("S4", {"block_size": 4}), ("S1", {"block_size": 1}), ("ar", {"objective": "ar"})):
        train(train_config(root / "data", root / name, diffusion=diffusion, train={"steps": 2}))
    return root


def test_the_table_says_what_the_papers_does(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / "S4"), *SMALL, "--results", str(tmp_path)]
    assert estimate_variance.main(arguments) == 0
    note = (tmp_path / "estimate_variance.md").read_text("utf-8")
    assert "S = 4, L = 32, after 2 steps; 128 blocks, 2 gradients of 8 rows; 36 candidate intervals" in note
    rows = {cells[1].strip(): cells for line in note.splitlines() if len(cells := line.split("|")) == 8}
    assert {"linear", "cosine", "square", "sqrt", "log", "clipped [0.45, 0.95]", "clipped [0.3, 0.8]"} <= rows.keys()
    assert float(rows["clipped [0.45, 0.95]"][4].strip(" x")) >= 2.0
    assert re.search(r"The search chose clipped \[.*\], whose variance is -?\d+\.\d % above that of the best", note)
    for name in ("variance_of_loss_s4", "variance_of_gradient_s4"):
        chart = ElementTree.fromstring((tmp_path / f"{name}.svg").read_text("utf-8"))
        assert len([e for e in chart.iter() if e.tag.endswith("polyline")]) == 6
    assert "S = 4, L = 32" in capsys.readouterr().out


def test_block_size_one_has_two_candidates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate_variance.main([str(folder / "S1"), *SMALL, "--no-note"]) == 0
    said = capsys.readouterr().out
    assert "2 candidate intervals" in said and "The search chose clipped [1, 1], whose variance is 0.0 %" in said


def test_a_variance_is_that_of_the_draws(folder: Path) -> None:
    subject = measure.open_subject(folder / "S4", 8)
    found = measure.variance_of_one(subject, "loglinear", FULL, 2, 3)
    losses, grads = [], []
    for number in range(3):
        loss_BK, _, _ = subject.losses(range(8 * number, 8 * number + 8), FULL, "loglinear", seed=1)
        grads.append(torch.autograd.grad(loss_BK.mean(), list(subject.model.parameters())))
        losses.append(loss_BK.detach().double())
    assert found.loss_variance == pytest.approx(torch.cat(losses[:2]).var().item())
    flat = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]).double()
    assert found.gradient_variance == pytest.approx(flat.var(dim=0).sum().item(), rel=1e-6)


def test_what_cannot_be_measured_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate_variance.main([str(folder / "ar"), "--no-note"]) == 2
    assert "is an autoregressive run, which draws no noise; give a block-diffusion run." in capsys.readouterr().err
    assert estimate_variance.main(["--no-note"]) == 2
    assert "no run was named; give a run's folder, or --train CONFIG" in capsys.readouterr().err
    assert estimate_variance.main([str(folder / "absent"), "--no-note"]) == 2
