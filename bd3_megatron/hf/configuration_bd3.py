"""Configuration of an exported block-diffusion model, as Hugging Face users load it.

Decides the names and defaults of config.json, and refuses shapes that no layer could be built from. Token ids have no
guessed defaults: a model without a mask token id is refused, except for the autoregressive objective, which has none.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

STYLES = ("paper", "modern")
SCORES = ("softmax", "sigmoid")
WHOLE_NUMBERS = {
    "vocab_size": 2**31,
    "num_hidden_layers": 10_000,
    "hidden_size": 2**20,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 10_000,
    "intermediate_size": 2**24,
    "max_position_embeddings": 2**31,
    "block_size": 2**31,
}
"""Field -> its greatest value; the least is 1."""
NUMBERS = {
    "layer_norm_eps": (1e-12, 0.1),
    "rope_theta": (1.0, 1e12),
    "residual_dropout": (0.0, 1.0),
    "initializer_range": (0.0, 1.0),
}
"""Field -> its least and greatest value."""
TOKEN_IDS = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
LOGIT_ALIGNMENTS = {"block": "none", "ar": "shifted"}
"""Objective -> which row of the logits predicts a token: its own, or the row before."""


class BD3Config(PretrainedConfig):
    """Shape and meaning of one model.

    Args:
        vocab_size: rows of the embedding and head tables, the mask token included.
        style: "paper" (LayerNorm with bias, tanh-GELU MLP with bias, head with bias) or "modern" (RMSNorm, SwiGLU, no bias).
        num_hidden_layers, hidden_size, num_attention_heads: as everywhere.
        num_key_value_heads: heads of keys and values; divides num_attention_heads. None = num_attention_heads.
        head_dim: even width of one head. None = hidden_size / num_attention_heads.
        intermediate_size: width of the MLP. None = 4 * hidden_size.
        qk_norm: RMSNorm over head_dim on queries and keys, before the rotation.
        layer_norm_eps: epsilon of every norm.
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: the trained length L in tokens, a multiple of block_size.
        block_size: tokens S of a diffusion block; 1 for the autoregressive objective.
        mask_token_id: id of the mask token; None only with objective="ar".
        objective: "block" (logits of a position predict that position) or "ar" (they predict the next one).
        residual_dropout: probability on both residual branches in training mode; 0 in exported folders.
        initializer_range: standard deviation of fresh weights.
        partial_rotary_factor: share of a head's first channels that positions turn.
        num_experts: routed experts of a layer; 0: dense.
        num_experts_per_tok, moe_intermediate_size: experts that compute a row, and the inner width of each.
        shared_expert_intermediate_size: inner width of the expert that computes every row; 0: none.
        first_k_dense_replace: first layers with a dense MLP.
        score_function, norm_topk_prob, n_group, topk_group, routed_scaling_factor, router_bias: see `mlp_bd3.py`.
        evaluation: how the model's likelihood was measured in training (rows, counted tokens, smallest noise level), so
            that it can be measured alike; None: not recorded.
        tokenizer_fingerprint: which tokenizer made the ids that the model learned, 64 hex digits; None: not recorded.

    Raises:
        ValueError: a style, objective, head count, width, block size or mask token id that no model can have.
    """

    model_type = "bd3"

    def __init__(
        self,
        *,
        vocab_size: int = 50258,
        style: str = "modern",
        num_hidden_layers: int = 12,
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        qk_norm: bool = False,
        tie_word_embeddings: bool = False,
        layer_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 1024,
        block_size: int = 16,
        mask_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        objective: str = "block",
        residual_dropout: float = 0.0,
        initializer_range: float = 0.02,
        partial_rotary_factor: float = 1.0,
        num_experts: int = 0,
        num_experts_per_tok: int = 0,
        moe_intermediate_size: int = 0,
        shared_expert_intermediate_size: int = 0,
        first_k_dense_replace: int = 0,
        score_function: str = "softmax",
        norm_topk_prob: bool = True,
        n_group: int = 1,
        topk_group: int = 1,
        routed_scaling_factor: float = 1.0,
        router_bias: bool = False,
        evaluation: dict[str, Any] | None = None,
        tokenizer_fingerprint: str | None = None,
        **kwargs: Any,
    ) -> None:
        # written by this class and read back by transformers: they follow from the objective, never from the file
        for fixed in ("logit_alignment", "prefix_attention", "block_grid"):
            kwargs.pop(fixed, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        # transformers 5 no longer keeps it in the base class, 4.x overwrites it there: set it after both
        self.tie_word_embeddings = tie_word_embeddings
        self.vocab_size = vocab_size
        self.style = style
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        # The error about heads is raised below, with a sentence; here nothing may divide by 0.
        self.head_dim = hidden_size // max(num_attention_heads, 1) if head_dim is None else head_dim
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.qk_norm = qk_norm
        self.layer_norm_eps = layer_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.objective = objective
        self.residual_dropout = residual_dropout
        self.initializer_range = initializer_range
        self.partial_rotary_factor = partial_rotary_factor
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.first_k_dense_replace = first_k_dense_replace
        self.score_function = score_function
        self.norm_topk_prob = norm_topk_prob
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.router_bias = router_bias
        self.evaluation = evaluation
        self.tokenizer_fingerprint = tokenizer_fingerprint
        # The three semantic switches in which engines that serve block-diffusion models differ: each is written into the
        # file, so that a reader need not guess.
        self.logit_alignment = LOGIT_ALIGNMENTS.get(objective)
        self.prefix_attention = "block_causal"
        self.block_grid = "absolute"
        self._check_values()
        self._check_names()
        self._check_shapes()
        self._check_experts()

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that positions turn."""
        return round(self.head_dim * self.partial_rotary_factor)

    def _check_values(self) -> None:
        """Types and ranges, because config.json comes from outside."""
        for name, greatest in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            self._check(name, f"a whole number from 1 to {greatest}", type(value) is int and 1 <= value <= greatest)
        for name, (low, high) in NUMBERS.items():
            value = getattr(self, name)
            self._check(
                name, f"a number from {low:g} to {high:g}", type(value) in (int, float) and low <= value <= high
            )
        for name in TOKEN_IDS:
            value = getattr(self, name)
            self._check(name, "a token id or null", value is None or (type(value) is int and 0 <= value < 2**31))
        for name in ("qk_norm", "tie_word_embeddings"):
            self._check(name, "true or false", type(getattr(self, name)) is bool)
        fingerprint = self.tokenizer_fingerprint
        self._check("tokenizer_fingerprint", "text or null", fingerprint is None or isinstance(fingerprint, str))
        self._check("evaluation", "an object or null", self.evaluation is None or isinstance(self.evaluation, dict))

    def _check(self, name: str, law: str, is_right: bool) -> None:  # noqa: FBT001
        if not is_right:
            raise ValueError(f"{name}={getattr(self, name)!r:.80} is not {law}; correct it.")

    def _check_names(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style={self.style!r:.80} is unknown; use one of {', '.join(STYLES)}.")
        if self.objective not in LOGIT_ALIGNMENTS:
            raise ValueError(f"objective={self.objective!r:.80} is unknown; use one of {', '.join(LOGIT_ALIGNMENTS)}.")
        # transformers builds a configuration without arguments to find defaults: a missing mask id is legal until used.
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} is outside the vocabulary; use 0 to {self.vocab_size - 1}."
            )

    def _check_shapes(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads < 1 or groups < 1 or heads % groups != 0:
            raise ValueError(
                f"num_key_value_heads={groups} does not divide num_attention_heads={heads}; use a divisor."
            )
        if self.head_dim < 2 or self.head_dim % 2 != 0:
            raise ValueError(f"head_dim={self.head_dim} is not a positive even number; rotary pairs need one.")
        if self.block_size < 1 or self.max_position_embeddings % self.block_size != 0:
            raise ValueError(
                f"block_size={self.block_size} does not divide max_position_embeddings="
                f"{self.max_position_embeddings}; use a divisor."
            )
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor} turns {self.rotary_dim} of {self.head_dim} channels; "
                "rotary pairs need an even number of them."
            )

    def _check_experts(self) -> None:
        number, chosen = self.num_experts, self.num_experts_per_tok
        # 0 is a dense model: the other fields then say nothing.
        if not number:
            return
        if self.style == "paper":
            raise ValueError(f"num_experts={number} with style='paper', whose MLP is dense; use 'modern'.")
        if self.score_function not in SCORES:
            raise ValueError(f"score_function={self.score_function!r} is unknown; use one of {', '.join(SCORES)}.")
        if not 0 < chosen <= number or self.moe_intermediate_size < 1:
            raise ValueError(
                f"num_experts_per_tok={chosen} of num_experts={number} experts of width {self.moe_intermediate_size} is no "
                "mixture; give 1 to num_experts of them and a width."
            )
        if self.n_group < 1 or number % self.n_group or not 0 < self.topk_group <= self.n_group:
            raise ValueError(
                f"n_group={self.n_group}, topk_group={self.topk_group} do not divide {number} experts; use a divisor and at "
                "most as many."
            )
