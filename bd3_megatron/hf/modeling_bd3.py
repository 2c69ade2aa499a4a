"""The transformers wrapper: what `AutoModelForMaskedLM` and `AutoModelForCausalLM` load from an exported folder.

Decides how the plain model answers the Hugging Face call: `model(input_ids=noisy, context_ids=clean).logits` are the
raw [B, L, V] logits of the noisy half (before the SUBS rule); without `context_ids` the ids are one sequence under the
block-causal rule. Works with transformers 4.5x and 5.x: `post_init` is called, tied weights are declared as a mapping
(read as a list of keys by 4.x), and no buffer exists that could stay on the meta device. Refuses soft attention masks
and cached keys; the decoding engine behind `generate` has its own cache.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

# transformers 4.x copies only the files that this one names itself, not the files those import: name them all.
from .block_state_bd3 import BlockState  # noqa: F401
from .cache_bd3 import KeyValueCache  # noqa: F401
from .configuration_bd3 import BD3Config
from .decoding_options_bd3 import DecodingOptions  # noqa: F401
from .decoding_rules_bd3 import DecodingRule  # noqa: F401
from .draws_bd3 import SampleDraws  # noqa: F401
from .forward_bd3 import EagerForward  # noqa: F401
from .generation_bd3 import Decoder  # noqa: F401
from .hf_generate_bd3 import generate_rows
from .philox import uniform  # noqa: F401
from .plain_bd3 import Stack, new_head, predicts_next
from .token_choice_bd3 import TokenFilters  # noqa: F401
from .window_bd3 import Window  # noqa: F401


class BD3PreTrainedModel(PreTrainedModel):
    """What both heads share: the stack, the output table and the call."""

    config_class = BD3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 - transformers reads class attributes
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BD3Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.model = Stack(config)
        self.lm_head = new_head(config)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """The token table."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token table."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> Any:
        """The output table."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the output table."""
        self.lm_head = new_embeddings

    def noisy_logits(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None,
        document_ids: Tensor | None,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """Raw logits [B, L, V]; padding (attention_mask 0) is a document of its own, which no token sees."""
        documents = document_ids
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)} and input_ids {list(input_ids.shape)}; "
                    "give one 0 or 1 a token."
                )
            real_BL = attention_mask.to(input_ids.dtype)
            documents = real_BL - 1 if documents is None else documents * real_BL + (real_BL - 1)
        return self.lm_head(self.model(input_ids, context_ids, documents))

    def generate(self, inputs: Tensor | None = None, *, input_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Continue every row of `input_ids`, block after block.

        Args:
            inputs, input_ids: int64 [B, P], P at most the trained length; None = the BOS token.
            options: exactly one of max_new_tokens, num_tokens, max_length; attention_mask (0 = padding), seed (default:
                that of torch's last manual_seed), num_return_sequences, do_sample (False = temperature 0), and every
                field of `DecodingOptions`: rule, steps, threshold, entropy_bound, temperature, top_p, top_k, min_p,
                repetition_penalty, window, stop_at_eos.

        Returns:
            int64 [B * num_return_sequences, P + new], right-padded where texts end early.

        Raises:
            ValueError: an unknown option, or one outside its range.
        """
        given = inputs if input_ids is None else input_ids
        was_training = self.training
        self.eval()
        try:
            return generate_rows(self.model, self.lm_head, self.config, given, **options)
        finally:
            self.train(was_training)


class BD3ForMaskedLM(BD3PreTrainedModel):
    """Block-diffusion denoiser: logits of a position predict that position."""

    def forward(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Raw logits of the noisy half.

        Args:
            input_ids: int64 [B, L]; noisy tokens when `context_ids` is given, else one block-causal sequence.
            context_ids: int64 [B, L] clean tokens.
            document_ids: int64 [B, L], >= 0; positions of different documents never see each other.
            attention_mask: 0 or 1 [B, L]; 0 marks padding.
            labels: int64 [B, L]; -100 where no loss is wanted. The loss is the plain mean cross entropy in fp32, without
                the weights of the diffusion bound.
            return_dict: False gives a tuple.

        Returns:
            `logits` [B, L, V] in the model's dtype, and `loss` when labels are given.
        """
        logits = self.noisy_logits(input_ids, context_ids, document_ids, attention_mask)
        loss = None if labels is None else mean_cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return MaskedLMOutput(loss=loss, logits=logits)


class BD3ForCausalLM(BD3PreTrainedModel):
    """The same weights under the name that text-generation tools ask for; labels are shifted only for objective="ar"."""

    def forward(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """As `BD3ForMaskedLM.forward`; with objective="ar" the logits of a position predict the next one."""
        logits = self.noisy_logits(input_ids, context_ids, document_ids, attention_mask)
        loss = None
        if labels is not None and predicts_next(self.config.objective):
            loss = mean_cross_entropy(logits[:, :-1], labels[:, 1:])
        elif labels is not None:
            loss = mean_cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def mean_cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats over labels other than -100, in fp32 or better."""
    wide = logits_BLV if logits_BLV.element_size() > 4 else logits_BLV.float()
    return F.cross_entropy(wide.flatten(0, 1), labels_BL.flatten())
