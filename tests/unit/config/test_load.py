"""Loading: what a file says is what runs; what it cannot mean is refused by name."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import pytest

from bd3_megatron.config.load import (
    RENAMED,
    config_from_tree,
    dump_config,
    flatten,
    load_config,
    replace_field,
    to_tree,
    with_later,
)
from bd3_megatron.config.reference import keys
from bd3_megatron.errors import ConfigError

MINIMAL = """
run: {dir: runs/x}
model: {num_layers: 2, hidden_size: 64, num_heads: 4}
data: {seq_len: 64}
train: {steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_a_minimal_file_takes_the_defaults(file: Path) -> None:
    config = load_config(file)
    assert (config.model.num_layers, config.parallel.tp, config.optim.lr) == (2, 1, 3e-4)
    assert (config.model.kv_heads, config.model.head_width, config.model.ffn_width) == (4, 16, 192)


def test_paper_style_has_a_four_times_wider_mlp(file: Path) -> None:
    assert load_config(file, ["model.style=paper"]).model.ffn_width == 256


def test_overrides_come_last_and_are_yaml(file: Path) -> None:
    config = load_config(
        file,
        ["parallel.tp=2", "optim.lr=1e-3", "data.text=[a, b]", "model.qk_norm=true", "diffusion.interval=[0.3, 0.8]"],
    )
    assert (config.parallel.tp, config.optim.lr, config.data.text) == (2, 1e-3, ("a", "b"))
    assert config.model.qk_norm is True and config.diffusion.interval == (0.3, 0.8)


def test_an_override_may_fill_a_section_the_file_leaves_empty(file: Path) -> None:
    file.write_text(MINIMAL + "optim:\n")
    assert load_config(file, ["optim.lr=0.5"]).optim.lr == 0.5
    assert load_config(file).optim.lr == 3e-4


def test_a_mapping_may_be_overridden_key_by_key(file: Path) -> None:
    assert load_config(file, ["data.mixture.web=0.7", "data.mixture.code=0.3"]).data.mixture == {
        "web": 0.7,
        "code": 0.3,
    }


def test_nested_phases_are_typed(file: Path) -> None:
    file.write_text(
        MINIMAL + "diffusion: {phases: [{block_size: 64, steps: 5, interval: [0.1, 1]}, {block_size: 4}]}\n"
    )
    first, last = load_config(file).diffusion.phases
    assert (first.block_size, first.steps, first.interval) == (64, 5, (0.1, 1.0))
    assert (last.block_size, last.steps, last.lr_end) == (4, None, 1.0)


def test_base_is_one_parent_relative_to_the_file(tmp_path: Path, file: Path) -> None:
    child = tmp_path / "deeper" / "child.yaml"
    child.parent.mkdir()
    child.write_text("base: ../config.yaml\nmodel: {num_layers: 7}\n")
    config = load_config(child)
    assert (config.model.num_layers, config.model.hidden_size) == (7, 64)


def test_the_dump_is_the_config(tmp_path: Path, file: Path) -> None:
    config = load_config(file, ["diffusion.phases=[{block_size: 4}]", "parallel.layers_per_stage=[1, 1]"])
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config
    assert config_from_tree(to_tree(config)) == config
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "no temporary file may stay"


def test_flatten_and_replace_speak_of_section_and_key(file: Path) -> None:
    config = load_config(file)
    assert flatten(config)["optim.lr"] == 3e-4
    assert replace_field(config, "optim.lr", 1.0).optim.lr == 1.0
    assert config.optim.lr == 3e-4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_layer=3", r"^unknown key model\.num_layer; did you mean model\.num_layers\?$"),
        ("paralell.tp=2", r"^unknown key paralell; did you mean parallel\?$"),
        ("log.zzz=1", r"^unknown key log\.zzz; known keys are every_steps, wandb, "),
        ("parallel.tp=two", r"^parallel\.tp='two' is not a whole number; give a whole number\.$"),
        ("parallel.tp=2.5", r"^parallel\.tp=2\.5 is not a whole number"),
        ("train.steps=true", r"^train\.steps=True is not a whole number"),
        ("optim.lr=fast", r"^optim\.lr='fast' is not a number; give a number\.$"),
        ("optim.lr=nan", r"^optim\.lr=nan is not finite; give a number\.$"),
        ("optim.lr=.inf", r"^optim\.lr=inf is not finite"),
        ("model.qk_norm=1", r"^model\.qk_norm=1 is not true or false"),
        ("run.dir=3", r"^run\.dir=3 is not text; give text\.$"),
        ("model.style=old", r"^model\.style='old' is not allowed; use paper or modern\.$"),
        ("parallel.zero_stage=4", r"^parallel\.zero_stage=4 is not allowed; use 0, 1, 2 or 3\.$"),
        ("parallel.zero_stage=true", r"^parallel\.zero_stage=True is not allowed"),
        ("parallel.zero_stage=1.0", r"^parallel\.zero_stage=1\.0 is not allowed"),
        ("data.text=one", r"^data\.text='one' is not a list; write it as \[a, b\]\.$"),
        ("data.text=[1]", r"^data\.text\[0\]=1 is not text"),
        ("diffusion.interval=[0.1]", r"^diffusion\.interval=\[0\.1\] has 1 value; it takes 2\.$"),
        ("data.mixture=3", r"^data\.mixture=3 is not a mapping; give keys and values\.$"),
        ("diffusion.phases=[3]", r"^diffusion\.phases\[0\]=3 is not a section"),
        ("diffusion.phases=[{}]", r"^diffusion\.phases\[0\]\.block_size is not set and has no default"),
        (
            "run.overridden=[optim.lr]",
            r"^override 'run\.overridden=\[optim\.lr\]': run\.overridden is the run's own record of what its command line",
        ),
        ("optim=3", r"^override 'optim=3' is not of the form section\.key=value; write for example parallel\.tp=2\.$"),
        ("parallel.tp", r"^override 'parallel\.tp' is not of the form"),
        ("parallel..tp=2", r"is not of the form"),
        ("run.dir.deep=2", r"^override 'run\.dir\.deep=2': 'dir' is a value, not a section"),
        ("run.dir=[", r"^override 'run\.dir=\[' is not valid YAML \(line 1, column 2: .*\); mend that line\.$"),
        (f"run.dir{'.a' * 5000}=2", r"^override 'run\.dir\.a.*a=2' is not of the form section\.key=value"),
        (f"optim.{'x' * 5000}=2", r"^unknown key optim\.x+\.\.\.x+; known keys are name, lr, "),
        (f"parallel.tp={'x' * 5000}", r"^parallel\.tp='x+\.\.\.x+' is not a whole number"),
        ("data.mixture={a: 1, a: 2}", r"^override '.*' gives the key 'a' a second time"),
        ("diffusion.interval=[1, 2, 3]", r"^diffusion\.interval=\[1, 2, 3\] has 3 values; it takes 2\.$"),
    ],
)
def test_bad_overrides_are_refused_in_one_sentence(file: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(file, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no sections"),
        ("- a\n- b\n", "holds no sections"),
        ("run: [", r"is not valid YAML \(.*\); mend that line\.$"),
        (
            "train: 3\nrun: {dir: x}\nmodel: {num_layers: 1, hidden_size: 8, num_heads: 1}\ndata: {seq_len: 4}",
            "train=3 is not a section",
        ),
        ("run: {dir: x}\n", r"^model is not set and has no default; add it to the file or the command line\.$"),
        (MINIMAL.replace("seq_len: 64", ""), r"^data\.seq_len is not set and has no default"),
        ("base: config.yaml\n", "names itself as its base"),
        ("base: gone.yaml\n", r"gone\.yaml' does not exist"),
        ("base: [a]\n", r"has base=\['a'\]; give the path of one YAML file, relative to this one\.$"),
        ("run: {dir: \xff}\n", r"is not UTF-8 \(byte 0xff in line 1\); save it in UTF-8"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(file: Path, text: str, sentence: str) -> None:
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", RENAMED)
def test_a_key_of_an_older_version_is_refused_by_what_replaced_it(file: Path, key: str) -> None:
    sentence = re.escape(f"unknown key {key}, which is of an older version; write {RENAMED[key]} in its place.")
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        load_config(file, [f"{key}=3"])
    # stored in a checkpoint's manifest
    tree = to_tree(load_config(file, ["data.stream.dataset=a"]))
    section, _, name = key.rpartition(".")
    functools.reduce(lambda node, part: node[part], section.split("."), tree)[name] = 3
    with pytest.raises(ConfigError, match=f"^{sentence}$"):
        config_from_tree(tree)


def test_what_replaced_a_key_is_a_key() -> None:
    known = {key.name for key in keys()}
    assert all(said.split(" ")[0] in known for said in RENAMED.values()) and not known & set(RENAMED)


def test_blanks_around_a_key_are_none_of_it(file: Path) -> None:
    config = load_config(file, [" optim. lr =0.5"])
    assert config.optim.lr == 0.5 and config.run.overridden == ("optim.lr",)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.lr=1", "optim.lr=2"],
        ["optim.lr=1", "train.steps=3", " optim.lr=1"],
        ["data.mixture.a=1", "data.mixture={b: 2}"],
    ],
)
def test_a_key_that_is_set_twice_is_refused_with_both_values(file: Path, overrides: list[str]) -> None:
    sentence = (
        f"^'{re.escape(overrides[0])}' and '{re.escape(overrides[-1].strip())}' set the same key, and only the last"
    )
    with pytest.raises(ConfigError, match=sentence):
        load_config(file, overrides)


def test_keys_below_a_section_add_to_it_and_later_ones_stand_in_for_the_same(file: Path) -> None:
    assert load_config(file, ["data.mixture={a: 1}", "data.mixture.b=2"]).data.mixture == {"a": 1.0, "b": 2.0}
    first = ["optim.lr=1", "data.mixture.a=1", "optim.lr_extra=1"]
    assert with_later(first, ["optim.lr=2", "data.mixture={b: 1}"]) == [
        "optim.lr_extra=1",
        "optim.lr=2",
        "data.mixture={b: 1}",
    ]


def test_a_record_of_what_was_named_holds_until_something_is_named(file: Path, tmp_path: Path) -> None:
    # a batch job's copy of the configuration carries it
    dump_config(load_config(file, ["optim.lr=1"]), tmp_path / "job.yaml")
    assert load_config(tmp_path / "job.yaml").run.overridden == ("optim.lr",)
    assert load_config(tmp_path / "job.yaml", ["train.steps=3"]).run.overridden == ("train.steps",)


def test_a_blank_in_a_key_is_shown(file: Path) -> None:
    file.write_text(MINIMAL + "optim: {' lr': 3}\n")
    with pytest.raises(ConfigError, match=r"^unknown key optim\.' lr'; did you mean optim\.lr\?$"):
        load_config(file)


def test_a_long_chain_of_bases_is_refused(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match=r"10\.yaml' is the base of 10 files in a row; join some of them\.$"):
        load_config(tmp_path / "0.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml' does not exist; give the path of a YAML file"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_named(file: Path) -> None:
    file.chmod(0)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\); check its permissions\.$"):
        load_config(file)


def test_nothing_in_a_value_is_evaluated(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    assert load_config(file, ["run.dir=$SECRET/${SECRET}"]).run.dir == "$SECRET/${SECRET}"
    with pytest.raises(ConfigError, match="has a tag"):
        load_config(file, ["run.dir=!!python/object/apply:os.getcwd []"])
