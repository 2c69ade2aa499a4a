"""Our classes under transformers' own common tests; `common_host.py` puts this file beside them, where `tests` is theirs."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.modeling_bd3 import BD3ForCausalLM, BD3ForMaskedLM, BD3Model

from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor

VOCAB, MASK = 99, 98


class TinyInputs:
    """What the common tests ask a model's own tester for."""

    def __init__(self, parent: unittest.TestCase, objective: str) -> None:
        self.parent, self.objective, self.is_training = parent, objective, True
        self.batch_size, self.seq_length, self.vocab_size = 4, 8, VOCAB
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        self.key_length = self.encoder_seq_length = self.decoder_seq_length = self.seq_length

    def get_config(self) -> BD3Config:
        is_block = self.objective == "block"
        return BD3Config(
            vocab_size=VOCAB,
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=37,
            max_position_embeddings=64,
            block_size=4 if is_block else 1,
            mask_token_id=MASK if is_block else None,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            objective=self.objective,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[BD3Config, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], MASK - 1)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Common(ModelTesterMixin):
    """What both objectives share. The body has no loss, so tests that train take the classes with a head."""

    objective = "block"
    all_generative_model_classes = ()

    def setUp(self) -> None:  # noqa: N802
        self.model_tester = TinyInputs(self, self.objective)
        names = ["hidden_size", "num_attention_heads", "num_hidden_layers"]
        self.config_tester = ConfigTester(self, config_class=BD3Config, hidden_size=32, common_properties=names)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _prepare_for_class(
        self, inputs: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        made = super()._prepare_for_class(inputs, model_class, return_labels=False)
        if return_labels and model_class is not BD3Model:
            made["labels"] = made["input_ids"].clone()
            # labels on visible tokens are refused: a loss needs masks
            if model_class is BD3ForMaskedLM:
                made["input_ids"] = torch.full_like(made["input_ids"], MASK)
        return made

    @contextmanager
    def _heads(self) -> Iterator[None]:
        kept, self.all_model_classes = self.all_model_classes, self.all_model_classes[1:]
        try:
            yield
        finally:
            self.all_model_classes = kept

    def test_training(self) -> None:
        with self._heads():
            super().test_training()

    def check_training_gradient_checkpointing(self, **options: Any) -> None:
        with self._heads():
            super().check_training_gradient_checkpointing(**options)


class BlockTest(Common, unittest.TestCase):
    all_model_classes = (BD3Model, BD3ForMaskedLM)


class NextTokenTest(Common, unittest.TestCase):
    objective = "ar"
    all_model_classes = (BD3Model, BD3ForCausalLM)
