"""What a step asks of a GPU, as numbers that need none: operations, host reads, group calls, bytes.

Contract: every figure of the column "now" is counted by running the product's own code, and a default test calls the same
function and holds its bound; milliseconds on a GPU are not measured.

    python -m tools.bench.counts
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_megatron.attention.select import Backend, named
from bd3_megatron.attention.streams import Attend, Stream
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.command import CommandParser, run_tool
from bd3_megatron.config.load import config_from_tree, replace_field
from bd3_megatron.config.objective import objective_of
from bd3_megatron.config.schema import Config, ParallelConfig
from bd3_megatron.cost.parameters import parameters_per_rank
from bd3_megatron.cost.traffic import transfers
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.files import write_text
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.model.head import VocabShard, weighted_nll
from bd3_megatron.model.pair_batch import PairBatch
from bd3_megatron.parallel.pair_split import pair_layout
from bd3_megatron.parallel.topology import join, leave
from bd3_megatron.train.batches import Noise, StepBatches, make_micro_batch
from bd3_megatron.train.trainer import Trainer
from tools.bench.cuda_path import META, backend, on_cuda
from tools.bench.harness import RESULTS, table
from tools.bench.host_reads import Collectives, HostReads, Operations

HOST_READS: Mapping[int, Mapping[str, int]] = MappingProxyType(
    {
        1: {},
        2: {"utils.py:233 aten._local_scalar_dense": 3, "stage_1_and_2.py:3248 aten._local_scalar_dense": 1},
        3: {"utils.py:233 aten._local_scalar_dense": 1},
    }
)
"""By ZeRO stage, of a step of two ranks in bf16, counted by tests/ranks/test_host_reads.py: those that are left are in
DeepSpeed's own step, which asks whether the norm is finite and whether a gradient overflowed."""
# with the norm read by our own engine
_READS_BEFORE = MappingProxyType({1: "not counted", 2: "5", 3: "2"})

# Small: operations a layer depend on neither width nor vocabulary.
ROWS_LENGTH, BLOCK, WORDS = 256, 16, 512


def small_config(*, layers: int, packing: str = "wrap", backend: str = "structured", **sections: Any) -> Config:
    """A model of one head whose layers are counted."""
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"num_layers": layers, "hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "ffn_hidden_size": 64},
        "data": {"seq_len": ROWS_LENGTH, "packing": packing},
        "diffusion": {"block_size": BLOCK},
        "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2},
        "attention": {"backend": backend},
    }
    return config_from_tree(tree | sections)


@contextmanager
def _alone() -> Iterator[None]:
    """A process group of this process, ended again where there was none before."""
    mine = not dist.is_initialized()
    if mine:
        # megatron wants a process group, also for one rank; a store in memory needs no port.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        if mine:
            leave()


def _model(config: Config, backend: Backend, device: torch.device) -> ParallelModel:
    topology = join(config.parallel, rank=0, world_size=1, device=device)
    vocabulary = vocabulary_of(config, size=WORDS, mask_id=WORDS - 1)
    dtype = torch.bfloat16 if device == META else torch.float32
    return ParallelModel(config, vocabulary, topology, backends={BLOCK: backend}, dtype=dtype)


def _batch(config: Config, model: ParallelModel) -> PairBatch:
    """Two sequences, of three documents each where documents are isolated."""
    tokens_BL = torch.arange(2 * ROWS_LENGTH).view(2, ROWS_LENGTH) % (WORDS - 1)
    documents = None
    if config.data.packing == "isolated":
        documents = (torch.arange(ROWS_LENGTH)[None] >= torch.tensor([[64, 160], [96, 144]])[..., None]).sum(1)
    clean = CleanBatch(tokens_BL=tokens_BL, index_B=torch.arange(2), document_id_BL=documents)
    noise = Noise(seed=1, mask_id=WORDS - 1, group_size=2, block_size=BLOCK, interval=Interval())
    return make_micro_batch(clean, noise, config.diffusion, model.layout).pair


@dataclass(frozen=True)
class LayerCounts:
    """Of one layer, forward and backward of a micro-batch."""

    dispatched: float
    kernels: float
    host_reads: float


def layer_counts(attention: str, packing: str) -> LayerCounts:
    """Operations and host reads that a further layer adds.

    Args:
        attention: structured as a CPU runs it; flex or triton as a CUDA device does, in bf16.
        packing: wrap or isolated.
    """
    if attention == "structured":
        return _layer_counts(named(attention), packing, torch.device("cpu"))
    with on_cuda():
        return _layer_counts(backend(attention), packing, META)


def _layer_counts(backend: Backend, packing: str, device: torch.device) -> LayerCounts:
    found = []
    with _alone():
        # The difference of two depths: what is paid once a model, such as embedding and head, drops out.
        for layers in (2, 4):
            config = small_config(layers=layers, packing=packing)
            model = _model(config, backend, device)
            operations, batch = Operations(), _batch(config, model).to(device)
            reads = HostReads([*model.root.parameters(), *(v for v in vars(batch).values() if isinstance(v, Tensor))])
            # the tables of a micro-batch are made with it, not by its layers
            model.context.prepare(batch.visibility, device)
            with operations, reads.counting():
                model.chunks[0](batch)[0].backward()
            found.append((operations.dispatched, operations.kernels, sum(reads.found.values())))
    return LayerCounts(*((more - less) / 2 for less, more in zip(*found, strict=True)))


def visibilities(layers: int, packing: str) -> tuple[int, int]:
    """(Visibility objects that attention meets in a micro-batch, calls of attention); the last layer's, a part of the
    same, is not counted again."""
    seen: dict[int, Visibility] = {}
    calls = 0
    real = named("structured")

    def watched(noisy: Stream | None, clean: Stream | None, visibility: Visibility, *, scale: float) -> Any:
        nonlocal calls
        calls += 1
        seen[id(visibility)] = visibility
        return real.attend(noisy, clean, visibility, scale=scale)

    attend: Attend = watched
    with _alone(), torch.no_grad():
        config = small_config(layers=layers, packing=packing)
        model = _model(config, Backend("watched", attend, "counted"), torch.device("cpu"))
        batch = _batch(config, model)
        model.chunks[0](batch)
        derived = batch.visibility.without_clean_queries
    return len([one for one in seen.values() if one is not derived]), calls


def group_calls(world_size: int, **axes: int) -> tuple[int, set[datetime.timedelta | None]]:
    """(calls that make process groups on one rank of a world, the time-outs they are given), by torch's fake group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    calls: list[dict[str, Any]] = []
    real = {name: getattr(dist, name) for name in ("new_group", "split_group")}

    def watched(name: str) -> Callable[..., Any]:
        return lambda *args, **options: calls.append(options) or real[name](*args, **options)  # type: ignore[func-returns-value]

    parallel = ParallelConfig(**axes)  # type: ignore[arg-type]
    timeout = datetime.timedelta(seconds=parallel.collective_timeout_seconds)
    # torch's fake group: a thousand ranks' arithmetic on one process, nothing is sent.
    dist.init_process_group("fake", rank=world_size - 1, world_size=world_size, store=FakeStore(), timeout=timeout)
    try:
        for name in real:
            setattr(dist, name, watched(name))
        join(parallel, rank=world_size - 1, world_size=world_size, device=torch.device("cpu"))
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
        leave()
    return len(calls), {options.get("timeout") for options in calls} | {timeout}


def head_counts(vocab: int, rows: int = 4096, hidden: int = 2048) -> tuple[int, float]:
    """(kernels, GB moved) of the head's loss and gradients in bf16, on shapes alone, with a GPU's chunks."""
    hidden_RD, table_VD = (
        torch.empty(size, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True) for size in (rows, vocab)
    )
    target_R = torch.empty(rows, dtype=torch.int64, device="meta")
    weight_R = torch.empty(rows, device="meta")
    shard = VocabShard(0, vocab, None, None)
    # On meta tensors every operation is dispatched and none is run.
    operations = Operations()
    with operations:
        weighted_nll(hidden_RD, table_VD, None, target_R, weight_R, shard=shard)[0].backward()
    return operations.kernels, operations.moved_bytes / 1e9


def bytes_a_parameter(**parallel: Any) -> float:
    """Bytes of gradients and weights that the data-parallel axis reduces and gathers, an element of the model, as sizes of
    reduce-scatters and all-gathers (an all-reduce is one of each), with one micro-batch."""
    config = small_config(layers=2, parallel={"dp": 8, **parallel}, train={"steps": 1, "global_batch_size": 8})
    config = replace_field(config, "model.vocab_size", WORDS)
    lines = [line for line in transfers(config) if line.axis == "dp"]
    # a ring puts (ranks - 1) / ranks of each on its link
    return sum(line.wire_bytes for line in lines) / (7 / 8) / parameters_per_rank(config, 0)


def draw_seconds(tokens: int = 8192) -> float:
    """Seconds of CPU time that the noise and the rows of a token cost."""
    config = small_config(layers=1, data={"seq_len": 1024, "packing": "wrap"})
    layout = pair_layout(objective_of(config), length=1024)
    clean = CleanBatch(
        tokens_BL=torch.zeros(tokens // 1024, 1024, dtype=torch.int64), index_B=torch.arange(tokens // 1024)
    )
    noise = Noise(seed=1, mask_id=WORDS - 1, group_size=8, block_size=BLOCK, interval=Interval())
    # Once untimed: the first call makes tables that are kept.
    make_micro_batch(clean, noise, config.diffusion, layout)
    # This thread's own CPU time: neighbours do not count.
    start = time.thread_time()
    for _ in range(3):
        make_micro_batch(clean, noise, config.diffusion, layout)
    return (time.thread_time() - start) / 3 / tokens


@dataclass(frozen=True)
class StepCounts:
    """Of one step, from its first forward to its record, on one rank."""

    host_reads: dict[str, int]
    """Where the host waits for the device -> how often."""
    bytes_a_parameter: float
    """Of all collectives, an element of the model, counted as `bytes_a_parameter` does."""


def step_counts(trainer: Trainer) -> StepCounts:
    """What a run's third step asks of the host and of the network.

    Args:
        trainer: fresh from `build_trainer`, of three steps or more; three updates are made.
    """
    engine, batches = (
        trainer.engine,
        StepBatches(
            trainer.data.train,
            trainer.plan,
            trainer.topology,
            first_step=trainer.state.step,
            mask_id=trainer.data.special.mask,
            num_workers=0,
            prepare=trainer.engine.model.context.prepare,
        ),
    )
    # The first update makes Adam's state, and in both DeepSpeed's ZeRO 3 notes which weights are used when.
    for _ in range(2):
        trainer.training_step.run(trainer.plan, trainer.state, batches)
        trainer.state.step += 1
    reads, sent = HostReads([*engine.model.root.parameters(), *engine.owned()]), Collectives()
    # under ZeRO 3 a parameter is empty between uses and says by itself how large it is
    size = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.root.parameters())
    real = engine.train_step

    def counted(micro_batches: Sequence[PairBatch], **settings: Any) -> Any:
        reads.mark(v for one in micro_batches for v in vars(one).values() if isinstance(v, Tensor))
        with sent, reads.counting():
            return real(micro_batches, **settings)

    # Put in front of the product's own step and taken away again: the step itself is not copied.
    engine.train_step = counted  # type: ignore[method-assign, assignment]
    try:
        outcome = trainer.training_step.run(trainer.plan, trainer.state, batches)
    finally:
        engine.train_step = real  # type: ignore[method-assign]
    with reads.counting():
        outcome.begin_sums()
    return StepCounts(dict(reads.found), sent.moved_bytes / size)


@dataclass(frozen=True)
class Line:
    """One figure before and now."""

    what: str
    before: str
    now: str


def lines() -> Iterator[Line]:
    """All figures."""
    # layers before: the same functions at commit 4baeec5; head: at 00625c7; the rest: the reading that issue 26 reports
    for attention, packing, before in (
        ("structured", "wrap", "723 / 180 / 0"),
        ("structured", "isolated", "1,671 / 381 / 1"),
        ("flex", "wrap", "397 / not counted / 0"),
        ("flex", "isolated", "397 / not counted / 1 to 3"),
        ("triton", "wrap", "397 / not counted / 0"),
        ("triton", "isolated", "397 / not counted / 1 to 3"),
    ):
        found = layer_counts(attention, packing)
        name = f"a layer, {attention} attention, {packing}: dispatched operations / kernels / host reads"
        yield Line(name, before, f"{found.dispatched:,.0f} / {found.kernels:,.0f} / {found.host_reads:,.0f}")
    for packing, before in (("wrap", "1 / 24"), ("isolated", "24 / 24")):
        objects, calls = visibilities(24, packing)
        yield Line(
            f"visibility objects / attention calls of a micro-batch, 24 layers, {packing}",
            before,
            f"{objects} / {calls}",
        )
    for world_size, before in ((8, "not counted"), (512, "not counted"), (1024, "11,273")):
        alone, mixed = group_calls(world_size), group_calls(world_size, tp=2, pp=2, cp=2)
        yield Line(
            f"group calls of a rank, {world_size:,} ranks, dp / tp 2 pp 2 cp 2", before, f"{alone[0]} / {mixed[0]}"
        )
        if world_size == 1024:
            seconds = ", ".join(f"{t.total_seconds():g} s" if t else "none" for t in mixed[1])
            yield Line("time-outs of those groups (1200 s configured)", "1800 s but for the world's", seconds)
    for vocab, before in ((50_304, "710 / 42.9"), (152_064, "2,110 / 316.5")):
        kernels, moved = head_counts(vocab)
        yield Line(
            f"head, V {vocab:,}, 4,096 rows, D 2,048, bf16: kernels / GB moved", before, f"{kernels:,} / {moved:.1f}"
        )
    zero_1 = {"ZeRO 0 and 1": {}, "ZeRO 1, grad_reduce_dtype bf16": {"grad_reduce_dtype": "bf16"}}
    others = {"ZeRO 2": {"zero_stage": 2}, "ZeRO 3": {"zero_stage": 3}}
    for name, parallel in (zero_1 | others).items():
        before = {"ZeRO 0 and 1": "10", "ZeRO 2": "10", "ZeRO 3": "6"}.get(name, "not there")
        yield Line(f"bytes an element over dp, bf16, {name}", before, f"{bytes_a_parameter(**parallel):g}")
    for stage, reads in HOST_READS.items():
        where = "".join(f"; {place}" for place in reads)
        yield Line(f"host reads of a step, bf16, ZeRO {stage}", _READS_BEFORE[stage], f"{sum(reads.values())}{where}")
    microseconds = 1e6 * draw_seconds()
    yield Line(
        "noise and rows of a token, microseconds of CPU; on the training thread",
        "0.5 to 1; all",
        f"{microseconds:.2f}; 0",
    )


_METHOD = """
Structured layers run on the CPU in fp32. Flex and triton layers walk the path of a CUDA device in bf16 on torch's meta device,
where operations are dispatched and none runs: a kernel's launch and a compiled graph count as one operation forward and one
backward, and a host read would be an error. Their time, and the kernels inside a compiled graph, are not measured.
"""


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(prog="tools.bench.counts", description=__doc__)
    parser.add_argument("--no-note", action="store_true", help="print only; leave tools/bench/results alone")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Count everything; returns the exit code."""
    return run_tool(build_parser(), _count, arguments)


def _count(options: Any) -> int:
    rows = [(line.what, line.before, line.now) for line in lines()]
    text = f"# {(__doc__ or '').splitlines()[0]}\n\n    python -m tools.bench.counts\n\n" + table(
        ("figure", "before", "now"), rows
    )
    text += f"\n{_METHOD.rstrip()}"
    print(text)
    if not options.no_note:
        write_text(options.results / "gpu_counts.md", text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
