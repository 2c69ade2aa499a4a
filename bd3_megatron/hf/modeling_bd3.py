"""The transformers wrapper: what AutoModel, AutoModelForMaskedLM and AutoModelForCausalLM load from a folder.

Contract: `model(input_ids=noisy, context_ids=clean).logits` are the raw [B, L, V] logits of the noisy half; without
`context_ids` the ids are one sequence under the block-causal rule. Names, masks and labels that the model cannot honour
are refused in a sentence. Loads under transformers 4.5x and 5.x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, MaskedLMOutput

# transformers 4.x copies only the files that this one names itself, not the files those import: name them all.
from .attention_bd3 import grouped_attention  # noqa: F401
from .block_state_bd3 import BlockState  # noqa: F401
from .cache_bd3 import KeyValueCache  # noqa: F401
from .configuration_bd3 import BD3Config
from .decoding_options_bd3 import DecodingOptions  # noqa: F401
from .decoding_rules_bd3 import DecodingRule  # noqa: F401
from .draws_bd3 import SampleDraws  # noqa: F401
from .forward_bd3 import EagerForward  # noqa: F401
from .generation_bd3 import Decoder  # noqa: F401
from .hf_generate_bd3 import Streamer, binary_mask, generate_rows
from .mlp_bd3 import ExpertMlp  # noqa: F401
from .philox import uniform  # noqa: F401
from .plain_bd3 import CHECKPOINT, Stack, Trace, new_head, pair_hidden, predicts_next
from .text_bd3 import Decodes
from .token_choice_bd3 import TokenFilters  # noqa: F401
from .window_bd3 import Window  # noqa: F401

FORWARD_NAMES = (
    *("input_ids", "context_ids", "document_ids", "attention_mask", "labels"),
    *("output_hidden_states", "output_attentions", "return_dict"),
)


class BD3PreTrainedModel(PreTrainedModel):
    """What transformers must know of every class here."""

    config_class = BD3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012 - transformers reads class attributes
    # transformers' trainer would otherwise hand every loss a num_items_in_batch
    accepts_loss_kwargs = False


class BD3Model(BD3PreTrainedModel):
    """The layers without an output table; weights are named as in the folder without the prefix `model.`."""

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor] = CHECKPOINT

    def __init__(self, config: BD3Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        stack = Stack(config)
        # Under the plain model's names, so that both read the same files.
        self.embed_tokens, self.layers, self.norm = stack.embed_tokens, stack.layers, stack.norm
        self.post_init()

    @property
    def shape(self) -> BD3Config:
        """The configuration, under the name that the layers' runner asks for."""
        return self.config

    def get_input_embeddings(self) -> Any:
        """The token table."""
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token table."""
        self.embed_tokens = value

    def hidden(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None,
        document_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        trace: Trace,
    ) -> Tensor:
        """Normed hidden states [B, L, D]; padding (attention_mask 0) is a document of its own, which no text sees."""
        check_rows(input_ids, document_ids)
        positions = None
        if attention_mask is not None:
            is_text_BL = binary_mask(attention_mask, input_ids)
            documents = torch.zeros_like(input_ids) if document_ids is None else document_ids
            # Ids of documents are 0 or more, so -1 is nobody's.
            document_ids = documents.masked_fill(~is_text_BL, -1)
            # positions and blocks are counted from the first token of the text: padding in front moves nothing
            positions = (is_text_BL.cumsum(dim=1) - 1).clamp(min=0)
        return pair_hidden(self, input_ids, context_ids, document_ids, position_BL=positions, trace=trace)

    def forward(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """Hidden states behind the final norm, `last_hidden_state` [B, L, D]; arguments as in `BD3ForMaskedLM.forward`."""
        refuse_unknown(kwargs)
        trace = new_trace(self.config, output_hidden_states, output_attentions)
        hidden = self.hidden(input_ids, context_ids, document_ids, attention_mask, trace=trace)
        output = BaseModelOutput(last_hidden_state=hidden, **kept(trace))
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


class BD3LanguageModel(BD3PreTrainedModel, GenerationMixin):
    """What both heads share: the layers, the output table, and text by block decoding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BD3Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.model = BD3Model(config)
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

    # transformers' own signature has a dozen arguments that are refused here
    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
        tokenizer: Decodes | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue every row of `input_ids`, block after block.

        Args:
            inputs, input_ids: int64 [B, P], text of at most the trained length; None = the BOS token. Mask tokens in the
                last block of the text are filled.
            generation_config: None = the model's own.
            attention_mask: 0 or 1 [B, P]; 0 = padding.
            seed: of the draws; None = that of torch's last manual_seed, which `transformers.set_seed` calls.
            streamer: shown the tokens of every block, for one row.
            tokenizer: needed by stop_strings.
            options: fields of a generation configuration (max_new_tokens, max_length, do_sample, temperature, top_k, top_p,
                min_p, repetition_penalty, num_return_sequences, eos_token_id, pad_token_id, stop_strings), and of
                `DecodingOptions`: rule, steps, threshold, entropy_bound, window, stop_at_eos (default: where there is an
                EOS token).

        Returns:
            int64 [B * num_return_sequences, P + new]: the given columns, then new tokens, then padding where texts end
            early.

        Raises:
            ValueError: an argument that cannot be honoured.
        """
        given = inputs if input_ids is None else input_ids
        # Dropout must be off while text is made; the caller's mode comes back after it.
        was_training = self.training
        self.eval()
        try:
            return generate_rows(
                self.model,
                self.lm_head,
                self.config,
                given,
                generation_config=self.generation_config if generation_config is None else generation_config,
                # None asks for nothing, as transformers' own arguments have it.
                asked={name: value for name, value in options.items() if value is not None},
                attention_mask=attention_mask,
                seed=seed,
                streamer=streamer,
                tokenizer=tokenizer,
            )
        finally:
            self.train(was_training)


class BD3ForMaskedLM(BD3LanguageModel):
    """Block-diffusion denoiser: logits of a position predict that position."""

    def forward(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Raw logits of the noisy half.

        Args:
            input_ids: int64 [B, L]; noisy tokens when `context_ids` is given, else one block-causal sequence.
            context_ids: int64 [B, L] clean tokens.
            document_ids: int64 [B, L], >= 0; positions of different documents never see each other.
            attention_mask: 0 or 1 [B, L]; 0 marks padding. Positions and blocks are counted over the text alone.
            labels: int64 [B, L]; -100 where no loss is wanted. The loss is the plain mean cross entropy in fp32, without
                the weights of the diffusion bound.
            output_hidden_states: also give the embeddings and every layer's result, each [B, L, D] of the noisy half.
            output_attentions: also give every layer's attention weights [B, heads, L, keys].
            return_dict: False gives a tuple.

        Returns:
            `logits` [B, L, V] in the model's dtype, and `loss` when labels are given.

        Raises:
            ValueError: a soft mask, another shape, labels where the input is not masked, or an unknown name.
        """
        refuse_unknown(kwargs)
        if labels is not None:
            check_labels(labels, input_ids, self.config)
        trace = new_trace(self.config, output_hidden_states, output_attentions)
        logits = self.lm_head(self.model.hidden(input_ids, context_ids, document_ids, attention_mask, trace=trace))
        loss = None if labels is None else mean_cross_entropy(logits, labels)
        output = MaskedLMOutput(loss=loss, logits=logits, **kept(trace))
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


class BD3ForCausalLM(BD3LanguageModel):
    """The same weights under the name that text-generation tools ask for; next-token logits with objective="ar" only."""

    def forward(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """With objective="ar" the logits of a position predict the next one; arguments as in `BD3ForMaskedLM.forward`.

        Raises:
            ValueError: the model predicts blocks and neither a clean half was given nor text asked for: whoever calls a
                causal model so shifts its logits, and these must not be shifted.
        """
        refuse_unknown(kwargs)
        if not predicts_next(self.config.objective) and (context_ids is None or labels is not None):
            raise ValueError(
                "this model predicts blocks: its logits belong to their own position, and a tool that takes them for "
                "next-token logits would read them wrongly; use AutoModelForMaskedLM for logits and labels, "
                "`bd3 evaluate` for likelihoods, and generate() for text."
            )
        trace = new_trace(self.config, output_hidden_states, output_attentions)
        logits = self.lm_head(self.model.hidden(input_ids, context_ids, document_ids, attention_mask, trace=trace))
        # Shifted here: the logits of a position predict the token after it.
        loss = None if labels is None else mean_cross_entropy(logits[:, :-1], labels[:, 1:])
        output = CausalLMOutput(loss=loss, logits=logits, **kept(trace))
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


def refuse_unknown(given: dict[str, Any]) -> None:
    """Refuse names that nobody here listens to; a name without a value asks for nothing.

    Raises:
        ValueError: the name, and the known ones.
    """
    for name, value in given.items():
        # use_cache=True asks for keys to be returned where there are some; a pass over a pair has none
        if value is None or value is False or name == "use_cache":
            continue
        raise ValueError(f"forward got {name}, which it does not know; use {', '.join(FORWARD_NAMES)}.")


def check_rows(input_ids: Tensor, document_ids: Tensor | None) -> None:
    """Refuse ids that are no rows of tokens, and documents that would be broadcast or taken for padding.

    Raises:
        ValueError: the shape or the values, and what is wanted.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids have shape {list(input_ids.shape)}; give token ids [rows, columns].")
    if document_ids is None:
        return
    is_whole = not document_ids.is_floating_point() and document_ids.shape == input_ids.shape
    # below 0 lies the padding's own document
    if not is_whole or bool((document_ids < 0).any()):
        raise ValueError(
            f"document_ids are {document_ids.dtype} {list(document_ids.shape)} for input_ids {list(input_ids.shape)}; "
            "give one whole number from 0 on a token."
        )


def check_labels(labels: Tensor, input_ids: Tensor, config: BD3Config) -> None:
    """Refuse a loss on tokens that the model is shown.

    Raises:
        ValueError: another shape, or how many labels stand where the input is not masked.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)} and input_ids {list(input_ids.shape)}; give one label a token."
        )
    # An autoregressive model never sees the token that it predicts.
    if predicts_next(config.objective):
        return
    num_shown = int(((labels != -100) & (input_ids != config.mask_token_id)).sum())
    if num_shown:
        raise ValueError(
            f"{num_shown} labels stand where the input is not masked: the model is shown those tokens, and their loss says "
            f"nothing; put mask_token_id={config.mask_token_id} into input_ids there, or -100 into labels."
        )


def new_trace(config: BD3Config, hidden_states: bool | None, attentions: bool | None) -> Trace:
    """What a forward must keep; None: as the configuration says."""
    wants_states = config.output_hidden_states if hidden_states is None else hidden_states
    wants_weights = config.output_attentions if attentions is None else attentions
    return Trace([] if wants_states else None, {} if wants_weights else None)


def kept(trace: Trace) -> dict[str, Any]:
    """What a forward has kept, by the names of transformers' outputs."""
    states, weights = trace.hidden_states, trace.attentions
    return {
        "hidden_states": None if states is None else tuple(states),
        "attentions": None if weights is None else tuple(weights[layer] for layer in sorted(weights)),
    }


def wants_dict(config: BD3Config, return_dict: bool | None) -> bool:
    """Whether a call wants an output object."""
    return bool(config.return_dict if return_dict is None else return_dict)


def mean_cross_entropy(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats over labels other than -100, in fp32 or better."""
    wide = logits_BLV if logits_BLV.element_size() > 4 else logits_BLV.float()
    return F.cross_entropy(wide.flatten(0, 1), labels_BL.flatten())
