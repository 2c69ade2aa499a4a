"""Draws the block being filled: `bd3 sample --show-denoising`.

One line a block: its position, decided tokens as text (as ids without a tokenizer) and a shade for each undecided one,
redrawn after every forward on a terminal, one line a forward elsewhere. Costs a wait for the device a forward.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from typing import TextIO

from bd3_megatron.sampling.text import HubTokenizer

SHADE = "░"
CLEAR_LINE = "\r\x1b[K"


class DenoisingDisplay:
    """An observer of the engine that writes to a stream.

    Args:
        tokenizer: None = tokens are shown as ids.
        mask_id: shown as a shade.
        out: where to write.
    """

    def __init__(self, tokenizer: HubTokenizer | None, mask_id: int | None, out: TextIO) -> None:
        self._tokenizer, self._mask_id, self._out = tokenizer, mask_id, out
        self._shown = (-1, -1)

    def __call__(self, sample: int, start: int, ids: list[int]) -> None:
        """Show one block after one forward."""
        line = f"[{start:6d}] {self.drawn(ids)}"
        # A file cannot be redrawn: a line a forward keeps the course readable.
        if not self._out.isatty():
            self._out.write(line + "\n")
            return
        if self._shown not in ((-1, -1), (sample, start)):
            self._out.write("\n")
        self._shown = (sample, start)
        # Cut to the terminal's width: a wrapped line could not be redrawn.
        self._out.write(CLEAR_LINE + line[: shutil.get_terminal_size().columns - 1])
        self._out.flush()

    def drawn(self, ids: Sequence[int]) -> str:
        """One line of text for a block."""
        parts = []
        for is_mask, run in itertools.groupby(ids, key=lambda token: token == self._mask_id):
            tokens = list(run)
            parts.append(SHADE * len(tokens) if is_mask else self._text(tokens))
        return "".join(parts)

    def _text(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return "".join(f" {token} " for token in tokens)
        # Special tokens are shown: the display is for looking at what the model decides.
        return self._tokenizer.decode(tokens, skip_special_tokens=False).replace("\n", "⏎")

    def finish(self) -> None:
        """End the line being drawn."""
        if self._shown != (-1, -1):
            self._out.write("\n")
            self._out.flush()
