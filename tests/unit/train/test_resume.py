"""What a resumed run may change freely, what must be named, and what it says where there is nothing to resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.config.load import config_from_tree, replace_field, to_tree
from bd3_megatron.errors import CheckpointError, ConfigError
from bd3_megatron.train.resume import refuse_changes, resume
from bd3_megatron.train.state import TrainState
from tests.unit.cost.cases import case


def no_engine() -> Any:
    """Nothing may be loaded in these tests."""
    return None


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"dir": "elsewhere"}},
        {"parallel": {"tp": 2, "dp": 4, "zero_stage": 3, "layers_per_stage": [3]}},
        {"checkpoint": {"every_steps": 7}, "log": {"every_steps": 1}, "evaluate": {"every_steps": 5}},
        {"train": {"steps": 99}},
        {"train": {"micro_batch_size": 4, "recompute": "full", "skip_dead_rows": False, "stop_file": "x"}},
        {"data": {"path": "moved", "num_workers": 3}},
        {"attention": {"backend": "dense"}, "throughput": {"peak_tflops": 1.0}, "watch": {"leak_check": False}},
    ],
    ids=str,
)
def test_what_does_not_change_what_is_learned_is_free(change: dict[str, Any]) -> None:
    refuse_changes(case(), case(**change))


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ({"run": {"seed": 2}}, r"run\.seed was 1 and is 2"),
        ({"optim": {"lr": 1e-2}}, r"optim\.lr was 0\.0003 and is 0\.01"),
        ({"model": {"num_layers": 4}}, r"model\.num_layers was 3 and is 4"),
        ({"diffusion": {"block_size": 8}}, r"diffusion\.block_size was 4 and is 8"),
        ({"diffusion": {"phases": [{"block_size": 4}]}}, r"diffusion\.phases was \[\] and is \[\{.{50,60}\.\.\."),
        ({"train": {"global_batch_size": 16}}, r"train\.global_batch_size was 8 and is 16"),
        ({"data": {"seq_len": 64}}, r"data\.seq_len was 32 and is 64"),
        ({"data": {"mixture": {"a": 1.0}}}, r"data\.mixture was \{\} and is \{'a': 1\.0\}"),
        ({"train": {"precision": "bf16"}}, r"train\.precision was auto and is bf16"),
    ],
    ids=str,
)
def test_what_changes_learning_is_refused_by_name(change: dict[str, Any], listed: str) -> None:
    sentence = rf"^the checkpoint was made with other settings: {listed}; restore them, or name what you mean to change"
    with pytest.raises(ConfigError, match=sentence):
        refuse_changes(case(), case(**change))


def test_all_changes_are_listed_at_once() -> None:
    sentence = (
        r"optim\.lr was .*; optim\.weight_decay was 0\.0 and is 0\.1; .* on the command line, as optim\.lr=VALUE\.$"
    )
    with pytest.raises(ConfigError, match=sentence):
        refuse_changes(case(), case(optim={"lr": 1e-2, "weight_decay": 0.1}))


def test_what_is_named_on_the_command_line_may_change() -> None:
    changed = replace_field(case(optim={"lr": 1e-2}), "run.overridden", ("optim.lr",))
    refuse_changes(case(), changed)
    with pytest.raises(ConfigError, match=r"optim\.weight_decay was"):
        refuse_changes(case(), replace_field(case(optim={"weight_decay": 0.1}), "run.overridden", ("optim.lr",)))


def test_a_part_of_a_nested_value_may_be_named() -> None:
    before, after = (case(data={"path": "d", "stream": {"dataset": name}}) for name in ("a", "b"))
    refuse_changes(before, replace_field(after, "run.overridden", ("data.stream.dataset",)))
    with pytest.raises(ConfigError, match=r"data\.stream was \{'dataset': 'a'.*name what you mean"):
        refuse_changes(before, replace_field(after, "run.overridden", ("data.stre",)))


def test_the_saved_configuration_is_no_change() -> None:
    config = case(diffusion={"phases": [{"block_size": 4, "interval": [0.3, 0.8]}]}, data={"text": ["a", "b"]})
    refuse_changes(config_from_tree(to_tree(config)), config)


def test_a_run_without_checkpoint_starts_anew_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    assert resume(no_engine(), tmp_path, case(), said.append) == TrainState()
    assert said == [f"no checkpoint in {tmp_path}: starts anew"]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:08d}/manifest.json").write_text("{")
    said: list[str] = []
    with pytest.raises(
        CheckpointError, match=r"^all 2 checkpoints in '.*' are damaged; restore one, or remove the folder"
    ):
        resume(no_engine(), tmp_path, case(), said.append)
    assert [sentence.split(":")[0] for sentence in said] == [
        "skips checkpoint step_00000020",
        "skips checkpoint step_00000010",
    ]
