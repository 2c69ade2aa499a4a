"""An exported folder from outside is sampled from, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bd3_megatron.errors import CheckpointError
from bd3_megatron.sampling.generate import Sampler
from tests.json_mutations import num_refused
from tests.unit.sampling.folders import exported


def test_a_changed_configuration_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    path = exported(tmp_path / "out") / "config.json"

    def read(tree: dict[str, Any]) -> None:
        path.write_text(json.dumps(tree))
        Sampler.from_pretrained(path.parent).generate([[2, 3]], num_tokens=2)

    assert 5 < num_refused(json.loads(path.read_text()), "export", 30, read) < 30


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"hidden_size": 32},
            r"holds weights of another model \(.* is \[.*\] in the file and \[.*\] by the configuration\)",
        ),
        ({"vocab_size": 10**9}, "holds weights of another model"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers=1000000000 is not a whole number from 1 to 10000; correct it",
        ),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\] is not a token id or null"),
        ({"torch_dtype": "x"}, "config.json is not a model's: "),
    ],
)
def test_a_configuration_of_another_model_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = exported(tmp_path / "out") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=sentence):
        Sampler.from_pretrained(path.parent)


def test_an_index_that_names_no_files_is_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": [1]}}))
    with pytest.raises(CheckpointError, match="names files that are no text; export the folder again"):
        Sampler.from_pretrained(folder)
