"""The reference of keys is complete, generated from the schema, and what configs/README.md shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron import cli
from bd3_megatron.config.load import flatten, load_config
from bd3_megatron.config.reference import HEADING, explain, keys, markdown
from bd3_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def test_every_key_of_a_configuration_is_there_with_a_text() -> None:
    known = {key.name: key for key in keys()}
    assert set(flatten(load_config(ROOT / "configs/debug_cpu.yaml"))) <= set(known)
    inside = {"data.stages[].mixture", "data.stream.filters[].one_of", "diffusion.phases[].interval"}
    assert inside <= set(known)
    assert [name for name, key in known.items() if not key.text.endswith(".")] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optim.lr", "optim.lr: number in [1e-12, 1000]; default 0.0003\n    Peak learning rate.\n"),
        ("model.head_dim", "model.head_dim: even whole number in [2, 10000] or null; default null\n    Channels"),
        ("train.spike_factor", "train.spike_factor: 0 or number in (1, 1e6]; default 0.0\n    A loss above"),
        ("diffusion.interval", "diffusion.interval: list of 2 x number in [0.001, 1] or null; default null\n"),
        ("data.mixture", "data.mixture: mapping from path to number in [0, 1e9]; default {}\n"),
        ("run.dir", "run.dir: path; required\n    Folder of the run"),
        ("log.wandb", "log.wandb: online, offline, disabled; default disabled\n"),
    ],
)
def test_a_key_is_explained_with_type_range_default_and_text(name: str, expected: str) -> None:
    assert explain(name).startswith(expected)


def test_a_section_and_a_list_are_explained_key_by_key_and_a_bare_name_is_found() -> None:
    assert explain("watch").count("watch.") >= 4
    assert explain("diffusion.phases").count("diffusion.phases[].") == 7 + 10
    assert explain("lr") == explain("optim.lr")
    assert explain("every_steps").count("every_steps:") == 3


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("optim.lrr", r"^no key optim\.lrr; did you mean optim\.lr or "),
        ("model.num_layer", r"^no key model\.num_layer; did you mean model\.num_layers"),
        ("qqqqqq", r"^no key qqqqqq; bd3 config --reference lists all of them\.$"),
        ("x" * 5000, r"^no key x+\.\.\.x+; bd3 config"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        explain(name)


def test_the_command_prints_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "optim.lr"]) == 0
    assert capsys.readouterr().out == explain("optim.lr")
    assert cli.main(["config", "--reference"]) == 0
    assert capsys.readouterr().out == markdown()
    for arguments in (["config"], ["config", "optim.lr", "--reference"]):
        assert cli.main(arguments) == 2
        assert "takes a KEY such as optim.lr, or --reference" in capsys.readouterr().err


def test_the_readme_of_configs_shows_the_reference_of_today() -> None:
    text = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    shown = text[text.index(HEADING) :]
    assert shown == markdown(), "run `bd3 config --reference` and put it under 'Every key' of configs/README.md"
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert f"`{path.stem}`" in text, f"configs/README.md does not name {path.name}"
