"""What a resumed run may change freely, what must be named, and what it says where there is nothing to resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.config.load import config_from_tree, replace_field, to_tree
from bd3_megatron.errors import CheckpointError, ConfigError
from bd3_megatron.train.resume import changes, refuse_changes, resume
from bd3_megatron.train.state import DataIdentity, TrainState
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
    refuse_changes(changes(case(), case(**change)), case(**change))


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ({"run": {"seed": 2}}, r"run\.seed was 1 and is 2"),
        ({"optim": {"lr": 1e-2}}, r"optim\.lr was 0\.0003 and is 0\.01"),
        ({"model": {"dropout": 0.1}}, r"model\.dropout was 0\.0 and is 0\.1"),
        ({"diffusion": {"block_size": 8}}, r"diffusion\.block_size was 4 and is 8"),
        ({"diffusion": {"phases": [{"block_size": 4}]}}, r"diffusion\.phases was \[\] and is \[\{.{50,60}\}\]"),
        ({"train": {"global_batch_size": 16}}, r"train\.global_batch_size was 8 and is 16"),
        ({"data": {"seq_len": 64}}, r"data\.seq_len was 32 and is 64"),
        ({"data": {"mixture": {"a": 1.0}}}, r"data\.mixture was \{\} and is \{'a': 1\.0\}"),
        ({"train": {"precision": "bf16"}}, r"train\.precision was auto and is bf16"),
    ],
    ids=str,
)
def test_what_changes_learning_is_refused_by_name(change: dict[str, Any], listed: str) -> None:
    sentence = rf"^the checkpoint was made with other settings: {listed}; restore them, or name what you mean to change"
    changed = changes(case(), case(**change))
    with pytest.raises(ConfigError, match=sentence):
        refuse_changes(changed, case(**change))
    key = changed[0].key
    refuse_changes(changed, replace_field(case(**change), "run.overridden", (key,)))


MEANINGS = [
    ({"model": {"num_heads": 8}}, r"model\.num_heads was 4 and is 8; "),
    ({"model": {"num_kv_heads": 1}}, r"model\.num_kv_heads was 2 and is 1; "),
    ({"model": {"head_dim": 4}}, r"model\.head_dim was 8 and is 4; "),
    ({"model": {"rope_base": 5e5}}, r"model\.rope_base was 10000\.0 and is 500000\.0; "),
    ({"model": {"layer_norm_eps": 1e-6}}, r"model\.layer_norm_eps was 1e-05 and is 1e-06; "),
    ({"model": {"qk_norm": True}}, r"model\.qk_norm was False and is True; "),
    ({"model": {"tie_embeddings": True}}, r"model\.tie_embeddings was False and is True; "),
    ({"model": {"style": "paper", "num_kv_heads": 4}}, r"model\.style was modern and is paper; "),
    ({"model": {"vocab_size": 999}}, r"model\.vocab_size was \d+ and is 999; "),
    ({"model": {"num_layers": 4}}, r"model\.num_layers was 3 and is 4; "),
    ({"diffusion": {"objective": "ar"}}, r"diffusion\.objective was block and is ar; "),
]


@pytest.mark.parametrize(("change", "listed"), MEANINGS, ids=str)
def test_what_gives_the_numbers_another_meaning_is_refused_however_named(change: dict[str, Any], listed: str) -> None:
    now = case(**change)
    changed = changes(case(), now)
    keys = tuple(c.key for c in changed)
    sentence = (
        rf"^the checkpoint's numbers would mean something else: .*{listed}.*name run\.reinterpret=true on the command"
    )
    switched = replace_field(now, "run.reinterpret", True)
    for config in (now, replace_field(now, "run.overridden", keys), switched):
        with pytest.raises(ConfigError, match=sentence):
            refuse_changes(changed, config)
    refuse_changes(changed, replace_field(switched, "run.overridden", ("run.reinterpret",)))


def identity(
    *documents: int, tokenizer: dict[str, Any] | None = None, valid: int | None = None, rows: int = 5
) -> DataIdentity:
    """Sources of so many documents of ten tokens."""
    counts = [{"rows": rows, "documents": number, "tokens": 10 * number} for number in documents]
    held_out = None if valid is None else {"rows": rows, "documents": valid, "tokens": 10 * valid}
    return DataIdentity(tokenizer=tokenizer or {"fingerprint": "ab"}, rows={"train": counts, "valid": held_out})


def test_another_tokenizer_is_refused_with_what_differs() -> None:
    before, now = {"fingerprint": "ab" * 32, "mask": 4}, {"fingerprint": "cd" * 32, "mask": 5}
    changed = changes(case(), case(), data=(identity(tokenizer=before), identity(tokenizer=now)))
    with pytest.raises(
        ConfigError, match=r"tokenizer\.fingerprint was ab.*ab and is cd.*; tokenizer\.mask was 4 and is 5;"
    ):
        refuse_changes(changed, case())
    assert changes(case(), case(), data=(identity(tokenizer=now), identity(tokenizer=now))) == []


def test_grown_text_is_refused_unless_the_text_is_named() -> None:
    changed = changes(case(), case(), data=(identity(7), identity(8)))
    sentence = r"rows\.train was \[\{'documents': 7, 'tokens': 70\}\] and is .*8.*as data\.path=VALUE\.$"
    with pytest.raises(ConfigError, match=sentence):
        refuse_changes(changed, case())
    with pytest.raises(ConfigError, match=sentence):
        refuse_changes(changed, replace_field(case(), "run.overridden", ("data.num_workers",)))
    refuse_changes(changed, replace_field(case(), "run.overridden", ("data.path",)))


def test_text_of_which_other_tokens_are_predicted_is_other_text() -> None:
    before, now = identity(7), identity(7)
    now.rows["train"][0]["supervised"] = 31
    assert changes(case(), case(), data=(now, now)) == []
    for was, is_now in ((before, now), (now, before)):
        with pytest.raises(ConfigError, match=r"rows\.train was .*supervised.*as data\.path=VALUE\.$"):
            refuse_changes(changes(case(), case(), data=(was, is_now)), case())
    state = TrainState(rows=now.rows)
    assert TrainState.from_json(state.to_json(), "x").rows == now.rows


def test_what_is_no_other_text_is_not_refused() -> None:
    # the same text cut into other rows, a mixture that grew at its end, and more held-out text, which is said
    assert changes(case(), case(), data=(identity(7, rows=5), identity(7, rows=9))) == []
    assert changes(case(), case(), data=(identity(7), identity(7, 3))) == []
    grown = changes(case(), case(), data=(identity(7, valid=2), identity(7, valid=3)))
    assert [change.key for change in grown] == ["rows.valid"]
    refuse_changes(grown, case())


def test_documents_that_were_trained_on_are_not_held_out_afterwards() -> None:
    def holding_out(fraction: float | None) -> DataIdentity:
        rows = identity(7, valid=2).rows
        return DataIdentity(tokenizer={}, rows=rows if fraction is None else rows | {"held_out_fraction": fraction})

    more = changes(case(), case(), data=(holding_out(0.05), holding_out(0.3)))
    named = replace_field(case(), "run.overridden", ("data.path",))
    with pytest.raises(ConfigError, match=r"would mean something else: rows\.held_out_fraction was 0\.05 and is 0\.3;"):
        refuse_changes(more, named)
    switched = replace_field(case(), "run.reinterpret", True)
    refuse_changes(more, replace_field(switched, "run.overridden", ("run.reinterpret",)))
    # less was left out of what was trained on all the same
    refuse_changes(changes(case(), case(), data=(holding_out(0.3), holding_out(0.05))), case())
    assert changes(case(), case(), data=(holding_out(None), holding_out(0.3))) == []


def test_what_is_derived_may_be_written_down() -> None:
    model = case().model
    written = {"head_dim": model.head_width, "ffn_hidden_size": model.ffn_width, "num_kv_heads": model.kv_heads}
    assert changes(case(), case(model=written)) == []


def test_all_changes_are_listed_at_once() -> None:
    now = case(optim={"lr": 1e-2, "weight_decay": 0.1})
    sentence = (
        r"optim\.lr was .*; optim\.weight_decay was 0\.0 and is 0\.1; .* on the command line, as optim\.lr=VALUE\.$"
    )
    with pytest.raises(ConfigError, match=sentence):
        refuse_changes(changes(case(), now), now)


def test_what_is_named_on_the_command_line_may_change() -> None:
    now = replace_field(case(optim={"lr": 1e-2}), "run.overridden", ("optim.lr",))
    refuse_changes(changes(case(), now), now)
    other = replace_field(case(optim={"weight_decay": 0.1}), "run.overridden", ("optim.lr",))
    with pytest.raises(ConfigError, match=r"optim\.weight_decay was"):
        refuse_changes(changes(case(), other), other)


def test_a_part_of_a_nested_value_may_be_named() -> None:
    before, after = (case(data={"path": "d", "stream": {"dataset": name}}) for name in ("a", "b"))
    changed = changes(before, after)
    refuse_changes(changed, replace_field(after, "run.overridden", ("data.stream.dataset",)))
    with pytest.raises(
        ConfigError, match=r"data\.stream was \{'dataset': 'a'\} and is \{'dataset': 'b'\}; .*name what you mean"
    ):
        refuse_changes(changed, replace_field(after, "run.overridden", ("data.stre",)))


def test_every_change_is_found_with_both_values_named_or_free() -> None:
    now = case(run={"dir": "moved"}, optim={"lr": 1e-2}, checkpoint={"every_steps": 7})
    now = replace_field(replace_field(now, "run.overridden", ("optim.lr",)), "run.reinterpret", True)
    expected = ["run.dir", "optim.lr", "checkpoint.every_steps"]
    assert [c.key for c in changes(case(), now)] == expected
    assert str(changes(case(), now)[1]) == "optim.lr was 0.0003 and is 0.01"


def test_the_saved_configuration_is_no_change() -> None:
    config = case(diffusion={"phases": [{"block_size": 4, "interval": [0.3, 0.8]}]}, data={"text": ["a", "b"]})
    assert changes(config_from_tree(to_tree(config)), config) == []


def test_a_run_without_checkpoint_starts_anew_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    known = identity(7, valid=2)
    begun = resume(no_engine(), tmp_path, case(), known, said.append)
    assert begun == TrainState(tokenizer=known.tokenizer, rows=known.rows, origin_step=0, origin_samples=0)
    assert said == [f"no checkpoint in {tmp_path}: starts anew"]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:08d}/manifest.json").write_text("{")
    said: list[str] = []
    with pytest.raises(
        CheckpointError, match=r"^all 2 checkpoints in '.*' are damaged; restore one, or remove the folder"
    ):
        resume(no_engine(), tmp_path, case(), identity(), said.append)
    assert [sentence.split(":")[0] for sentence in said] == [
        "skips checkpoint step_00000020",
        "skips checkpoint step_00000010",
    ]
