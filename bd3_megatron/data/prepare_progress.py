"""The progress bar of prepare: share done, documents/s, tokens/s, time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from bd3_megatron.data.part_pool import Progress


class ProgressBar:
    """A bar on stderr, or nothing."""

    def __init__(self, total_weight: float, *, show: bool) -> None:
        self._documents = self._tokens = 0
        self._started = time.monotonic()
        self._bar: Any = None
        if show:
            from tqdm import tqdm

            layout = "{l_bar}{bar}| {elapsed} elapsed, {remaining} left{postfix}"
            self._bar = tqdm(total=total_weight, bar_format=layout, desc="tokenising", dynamic_ncols=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def skip(self, weight: float) -> None:
        """Work that an earlier run finished; it does not count for the rates."""
        if self._bar is not None:
            self._bar.initial += weight
            self._bar.update(weight)

    def advance(self, progress: Progress) -> None:
        """Count work done."""
        self._documents += progress.documents
        self._tokens += progress.tokens
        if self._bar is None:
            return
        seconds = max(time.monotonic() - self._started, 1e-3)
        rates = f", {self._documents / seconds:,.0f} documents/s, {self._tokens / seconds:,.0f} tokens/s"
        self._bar.set_postfix_str(rates.removeprefix(", "), refresh=False)
        self._bar.update(progress.weight)
