"""Configuration of a folder in SDAR's layout, for readers that ask transformers' AutoConfig for it, as JetEngine does.

Every key of config.json becomes an attribute; the model's own class is SDAR's and not part of the folder.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    """A Qwen3-shaped block-diffusion model.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as everywhere.
        num_key_value_heads: heads of keys and values.
        head_dim: width of one head.
        block_size: tokens of a diffusion block.
        mask_token_id: id of the mask token.
        rope_theta: base of the rotary frequencies.
        kwargs: the other keys of config.json.
    """

    model_type = "sdar"
    keys_to_ignore_at_inference = ["past_key_values"]
    # engines ask for it, and transformers 5 warns of it where it is set
    rope_scaling = None

    def __init__(
        self,
        *,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        block_size: int = 4,
        mask_token_id: int = 151669,
        rope_theta: float = 1000000.0,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("rope_scaling", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        # after the base class: transformers 4 and 5 keep different ones of these there
        self.tie_word_embeddings = tie_word_embeddings
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.rope_theta = rope_theta


class SDARMoeConfig(SDARConfig):
    """The same model with experts, as Qwen3-MoE has them; its keys too become attributes."""

    model_type = "sdar_moe"
