"""The configuration refuses shapes that no model can have, and says what it fixes."""

from __future__ import annotations

from typing import Any

import pytest

from bd3_megatron.hf.configuration_bd3 import BD3Config
from tests.unit.hf.models import tiny_config


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"style": "baroque"}, "style='baroque' is unknown; use one of paper, modern"),
        ({"objective": "gan"}, "objective='gan' is unknown; use one of block, ar"),
        ({"mask_token_id": 21}, "mask_token_id=21 is outside the vocabulary; use 0 to 20"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"head_dim": 5}, "head_dim=5 is not a positive even number"),
        ({"block_size": 5}, "block_size=5 does not divide max_position_embeddings=32"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny_config(**fields)


def test_a_configuration_survives_its_own_json() -> None:
    config = tiny_config()
    again = BD3Config(**config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_the_semantic_switches_are_written_down() -> None:
    assert tiny_config().logit_alignment == "none"
    assert tiny_config(block_size=1, objective="ar").logit_alignment == "shifted"
    assert (tiny_config().prefix_attention, tiny_config().block_grid) == ("block_causal", "absolute")
