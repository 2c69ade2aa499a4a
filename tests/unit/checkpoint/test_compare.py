"""Differences are found, named and measured."""

from __future__ import annotations

from pathlib import Path

import torch

from bd3_megatron.checkpoint.compare import differences, facts, manifest_differences, only_in_one
from bd3_megatron.checkpoint.read import WholeReader, open_checkpoint
from tests.unit.convert.models import run_config, whole_checkpoint

NAME = "decoder.layers.1.mlp.linear_fc2.weight"


class Changed(WholeReader):
    """A checkpoint one of whose parameters is another."""

    def tensor(self, name: str, which: str = "model") -> torch.Tensor:
        tensor = super().tensor(name, which)
        return tensor * 1.5 if name == NAME else tensor


def test_one_changed_parameter_is_named_and_measured(tmp_path: Path) -> None:
    path = whole_checkpoint(tmp_path / "a", run_config(tmp_path))
    reader = open_checkpoint(path)
    found = {d.name: d for d in differences(reader, Changed(path, reader.manifest), "model")}
    assert [name for name, difference in found.items() if difference.largest] == [NAME]
    assert abs(found[NAME].relative - 0.5) < 1e-6
    assert not [d for d in differences(reader, reader, "model") if d.largest or d.relative]


def test_other_shapes_and_settings_are_named(tmp_path: Path) -> None:
    one = open_checkpoint(whole_checkpoint(tmp_path / "a", run_config(tmp_path)))
    other = open_checkpoint(
        whole_checkpoint(tmp_path / "b", run_config(tmp_path, model={"tie_embeddings": True}), step=4)
    )
    assert only_in_one(one, other) == ["output_layer.weight"]
    assert manifest_differences(one.manifest, other.manifest) == [
        "step: 3 -> 4",
        "config model.tie_embeddings: False -> True",
    ]


def test_facts_count_what_is_not_finite(tmp_path: Path) -> None:
    reader = open_checkpoint(whole_checkpoint(tmp_path / "a", run_config(tmp_path)))
    for fact in facts(reader, "model"):
        assert fact.num_not_finite == 0 and 0 < fact.largest <= fact.norm
