"""One boundary reads all YAML: what a reader could overlook or what could exhaust him is one sentence with its line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bd3_megatron.config.load import load_config
from bd3_megatron.config.yaml_file import LONGEST_BYTES, parse_yaml, read_yaml
from bd3_megatron.data.recipe import load_recipe
from bd3_megatron.errors import ConfigError
from launch.cluster import load_cluster

SECTION_TWICE = """\
optim:
  lr: 1.0e-3

log:
  every_steps: 1

optim:
  warmup_steps: 2
"""


def refusal(content: bytes | str, folder: Path) -> str:
    path = folder / "file.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path, "config file", "another")
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) <= 600
    return sentence.replace(str(folder), "F")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            SECTION_TWICE,
            "config file 'F/file.yaml', line 7, gives the key 'optim' a second time (first in line 1), and only one of the two "
            "could count; join them.",
        ),
        ("a: 1\nb: {c: 1, c: 2}\n", "line 2, gives the key 'c' a second time (first in line 2)"),
        ("a: 1\nb: 2024-01-31\n", "line 2, holds a date ('2024-01-31'); put it in quotes if a text is meant."),
        ("a: 1\nb: 12:30:00\n", "line 2, holds '12:30:00', which YAML reads as a number of base 60; put it in quotes."),
        ("a: 010\n", "holds '010', which YAML reads as a number of base 8; leave out the leading 0."),
        ("a: 0x_\n", "holds '0x_', which is no number; put it in quotes if a text is meant."),
        (f"a: {'9' * 30}\n", "9', which does not fit 64 bits; give a smaller number."),
        (f"a: {'9' * 9000}\n", "9', which does not fit 64 bits; give a smaller number."),
        (f"a: 0x{'f' * 9000}\n", "f', which does not fit 64 bits; give a smaller number."),
        ("a: !!python/object/apply:os.getcwd []\n", "has a tag ('tag:yaml.org,2002:python/object/apply:os.getcwd')"),
        ("a: !!str 1\n", "has a tag ('tag:yaml.org,2002:str'), which nothing here reads; write the plain value."),
        ("a: !mine 1\n", "has a tag ('!mine')"),
        ("a: &x [1]\nb: *x\n", "line 1, has an anchor or alias ('x'); write the value out where it is used."),
        ("a: *x\n", "has an anchor or alias ('x')"),
        ("a: {<<: {b: 1}}\n", "has a key that is no text ('<<'); put it in quotes."),
        ("1: a\n", "has a key that is no text ('1'); put it in quotes."),
        ("on: a\n", "has a key that is no text ('on')"),
        ("[a]: b\n", "has a key that is no text (a list or mapping)"),
        ("a: " + "[" * 5000 + "]" * 5000, "is nested more than 20 levels deep; no key is so deep."),
        ("a: " + "{b: " * 30, "is nested more than 20 levels deep"),
        ("a: [1, 2\nb: 3\n", "is not valid YAML (line 2, column 2: expected ',' or ']', but got ':'); mend that line."),
        ("a: 1\n---\nb: 2\n", "is not valid YAML (line 2, column 1: but found another document); mend that line."),
        ("a: =\n", "is not valid YAML (line 1, column 4: could not determine a constructor"),
        ("a: \x00\n", "is not valid YAML (unacceptable character #x0000"),
        (b"a: 1\nb: \xff\n", "is not UTF-8 (byte 0xff in line 2); save it in UTF-8, as editors name it."),
        ("a: 1".encode("utf-16"), "is not UTF-8 (byte 0xff in line 1)"),
        (b"\x00" * 100, "is not valid YAML (unacceptable character"),
        ("# x\n" * (LONGEST_BYTES // 4 + 1), "is longer than 64 KiB, so it is no configuration; give another."),
    ],
)
def test_what_could_be_overlooked_or_exhausts_is_refused(tmp_path: Path, content: bytes | str, sentence: str) -> None:
    assert sentence in refusal(content, tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: [1, 2.5, x, true, null]", {"a": [1, 2.5, "x", True, None]}),
        ("a: '2024-01-31'\nb: \"12:30\"", {"a": "2024-01-31", "b": "12:30"}),
        ("a: 0\nb: -0x10\nc: 1_000", {"a": 0, "b": -16, "c": 1000}),
        ("'1': a\n'on': b", {"1": "a", "on": "b"}),
        (f"a: {2**63 - 1}", {"a": 2**63 - 1}),
    ],
)
def test_plain_data_is_read_as_it_stands(text: str, value: object) -> None:
    assert parse_yaml(text, "test") == value


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "file.yaml", "config file", "another") == {"a": 1}


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: f / "gone.yaml", r"^config file '.*gone\.yaml' does not exist; give another\.$"),
        (lambda f: f, r"^config file '.*' is a folder; give another\.$"),
        (fifo, r"pipe' is a device or a pipe, which can be read only once; give another\.$"),
        (lambda f: Path("/dev/zero"), r"^config file '/dev/zero' is a device or a pipe"),
        (lambda f: f / ("x" * 300), r"cannot be read \(File name too long\); give another\.$"),
        (lambda f: f / ("x/" * 5000), r"cannot be read \(File name too long\)"),
        (lambda f: Path("a\0b"), r"is no path; give another\.$"),
        (lambda f: loop(f), r"cannot be read \(Too many levels of symbolic links\)"),
    ],
    ids=["missing", "folder", "pipe", "device", "long", "deep", "zero", "loop"],
)
def test_what_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], Path], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_yaml(make(tmp_path), "config file", "another")
    assert len(str(caught.value)) <= 600


def loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


@pytest.mark.parametrize("read", [load_config, load_cluster, load_recipe], ids=lambda f: f.__name__)
def test_every_file_of_ours_is_read_through_the_boundary(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match=r"line 2, gives the key 'a' a second time \(first in line 1\)"):
        read(path)
