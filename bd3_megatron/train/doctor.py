"""The leak doctor: an autograd proof of who influences whom, under a run's own attention backend, rows and packing.

Decides: a small transformer (two layers, so that what leaks into a context and from there onwards is seen too) runs on
the pair with the same core attention, layout and backend as training. The output of noisy block k must have exactly zero
gradient from every noisy block but itself, from clean blocks >= k and from other documents, and a nonzero gradient from
itself and every clean block before it. Knows nothing of weights: visibility does not depend on them.
Costs: one backward a block on a toy of width 32; at a shortened length a fraction of a second.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.select import Backend, choose
from bd3_megatron.attention.streams import Attend
from bd3_megatron.compat.device import rank_device
from bd3_megatron.config.load import load_config
from bd3_megatron.config.objective import block_sizes, objective_of
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import LeakError
from bd3_megatron.hf.plain_bd3 import Layer, rotary_table
from bd3_megatron.model.attention_context import AttentionContext
from bd3_megatron.model.core_attention import CoreAttention
from bd3_megatron.parallel.pair_split import PairLayout, pair_layout

PROBE_WIDTH, HEADS, LAYERS = 32, 2, 2
BLOCKS_BEFORE_TRAINING = 4


@dataclass(frozen=True)
class Violation:
    """One pair of blocks between which visibility is wrong."""

    query_block: int
    source: str
    """noisy or clean."""
    source_block: int
    found: bool
    """Influence was found (and must not be), or was missing (and must be there)."""

    def __str__(self) -> str:
        wrong = "influences it and must not" if self.found else "must influence it and does not"
        return f"noisy block {self.query_block}: {self.source} block {self.source_block} {wrong}"


def examine(
    attend: Attend, layout: PairLayout, documents_L: Tensor | None, *, dtype: torch.dtype, device: torch.device
) -> list[Violation]:
    """Compare influence with the visibility rule, for every noisy block (for the AR baseline: every position).

    Args:
        attend: the backend.
        layout: rows of one whole sequence.
        documents_L: int64 [L] documents, whole blocks each, or None.
        dtype, device: of the run.

    Returns:
        Violations; empty when visibility is right.
    """
    x_PD = _start(layout, dtype, device)
    out_PD = _toy(attend, layout, documents_L, x_PD, device)
    noisy_K, clean_K = _blocks(layout, noisy=True), _blocks(layout, noisy=False)
    queries = noisy_K or clean_K
    document_K = [0] * (max(queries) + 1) if documents_L is None else documents_L[:: layout.block_size].tolist()
    violations = []
    for block, rows in queries.items():
        (grad_PD,) = torch.autograd.grad(out_PD[rows].float().square().sum(), x_PD, retain_graph=True)
        influence_P = grad_PD.abs().sum(1)
        for source, table in (("noisy", noisy_K), ("clean", clean_K)):
            for other, source_rows in table.items():
                must = _must_see(block, source, other, is_ar=not noisy_K) and document_K[block] == document_K[other]
                seen = influence_P[source_rows].amax().item() > 0
                if seen != must:
                    violations.append(Violation(block, source, other, seen))
    return violations


def _must_see(block: int, source: str, other: int, *, is_ar: bool) -> bool:
    if is_ar:
        return other <= block
    return other == block if source == "noisy" else other < block


def _blocks(layout: PairLayout, *, noisy: bool) -> dict[int, Tensor]:
    """Block -> its row numbers in one stream."""
    stream = slice(0, layout.num_noisy) if noisy else slice(layout.num_noisy, None)
    rows = torch.arange(layout.num_rows)[stream]
    block = layout.position_P[stream] // layout.block_size
    return {int(k): rows[block == k] for k in block.unique()}


def _start(layout: PairLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x_PD = torch.randn(layout.num_rows, PROBE_WIDTH, generator=generator)
    return x_PD.to(device, dtype).requires_grad_()


def _toy(attend: Attend, layout: PairLayout, documents_L: Tensor | None, x_PD: Tensor, device: torch.device) -> Tensor:
    width = PROBE_WIDTH // HEADS
    core = CoreAttention(
        SimpleNamespace(kv_channels=width),
        1,
        pg_collection=SimpleNamespace(cp=None),
        context=AttentionContext(layout, attend),
    )
    documents_BL = None if documents_L is None else documents_L[None].to(device)

    def attend_rows(q_BPNH: Tensor, k_BPGH: Tensor, v_BPGH: Tensor, layer: int) -> Tensor:
        q, k, v = (t.transpose(0, 1) for t in (q_BPNH, k_BPGH, v_BPGH))
        return core(q, k, v, documents_BL).transpose(0, 1).unflatten(-1, (HEADS, width))

    rotary = rotary_table(layout.position_P[None].to(device), head_dim=width, theta=1e4, dtype=x_PD.dtype)
    shape = SimpleNamespace(
        style="modern",
        hidden_size=PROBE_WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=width,
        intermediate_size=PROBE_WIDTH,
        qk_norm=False,
        layer_norm_eps=1e-5,
        residual_dropout=0.0,
    )
    x = x_PD[None]
    generator = torch.Generator().manual_seed(1)
    for index in range(LAYERS):
        layer = Layer(shape, index)  # type: ignore[arg-type]
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                # wide enough that no influence rounds to zero in bf16
                torch.nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
        layer.to(device, x_PD.dtype)
        x = layer(x, rotary, attend_rows)
    return x[0]


def example_documents(length: int, block_size: int) -> Tensor:
    """Two or three documents of whole blocks: int64 [L]."""
    num_blocks = length // block_size
    block = torch.arange(num_blocks)
    document = (block >= num_blocks // 3).long() + (block >= 2 * num_blocks // 3).long()
    return document.repeat_interleave(block_size)


def diagnose(
    config: Config, backend: Backend, *, max_blocks: int | None, dtype: torch.dtype, device: torch.device
) -> str:
    """Examine every block size of a run.

    Args:
        config: the run.
        backend: in use.
        max_blocks: shorten sequences to so many blocks; None: whole sequences.
        dtype, device: of the run.

    Returns:
        One line that says what holds.

    Raises:
        LeakError: a table of offenders.
    """
    checked = []
    for size in dict.fromkeys(block_sizes(config)):
        blocks = config.data.seq_len // size
        length = size * (blocks if max_blocks is None else min(blocks, max_blocks))
        for drop in (True, False):
            layout = pair_layout(objective_of(config, block_size=size), length=length, drop_last_clean=drop)
            documents = None if config.data.packing != "isolated" else example_documents(length, size)
            violations = examine(backend.attend, layout, documents, dtype=dtype, device=device)
            if violations:
                listed = "\n".join(f"  {violation}" for violation in violations[:40])
                more = f"\n  and {len(violations) - 40} more" if len(violations) > 40 else ""
                raise LeakError(
                    f"visibility is wrong under attention backend {backend.label}, block_size={size}:\n{listed}{more}\n"
                    "use attention.backend=dense and report this."
                )
        checked.append(f"block_size={size} over {length} positions")
    return f"no leak: {', '.join(checked)}, attention backend {backend.label}, {str(dtype).removeprefix('torch.')}"


def streams_of(config: Config) -> Literal["pair", "noisy", "clean"]:
    """Which streams attention sees in a run: the AR baseline has no noisy rows, masked diffusion no clean ones."""
    length = config.data.seq_len
    phases = [objective_of(config, block_size=size) for size in block_sizes(config)]
    if not any(phase.noisy_rows(length) for phase in phases):
        return "clean"
    return "pair" if any(phase.clean_rows(length) for phase in phases) else "noisy"


def run(options: argparse.Namespace) -> int:
    """`bd3 doctor CONFIG [section.key=value ...]`: prove a configuration's visibility on this machine, all blocks.

    Returns:
        0 when it holds, 3 with a table when it does not.
    """
    config = load_config(options.config, options.overrides)
    validate(config)
    device = rank_device(0)
    dtype = torch.bfloat16 if device.type == "cuda" and config.train.precision != "fp32" else torch.float32
    request = AttentionRequest(
        device_type=device.type,
        dtype=dtype,
        batch=1,
        length=config.data.seq_len,
        block_size=min(block_sizes(config)),
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=PROBE_WIDTH // HEADS,
        streams=streams_of(config),
        documents=config.data.packing == "isolated",
    )
    try:
        print(diagnose(config, choose(config.attention.backend, request), max_blocks=None, dtype=dtype, device=device))
    except LeakError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
