"""The head: loss and gradients of the rows that carry loss, against full logits of all 2L rows.

    python -m tools.bench.head [--vocab 131072 --hidden 256 --rows 2048]

Times both forms and measures the peak of live tensor bytes that the shipped one makes beyond its weight gradient.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_megatron.command import CommandParser
from bd3_megatron.model.head import VocabShard, weighted_nll
from tools.bench import harness
from tools.bench.harness import MIB, Note


class LiveBytes(TorchDispatchMode):
    """Bytes of storages made inside that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                # what came from outside is not this region's to count
                self._known.add(leaf.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return out

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        # One storage, however many views are made of it.
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def forms(options: argparse.Namespace) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """Both forms as closures over one problem, and the table whose gradient they make."""
    generator = torch.Generator().manual_seed(0)
    rows, hidden, vocab = options.rows, options.hidden, options.vocab
    # The pair's rows: 2 L, of which half are noisy and half of those masked.
    x_all = torch.randn(4 * rows, hidden, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(vocab, hidden, generator=generator)).requires_grad_()
    target = torch.randint(0, vocab - 1, (rows,), generator=generator)
    row_weight = torch.rand(rows, generator=generator)
    # a quarter of the pair's rows are masked: half of the noisy half
    masked = torch.randperm(2 * rows, generator=generator)[:rows].sort().values
    shard = VocabShard(0, vocab, vocab - 1, None)

    def shipped() -> Tensor:
        x_all.grad = weight.grad = None
        loss = weighted_nll(x_all.index_select(0, masked), weight, None, target, row_weight, shard=shard)[0]
        loss.backward()
        return loss.detach()

    def naive() -> Tensor:
        x_all.grad = weight.grad = None
        # Every row of the pair, as code does that ships the plain form.
        logits = (x_all @ weight.t())[: 2 * rows].index_fill(1, torch.tensor([vocab - 1]), float("-inf"))
        log_probs = F.log_softmax(logits, dim=-1)
        loss = -(log_probs[masked].gather(1, target[:, None])[:, 0] * row_weight).sum()
        loss.backward()
        return loss.detach()

    return {"shipped": shipped, "naive": naive}, weight


def peak_beyond_weight_gradient(run: Callable[[], Tensor], weight: Tensor) -> int:
    """Largest sum of live bytes made while `run` runs, less the table's gradient."""
    with LiveBytes() as live:
        run()
    # The table's fp32 gradient is there in both forms.
    return live.peak - weight.numel() * 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_head, arguments)


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("head", __doc__, repeats=3)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=512, help="masked rows (a quarter of the pair's)")
    return parser


def measure_head(options: argparse.Namespace) -> Iterator[Note]:
    """Both forms, interleaved."""
    run, weight = forms(options)
    error = float((run["shipped"]() - run["naive"]()).abs() / run["naive"]())
    peaks = {name: peak_beyond_weight_gradient(one, weight) for name, one in run.items()}
    seconds = harness.interleave(run, repeats=options.repeats, device=options.device)
    rows = [(n, harness.milliseconds(seconds[n]), f"{peaks[n] / MIB:.0f}") for n in run]
    ratio = harness.speedup(seconds, "shipped", against="naive")
    body = harness.table(("head", "forward + backward, ms", "peak beyond dW, MiB"), rows)
    note = f"shipped is {ratio:.2f} times as fast; losses differ by {error:.1e} (relative)"
    title = f"head, V {options.vocab}, h{options.hidden}, {options.rows} masked rows"
    yield Note(title, f"{body}\n\n{note}")


if __name__ == "__main__":
    sys.exit(main())
