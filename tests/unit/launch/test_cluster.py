"""Cluster profiles: what they alone can refute, and what sbatch would read otherwise, is refused by the key's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.errors import BD3Error, ConfigError, LaunchError
from launch.cluster import load_cluster, seconds_of


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("ranks_per_node: 2\n", ConfigError, r"^cluster\.partition is not set and has no default"),
        (
            "partition: a\npartitoin: b\n",
            ConfigError,
            r"^unknown key cluster\.partitoin; did you mean cluster\.partition\?$",
        ),
        ("partition: [\n", ConfigError, r"is not valid YAML"),
        (
            "partition: a\n",
            LaunchError,
            r"^cluster\.gpus_per_node=0 and cluster\.ranks_per_node=None leave a node without ranks",
        ),
        (
            "partition: a\ngpus_per_node: 4\nranks_per_node: 8\n",
            LaunchError,
            r"^cluster\.ranks_per_node=8 exceeds gpus_per_node=4",
        ),
        (
            "partition: a\nranks_per_node: 1\ncpus_per_rank: 0\n",
            ConfigError,
            r"^cluster\.cpus_per_rank=0 is outside \[1",
        ),
        (
            "partition: a\nranks_per_node: 1\ncontainer: {kind: pyxis}\n",
            LaunchError,
            r"without an image; set cluster\.container\.image\.$",
        ),
        (
            "partition: a\nranks_per_node: 1\ncontainer: {kind: docker}\n",
            ConfigError,
            r"use none, pyxis or apptainer\.$",
        ),
    ],
)
def test_a_bad_profile_is_refused(tmp_path: Path, text: str, kind: type[BD3Error], sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(kind, match=sentence):
        load_cluster(path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "partition: a b",
            r"^cluster\.partition='a b' is not a name of letters, digits and \. , @ \+ _ -; give one\.$",
        ),
        ("partition: '-x'", r"^cluster\.partition='-x' is not a name"),
        ('partition: "a\\nb"', r"^cluster\.partition='a\\nb' is not a name"),
        ("account: 'a;b'", r"^cluster\.account='a;b' is not a name"),
        ("qos: ''", r"^cluster\.qos='' is not a name"),
        ("constraint: 'a b'", r"^cluster\.constraint='a b' is not node features joined by & or \|; give one\.$"),
        ("gpu_type: 'a100:4 '", r"^cluster\.gpu_type='a100:4 ' is not a name"),
        ("exclude: 'n1 n2'", r"^cluster\.exclude='n1 n2' is not a list of nodes such as n\[3,7\]; give one\.$"),
        ("mail_user: 'a b'", r"^cluster\.mail_user='a b' is not one mail address"),
        ("modules: ['a b']", r"^cluster\.modules\[0\]='a b' is not one module's name"),
        (
            "environment: {'A-B': x}",
            r"^cluster\.environment='A-B' is not a variable's name: letters, digits and _; give one\.$",
        ),
        (
            "environment: {PATH: ' '}",
            r"^cluster\.environment\.PATH=' ' is empty, and the job would find no program; give its value, or leave it out\.$",
        ),
        ("environment: {HOME: ''}", r"^cluster\.environment\.HOME='' is empty, and the job would find no home folder"),
        ("environment_file: ~/secrets", r"^cluster\.environment_file='~/secrets' begins with ~"),
        (
            "extra: [comment]",
            r"^cluster\.extra\[0\]='comment' is not an option of sbatch such as --comment=text, without quotes",
        ),
        ("memory_gb: 500G", r"^cluster\.memory_gb='500G' is not a whole number"),
        ("memory_gb: -1", r"^cluster\.memory_gb=-1 is outside \[0, 1e6\]"),
        ("signal_lead_seconds: 70000", r"^cluster\.signal_lead_seconds=70000 is outside \[1, 65535\]"),
        ("time: 12:00:00", r"line 3, holds '12:00:00', which YAML reads as a number of base 60; put it in quotes\.$"),
        ("container: {kind: pyxis, image: 'a b'}", r"^cluster\.container\.image='a b' is not an image without blanks"),
        (
            "container: {mounts: [data]}",
            r"^cluster\.container\.mounts\[0\]='data' is not a mount /host:/container; give one\.$",
        ),
    ],
)
def test_what_sbatch_would_not_read_is_refused(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "bad.yaml"
    base = "ranks_per_node: 2\n" if line.startswith("partition") else "partition: a\nranks_per_node: 2\n"
    path.write_text(f"{base}{line}\n")
    with pytest.raises(ConfigError, match=sentence):
        load_cluster(path)


def test_a_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cluster profile '.*none\.yaml' does not exist; give a copy of one of configs/cluster/"
    ):
        load_cluster(tmp_path / "none.yaml")


@pytest.mark.parametrize(("limit", "seconds"), [("00:10:00", 600), ("24:00:00", 86400), ("1-12:00:30", 129630)])
def test_time_limits_are_read_as_slurm_reads_them(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds
