"""A whole optimizer step at debug shapes against a loop written by hand, where the host's work is all there is.

    python -m tools.bench.loop [--layers 4 --hidden 64 --heads 4 --length 64 --block 4 --vocab 320 --micro-batches 8]

The loop by hand is the exported model under a dense mask, logits of the noisy half, gradients of all micro-batches, clipping
and torch's fused AdamW; the shipped step is `ZeroEngine.train_step` on the same micro-batches and weights, on one rank.
Losses and gradient norms are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.select import choose
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.command import CommandParser
from bd3_megatron.compat.device import keep_freed_memory
from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.schema import Config
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.engine.zero_engine import ZeroEngine
from bd3_megatron.errors import RangeError
from bd3_megatron.hf.plain_bd3 import PlainBD3, run_layers
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.model.pair_batch import pair_batch
from bd3_megatron.parallel.topology import join
from bd3_megatron.train.batches import Noise
from tools.bench import harness
from tools.bench.harness import Note
from tools.bench.host_reads import Operations
from tools.bench.step import dense_attention, plain_twin

CPU = torch.device("cpu")
# Relative: losses and norms of one step, fp32 sums in another order.
STEP_TOLERANCE = 1e-5
# A step's loss and gradient norm.
Step = Callable[[], tuple[float, float]]


def make_config(options: argparse.Namespace) -> Config:
    """One rank, ZeRO 1, micro-batches of one sequence."""
    return config_from_tree(
        {
            "run": {"dir": "unused"},
            "model": {
                "num_layers": options.layers,
                "hidden_size": options.hidden,
                "num_heads": options.heads,
                "num_kv_heads": options.heads,
            },
            "data": {"seq_len": options.length},
            "diffusion": {"block_size": options.block},
            "train": {"steps": 1, "global_batch_size": options.micro_batches, "micro_batch_size": 1},
        }
    )


def drawn_step(config: Config, vocab: int) -> list[tuple[CleanBatch, NoisyBatch]]:
    """Random tokens of a step and their noise, a micro-batch each."""
    count, length = config.train.global_batch_size, config.data.seq_len
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, vocab - 1, (count, length), generator=generator)
    noise = Noise(
        seed=1, mask_id=vocab - 1, group_size=count, block_size=config.diffusion.block_size, interval=Interval()
    )
    clean = [CleanBatch(tokens_BL=tokens_BL[i : i + 1], index_B=torch.tensor([i])) for i in range(count)]
    return [(one, noise.corrupt(one, config.diffusion)) for one in clean]


def engine_step(
    config: Config, drawn: Sequence[tuple[CleanBatch, NoisyBatch]], vocab: int
) -> tuple[Step, ParallelModel]:
    """The engine's own step, and its model."""
    if not dist.is_initialized():
        # megatron wants a process group, also for one rank
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # DeepSpeed asks the launcher's variable
    os.environ.setdefault("LOCAL_RANK", "0")
    topology = join(config.parallel, rank=0, world_size=1, device=CPU)
    vocabulary = vocabulary_of(config, size=vocab, mask_id=vocab - 1)
    request = AttentionRequest(
        device_type="cpu",
        dtype=torch.float32,
        batch=1,
        rows=Visibility.pair(config.data.seq_len, config.diffusion.block_size),
        num_heads=config.model.num_heads,
        num_kv_heads=config.model.kv_heads,
        head_dim=config.model.head_width,
    )
    backends = {config.diffusion.block_size: choose("auto", request)}
    model = ParallelModel(config, vocabulary, topology, backends=backends, dtype=torch.float32)
    engine = ZeroEngine(model, config, num_micro_batches=len(drawn), dtype=torch.float32)
    batches = [pair_batch(clean, [noisy], model.layout) for clean, noisy in drawn]
    tokens = len(drawn) * config.data.seq_len

    def step() -> tuple[float, float]:
        result = engine.train_step(batches, loss_scale=1 / tokens, lr=config.optim.lr)
        return sum(float(log.weighted_nll_BK.sum()) for log in result.logs) / tokens, result.grad_norm

    return step, model


def loop_step(config: Config, drawn: Sequence[tuple[CleanBatch, NoisyBatch]], vocab: int, plain: PlainBD3) -> Step:
    """The same step as one would write it down."""
    length, optim = config.data.seq_len, config.optim
    attend = dense_attention(length, config.diffusion.block_size, CPU)
    position = torch.arange(length).repeat(2)[None]
    # as engine/param_groups does: matrices decay, norms and biases do not
    decayed = [p for p in plain.parameters() if p.dim() > 1]
    others = [p for p in plain.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.adam_eps,
        fused=True,
    )
    ids = [torch.cat([noisy.noisy_BL, clean.tokens_BL], dim=1) for clean, noisy in drawn]
    tokens, never = len(drawn) * length, torch.tensor([vocab - 1])

    def loss_of(i: int) -> Tensor:
        clean, noisy = drawn[i]
        logits = plain.lm_head(run_layers(plain.model, ids[i], position, attend))[:, :length]
        log_probs = F.log_softmax(logits.index_fill(-1, never, float("-inf")), dim=-1)
        return -(log_probs.gather(-1, clean.tokens_BL[..., None])[..., 0] * noisy.weight_BL).sum() / tokens

    def step() -> tuple[float, float]:
        optimizer.zero_grad()
        total = 0.0
        for i in range(len(drawn)):
            loss = loss_of(i)
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), optim.clip_grad_norm)
        optimizer.step()
        return total, float(norm)

    return step


def dispatched(step: Step) -> int:
    """Operations of a step, views included."""
    operations = Operations()
    with operations:
        step()
    return operations.dispatched


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("loop", __doc__, repeats=30)
    sizes = {"layers": 4, "hidden": 64, "heads": 4, "length": 64, "block": 4, "vocab": 320, "micro-batches": 8}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_loop, arguments)


def measure_loop(options: argparse.Namespace) -> Iterator[Note]:
    """Compare both steps, then time them in turns."""
    keep_freed_memory()
    config = make_config(options)
    drawn = drawn_step(config, options.vocab)
    shipped, model = engine_step(config, drawn, options.vocab)
    by_hand = loop_step(config, drawn, options.vocab, plain_twin(config, options.vocab, model))
    for _ in range(2):
        ours, theirs = shipped(), by_hand()
        # the second step's are those of updated weights
        if any(abs(a - b) > STEP_TOLERANCE * abs(b) for a, b in zip(ours, theirs, strict=True)):
            raise RangeError(f"the two steps disagree: loss and norm {ours} against {theirs}; nothing was timed.")
    # CPU time, in turns: what a neighbour takes slows both alike
    seconds = harness.interleave({"shipped": shipped, "by hand": by_hand}, repeats=options.repeats, device="cpu")
    counts = {"shipped": dispatched(shipped), "by hand": dispatched(by_hand)}
    rows = [(name, harness.milliseconds(values), f"{counts[name]:,}") for name, values in seconds.items()]
    ratio = harness.speedup(seconds, "by hand", against="shipped")
    shape = f"{options.layers} layers, h{options.hidden}, L{options.length}, S{options.block}, V{options.vocab}"
    timed = harness.table(("step", "CPU ms", "dispatched operations"), rows)
    body = f"{timed}\n\nthe shipped step takes {ratio:.2f} times the CPU time"
    yield Note(f"loop, {shape}, {options.micro_batches} micro-batches of one sequence", body)


if __name__ == "__main__":
    sys.exit(main())
