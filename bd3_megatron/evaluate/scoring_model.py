"""A scoring model: an autoregressive language model of transformers, from a local folder, that scores texts.

Contract: texts, not tokens, are scored: every text is tokenised by the scoring model's own tokenizer. The result is the
mean over texts of each text's perplexity, as in the paper's tables. Refuses folders that hold no causal language model
or no tokenizer; never downloads.
Source: metrics.py of kuleshov-group/bd3lms, record_generative_perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bd3_megatron.errors import CheckpointError, DataError, TokenizerError, counted
from bd3_megatron.hf.modeling_bd3 import BD3ForCausalLM
from bd3_megatron.sampling.folder import MODEL_TYPE, read_export_json
from bd3_megatron.sampling.text import HubTokenizer, folder_tokenizer

MAX_WINDOW = 1024
"""Tokens visible to a scoring model at once, where it could take more."""


@dataclass(frozen=True)
class TextScore:
    """The score of one text."""

    nll_nats: float
    num_tokens: int
    """Targets: all tokens but the first and end tokens."""

    @property
    def perplexity(self) -> float | None:
        """exp of the mean; None where nothing was a target."""
        return math.exp(min(self.nll_nats / self.num_tokens, 700.0)) if self.num_tokens else None


@dataclass(frozen=True)
class CorpusScore:
    """The score of many texts."""

    perplexity: float
    """Mean over texts of each text's perplexity, as the paper's tables have it."""
    stderr: float | None
    """Of that mean; None with one text."""
    corpus_perplexity: float
    """exp of the mean over all tokens."""
    num_texts: int
    """Texts with at least one target."""


class ScoringModel:
    """A causal language model with its tokenizer.

    Args:
        model: in eval mode; returns `.logits` that predict the next token.
        tokenizer: of transformers.
        window: the most tokens visible at once.
    """

    def __init__(self, model: Any, tokenizer: HubTokenizer, *, window: int) -> None:
        self.model, self.tokenizer, self.window = model, tokenizer, window

    @staticmethod
    def load(folder: Path | str, *, device: torch.device | None = None) -> ScoringModel:
        """Open a local folder: a model of transformers, or one of ours with the autoregressive objective.

        Raises:
            CheckpointError: no causal language model there.
            TokenizerError: no tokenizer there.
        """
        # A second of import, wanted only for a scoring model.
        from transformers import AutoModelForCausalLM

        path = Path(folder)
        described = read_export_json(path / "config.json")
        ours = described.get("model_type") == MODEL_TYPE
        if ours and described.get("objective") != "ar":
            raise CheckpointError(
                f"{path} predicts blocks, so it gives no likelihood of the next token; score with an autoregressive model."
            )
        try:
            # our own class, not the folder's copy of it: no code of a folder is run
            kind = BD3ForCausalLM if ours else AutoModelForCausalLM
            model = kind.from_pretrained(path, local_files_only=True)
        except Exception as error:  # transformers raises many kinds here
            raise CheckpointError(
                f"{path} holds no causal language model ({_line(error)}); give another folder."
            ) from None
        tokenizer = folder_tokenizer(path)
        if tokenizer is None:
            raise TokenizerError(f"{path} holds no tokenizer; copy the scoring model's into it.")
        # GPT-2 says n_positions.
        longest = described.get("max_position_embeddings") or described.get("n_positions") or MAX_WINDOW
        return ScoringModel(model.to(device).eval(), tokenizer, window=min(int(str(longest)), MAX_WINDOW))

    def score(self, text: str) -> TextScore:
        """Score one text; an empty one has no target."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        # End tokens are seen and are no targets, as in the official metrics.py.
        total, count = 0.0, 0
        for nll_T, target_T in self._windows(torch.tensor(ids, dtype=torch.int64)):
            counts_T = target_T != (self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else -1)
            total += float(nll_T.double()[counts_T].sum())
            count += int(counts_T.sum())
        return TextScore(total, count)

    def score_all(self, texts: Sequence[str]) -> CorpusScore:
        """Score texts.

        Raises:
            DataError: no text has two tokens.
        """
        found = [one for one in map(self.score, texts) if one.num_tokens]
        if not found:
            raise DataError(f"none of {counted(len(texts), 'text')} has a token to score; generate longer ones.")
        # Mean of perplexities, not exp of the mean: the paper's tables are made so. The other stands beside it.
        each = [one.perplexity for one in found if one.perplexity is not None]
        centre = mean(each)
        spread = math.sqrt(sum((x - centre) ** 2 for x in each) / (len(each) - 1)) if len(each) > 1 else None
        total = sum(one.nll_nats for one in found) / sum(one.num_tokens for one in found)
        return CorpusScore(
            perplexity=centre,
            stderr=None if spread is None else spread / math.sqrt(len(each)),
            corpus_perplexity=math.exp(min(total, 700.0)),
            num_texts=len(found),
        )

    @torch.inference_mode()
    def features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The last hidden state of each text's last token, float32 [texts, D]; texts without a token are left out."""
        device, rows = next(self.model.parameters()).device, []
        for text in texts:
            # the newest tokens, since the last one is what counts
            ids = self.tokenizer.encode(text, add_special_tokens=False)[-self.window :]
            if ids:
                found = self.model(input_ids=torch.tensor([ids], device=device), output_hidden_states=True)
                # One text a forward: padding would move the last token.
                rows.append(found.hidden_states[-1][0, -1].float().cpu().numpy())
        return np.stack(rows) if rows else np.zeros((0, 1), dtype=np.float32)

    @torch.inference_mode()
    def _windows(self, ids_L: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(NLL, target) of every token but the first, window by window; on the CPU."""
        parts: list[tuple[Tensor, Tensor]] = []
        scored, start = 1, 0
        device = next(self.model.parameters()).device
        while scored < len(ids_L):
            stop = min(start + self.window, len(ids_L))
            # The loss is taken in fp32 on the CPU, whatever dtype the scorer has.
            logits_LV = self.model(input_ids=ids_L[None, start:stop].to(device)).logits[0].float().cpu()
            target_T = ids_L[scored:stop]
            rows_TV = logits_LV[scored - 1 - start : stop - 1 - start]
            parts.append((F.cross_entropy(rows_TV, target_T, reduction="none"), target_T))
            # windows of 1024 move by 512 as in the official metrics.py: every token has half a window before it
            scored, start = stop, start + max(1, self.window // 2)
        return parts


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
