"""The leak doctor: proves who sees whom in a run's own attention calls, before the first step and by `bd3 doctor`.

Every call that layers will make is examined with the backend that was chosen for it: each block size, pair and last layer, noisy
views, the rows of each context-parallel rank, the run's heads and dtype, documents whose borders fall inside blocks.
`model/visibility_check` says how. Knows nothing of weights: visibility does not depend on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from bd3_megatron.attention.request import AttentionRequest, ragged_documents
from bd3_megatron.attention.select import Backend
from bd3_megatron.attention.visibility import Rows
from bd3_megatron.checkpoint.agree import together
from bd3_megatron.compat.device import rank_device, training_dtype
from bd3_megatron.config.load import load_config
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.errors import BackendError, LeakError
from bd3_megatron.model.attention_context import AttentionContext
from bd3_megatron.model.core_attention import CoreAttention
from bd3_megatron.model.row_kernels import check_row_kernels, row_kernels
from bd3_megatron.model.visibility_check import AttentionCall, Violation, VisibilityCase, side, violations
from bd3_megatron.parallel.pair_split import PairLayout
from bd3_megatron.parallel.topology import Topology
from bd3_megatron.train.backends import attention_request, choose_backends, phase_layout

# on CPU a check of two sequences finds what a check of more would, in less time; a GPU's kernels are compiled per batch size
_CPU_BATCH = 2
_LISTED = 40


@dataclass(frozen=True)
class Shared:
    """This rank's part in a run whose context-parallel ranks examine together."""

    cp_rank: int
    cp_group: dist.ProcessGroup


def diagnose(
    config: Config,
    backends: Mapping[int, Backend],
    *,
    dtype: torch.dtype,
    device: torch.device,
    shared: Shared | None = None,
) -> str:
    """Examine every attention call of a run. With `shared`, collective over its group.

    Args:
        config: the run.
        backends: in use, by block size.
        dtype, device: of the run.
        shared: this rank's part; None: this process examines the rows of every context-parallel rank in turn.

    Returns:
        One line that says what holds.

    Raises:
        LeakError: a table of violations.
    """
    checked: list[str] = []
    tables: list[str] = []
    for size in dict.fromkeys(block_sizes(config)):
        # Training runs all views; evaluation and the interval search run one.
        for views in sorted({config.diffusion.views, 1}, reverse=True):
            for cp_rank in range(config.parallel.cp) if shared is None else (shared.cp_rank,):
                layout = phase_layout(config, size, views=views, cp_rank=cp_rank)
                # The model's own objects, so that what is proved is what runs.
                context = AttentionContext(layout, backends)
                request = attention_request(config, layout, dtype=dtype, device=device)
                if device.type == "cpu":
                    # Two and not one: with isolated documents each sequence has its own borders.
                    request = replace(request, batch=min(request.batch, _CPU_BATCH))
                found = examine_layout(context, request, None if shared is None else shared.cp_group)
                tables += [_table(found, context.backend, size)] if found else []
        checked.append(f"block_size={size} by {backends[size].label}")
    # only now: ranks that share rows must all have come here
    if tables:
        raise LeakError(tables[0])
    kind = str(dtype).removeprefix("torch.")
    packed = ", packed documents" if config.data.packing == "isolated" else ""
    return f"no leak: {', '.join(checked)}, over {config.data.seq_len} positions{packed}, {kind}"


def diagnose_together(config: Config, backends: Mapping[int, Backend], topology: Topology, dtype: torch.dtype) -> str:
    """As `diagnose`, on every rank's own rows and device. Collective.

    Raises:
        LeakError: on every rank, with the table of the first that found one.
    """
    shared = Shared(topology.cp_rank, topology.groups.cp) if topology.cp > 1 else None
    return together(LeakError, lambda: diagnose(config, backends, dtype=dtype, device=topology.device, shared=shared))


def check_rows_together(config: Config, topology: Topology, dtype: torch.dtype) -> str:
    """Hold the kernels of norms, rotary turns and activations against their formulas, on every rank's device. Collective.

    Returns:
        One line that names the kernels.

    Raises:
        BackendError: on every rank, where one of them found a wrong kernel.
    """
    kernels = row_kernels(config.model, dtype=dtype, device=topology.device)
    return together(BackendError, lambda: check_row_kernels(kernels))


def examine_layout(
    context: AttentionContext, request: AttentionRequest, cp_group: dist.ProcessGroup | None
) -> list[Violation]:
    """What the calls of one layout see wrongly.

    Args:
        context: layout and backends.
        request: heads, batch, dtype and device.
        cp_group: ranks that hold the other rows and examine with this one; None: their clean keys are given to the calls.

    Returns:
        Violations; empty when visibility is right.
    """
    # All that the layer's attention reads of megatron's configuration; no weights exist.
    heads = SimpleNamespace(kv_channels=request.head_dim)
    core = CoreAttention(heads, 1, pg_collection=SimpleNamespace(cp=cp_group), context=context)
    # with one sequence a call, documents and a single document take turns
    packings: list[Tensor | None] = [None]
    if request.documents:
        length = context.layout.length
        packings = [ragged_documents(request.batch, length, packing) for packing in range(3 - min(request.batch, 2))]
    found: list[Violation] = []
    for documents_BL in packings:
        for problem in _problems(core, request, documents_BL, is_shared=cp_group is not None):
            found += violations(problem)
    return found


def _problems(
    core: CoreAttention, request: AttentionRequest, documents_BL: Tensor | None, *, is_shared: bool
) -> Iterator[VisibilityCase]:
    """The calls of a layer, and of the last layer where it asks for loss rows only."""
    context, layout = core.context, core.context.layout
    device = torch.device(request.device_type)
    visibility = layout.visibility(documents_BL)
    ticket = context.ticket(visibility)
    # with context parallelism the gradients of all ranks' queries meet in a key
    whole: Rows = ((0, layout.length),)
    noisy = whole if is_shared and layout.noisy_rows else layout.noisy_rows
    clean = whole if is_shared and layout.clean_rows else layout.clean_rows
    noisy_streams = [(view, noisy) for view in range(layout.views)] if noisy else []
    # Views share one clean copy, which is numbered behind them.
    keys = side([*noisy_streams, (layout.views, layout.clean_key_rows)], layout.block_size, documents_BL, device)
    streams = {"pair": [*noisy_streams, (layout.views, clean)]}
    # The last layer computes only rows that carry loss: noisy queries, clean keys.
    if noisy and layout.clean_key_rows:
        streams["loss"] = noisy_streams
    for name, rows in streams.items():
        queries = side(rows, layout.block_size, documents_BL, device)
        own_q, own_k = (_own(layout, len(each.position_R), is_shared=is_shared) for each in (queries, keys))
        yield VisibilityCase(
            call=_with_ticket(core if name == "pair" else core.loss_stream, ticket),
            queries=queries,
            keys=keys,
            own_q=own_q.to(device),
            own_k=own_k.to(device),
            request=request,
            num_views=layout.views,
        )


def _with_ticket(attend: Callable[..., Tensor], ticket: Tensor) -> AttentionCall:
    return lambda query, key, value: attend(query, key, value, ticket)


def _own(layout: PairLayout, num_rows: int, *, is_shared: bool) -> Tensor:
    """Which of the rows of one side this rank's tensors hold, int64, in their order."""
    if not is_shared:
        return torch.arange(num_rows)
    rows = torch.arange(layout.num_rows)
    stream = rows // max(1, layout.num_noisy // layout.views) if layout.num_noisy else torch.zeros_like(rows)
    # Row number in the whole of all ranks: stream by stream, position by position.
    own = stream.clamp_max(layout.views) * layout.length + layout.position_P
    return own[own < num_rows]


def _table(found: list[Violation], backend: Backend, block_size: int) -> str:
    listed = "\n".join(f"  {violation}" for violation in found[:_LISTED])
    more = f"\n  and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return (
        f"visibility is wrong under attention backend {backend.label}, block_size={block_size}:\n{listed}{more}\n"
        "use another attention.backend (dense is the reference) and report this."
    )


def run(options: argparse.Namespace) -> int:
    """`bd3 doctor CONFIG [section.key=value ...]`: prove a configuration's visibility on this machine.

    Returns:
        0 when it holds, 3 with a table when it does not.
    """
    config = load_config(options.config, options.overrides)
    validate(config)
    device = rank_device(0)
    dtype = training_dtype(config.train.precision, device)
    try:
        print(diagnose(config, choose_backends(config, dtype=dtype, device=device), dtype=dtype, device=device))
        print(f"rows: {check_row_kernels(row_kernels(config.model, dtype=dtype, device=device))}")
    except LeakError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
