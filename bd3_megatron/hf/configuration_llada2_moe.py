"""Configuration of a folder in LLaDA2's layout, for readers that ask transformers' AutoConfig for it.

Every key of config.json becomes an attribute; the model's own class is LLaDA2's and not part of the folder.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class LLaDA2MoeConfig(PretrainedConfig):
    """A mixture of experts for block diffusion, as config.json describes it.

    Args:
        num_hidden_layers, hidden_size, num_attention_heads: as everywhere; transformers itself asks for them.
        tie_word_embeddings: one table for input and output.
        kwargs: the other keys of config.json.
    """

    model_type = "llada2_moe"
    keys_to_ignore_at_inference = ["past_key_values"]
    # engines ask for it, and transformers 5 warns of it where it is set
    rope_scaling = None

    def __init__(
        self,
        *,
        num_hidden_layers: int = 20,
        hidden_size: int = 2048,
        num_attention_heads: int = 16,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("rope_scaling", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        # after the base class: transformers 4 and 5 keep different ones of these there
        self.tie_word_embeddings = tie_word_embeddings
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
