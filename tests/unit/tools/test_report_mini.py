"""The miniature: its runs are legal configurations, its branches begin where the trunk stood, its verdicts are honest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from bd3_megatron.config.load import load_config
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import RangeError
from bd3_megatron.evaluate.perplexity import SequenceScores
from bd3_megatron.report.results import ResultSection
from tools.mini.runs import MiniRun, RunFailed, Runner, mini_runs
from tools.mini.variants import MINI_SEQ_LEN, QUICK, TRUNK, VARIANTS, WHOLE, MiniSize, base_tree, overrides
from tools.mini.verdicts import CLAIMS, verdicts
from tools.reproduce_mini import build_parser, main, sections_as_markdown, size_of

TOKENS = 100.0


@pytest.mark.parametrize("size", [QUICK, WHOLE])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_is_a_legal_run_of_equal_budget(name: str, size: MiniSize, tmp_path: Path) -> None:
    path = tmp_path / "mini.yaml"
    path.write_text(yaml.safe_dump(base_tree(size, data="data")))
    config = load_config(path, overrides(VARIANTS[name], size, seed=3, run_dir="x"))
    validate(config)
    assert config.train.steps == size.steps and config.run.seed == 3
    if VARIANTS[name].is_branch:
        assert block_sizes(config) == [MINI_SEQ_LEN, VARIANTS[name].block_size]
        assert config.diffusion.phases[0].steps == size.branch_step
        # the trunk's checkpoint lies before the learning rate falls
        assert size.branch_step <= size.steps * (1 - config.optim.decay_fraction)


def test_the_options_choose_how_much_is_done() -> None:
    size = size_of(
        build_parser().parse_args(["--quick", "--steps", "100", "--variants", "s8", "ar", "--seeds", "4", "5"])
    )
    assert (size.steps, size.branch_step, size.seeds, size.variants) == (100, 60, (4, 5), ("ar", "s8", TRUNK))
    assert size_of(build_parser().parse_args([])) == WHOLE
    with pytest.raises(RangeError, match="needs --steps 10 or more"):
        size_of(build_parser().parse_args(["--steps", "3"]))


def test_trunks_come_first_and_finished_runs_are_not_started_again(tmp_path: Path) -> None:
    jobs = mini_runs(QUICK, tmp_path)
    assert jobs[0].variant.name == TRUNK and {job.variant.name for job in jobs} == set(QUICK.variants)
    for job in jobs:
        job.folder.mkdir(parents=True)
        (job.folder / "status.json").write_text(json.dumps({"status": "finished"}))
    said: list[str] = []
    Runner(QUICK, tmp_path / "no.yaml", 2, said.append).run(jobs)
    assert not said


def test_a_run_that_fails_ends_the_miniature_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("run: {dir: x}\nnonsense: 1\n")
    job = MiniRun(VARIANTS["ar"], 1, tmp_path / "ar")
    with pytest.raises(RunFailed, match=r"AR, seed 1 ended with code 2: bd3: error: .*nonsense"):
        Runner(QUICK, tmp_path / "bad.yaml", 1, lambda _: None).run([job])


def scores(nll: float, *, spread: float = 0.1, seed: int = 0) -> SequenceScores:
    """400 sequences around a mean; what is hard is hard for all models."""
    generator = torch.Generator().manual_seed(9)
    hardness = torch.randn(400, generator=generator, dtype=torch.float64)
    own = torch.randn(400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SequenceScores(
        TOKENS * (nll + 0.5 * hardness + spread * own), torch.full((400,), TOKENS, dtype=torch.float64)
    )


def test_verdicts_say_what_was_measured_and_no_more() -> None:
    means = {"ar": 2.0, "s1": 2.001, "s4": 2.1, "s8": 2.1, "s16": 2.3, "mdlm": 2.25}
    found = {
        (name, seed): scores(nll, seed=len(name) + 7 * seed + i)
        for i, (name, nll) in enumerate(means.items())
        for seed in (1, 2)
    }
    words = {(v.claim.better, v.claim.worse): v.word for v in verdicts(found, (1, 2))}
    assert words["ar", "s4"] == words["s4", "mdlm"] == words["s8", "s16"] == "reproduced"
    assert words["ar", "s1"] == "reproduced" and words["s4", "s8"] == "undecided"
    assert words["s16", "mdlm"] == "not reproduced (the other way round)"
    assert ("s1", "s1_uniform") not in words and len(words) < len(CLAIMS)


def test_an_ordering_that_one_seed_denies_is_not_reproduced() -> None:
    found = {("s4", 1): scores(2.0, seed=1), ("s8", 1): scores(2.4, seed=2)}
    found |= {("s4", 2): scores(2.1, seed=3), ("s8", 2): scores(2.05, seed=4)}
    (verdict,) = verdicts(found, (1, 2))
    assert verdict.word == "undecided" and min(verdict.by_seed) < 0


def test_an_equality_that_does_not_hold_is_not_reproduced() -> None:
    (verdict,) = verdicts({("ar", 1): scores(2.0, seed=1), ("s1", 1): scores(2.2, seed=2)}, (1,))
    assert verdict.word == "not reproduced" and verdict.cells()[2].startswith("+")
    (verdict,) = verdicts({("ar", 1): scores(2.0, spread=2.0), ("s1", 1): scores(2.0, spread=2.0, seed=2)}, (1,))
    assert verdict.word == "undecided"


def test_the_record_is_markdown() -> None:
    section = ResultSection(title="T", text=("one",), columns=("a", "b"), rows=(("1", "2"),))
    assert sections_as_markdown([section]) == "## T\n\none\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"


@pytest.mark.matrix
def test_a_tiny_miniature_from_text_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Item {n}: {n * n} is the square of {n}.\n\n" for n in range(1500)))
    asked = ["--quick", "--steps", "10", "--variants", "ar", "s4", "--num-sequences", "8", "--text", str(text)]
    assert main([*asked, "--out", str(tmp_path / "mini")]) == 0
    said = capsys.readouterr()
    assert "3 of 3" in said.err and "| AR below S = 4" in said.out and "| S = 4 |" in said.out
    sections = json.loads((tmp_path / "mini" / "results.json").read_text())
    assert [len(one["rows"]) for one in sections] == [3, 2, 2]
    assert "The paper in miniature" in (tmp_path / "mini" / "report.html").read_text()
    assert main([*asked, "--out", str(tmp_path / "mini")]) == 0
    assert "is trained" not in capsys.readouterr().err
