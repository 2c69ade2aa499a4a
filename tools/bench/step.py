"""A training step (forward and backward) of the shipped path against the form most code ships.

    python -m tools.bench.step --against naive [--layers 4 --hidden 256 --heads 4 --length 512 --block 16 --vocab 8192 --batch 4]

`naive` is a dense boolean mask through torch's SDPA over all 2L rows, every row in every layer, logits of all 2L rows and
a full log-softmax; `naive-flex` (GPU) the same with FlexAttention; `--official FOLDER` adds the official code's own model.
All run the same weights and batch; losses are compared before anything is timed. Data tokens count L, never 2L.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# run as a script from any folder, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bd3_megatron.attention.request import AttentionRequest
from bd3_megatron.attention.select import choose
from bd3_megatron.attention.visibility import Visibility
from bd3_megatron.command import CommandParser
from bd3_megatron.compat.device import keep_freed_memory, peak_memory_bytes, rank_device
from bd3_megatron.config.load import config_from_tree
from bd3_megatron.config.objective import block_sizes
from bd3_megatron.config.schema import Config
from bd3_megatron.convert.name_table import NameTable
from bd3_megatron.convert.plain_config import plain_config
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.diffusion.corrupt import NoisyBatch
from bd3_megatron.diffusion.noise_level import Interval
from bd3_megatron.errors import RangeError, UsageError
from bd3_megatron.hf.attention_bd3 import blocks_of, pair_sees
from bd3_megatron.hf.plain_bd3 import PlainBD3, run_layers
from bd3_megatron.model.build import ParallelModel, vocabulary_of
from bd3_megatron.model.pair_batch import pair_batch
from bd3_megatron.parallel.topology import join
from bd3_megatron.train.batches import Noise
from tools.bench import harness
from tools.bench.harness import Note
from tools.bench.head import LiveBytes
from tools.bench.official_step import official_model, official_step

# Relative: two ways to add in fp32, and the roundings of a whole model in bf16.
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
NaiveAttend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""q, k, v and the layer's number -> the attention's output."""


@dataclass(frozen=True)
class StepCase:
    """One batch and the shape it is for."""

    config: Config
    clean: CleanBatch
    noisy: NoisyBatch
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.clean.tokens_BL.numel()


def make_problem(options: argparse.Namespace, *, precision: str = "fp32") -> StepCase:
    """Random tokens and the noise of a first step; a GPU computes in bf16 whatever `precision` says."""
    config = config_from_tree(
        {
            "run": {"dir": "unused"},
            "model": {
                "style": options.style,
                "num_layers": options.layers,
                "hidden_size": options.hidden,
                "num_heads": options.heads,
                "num_kv_heads": options.kv_heads or options.heads,
                "ffn_hidden_size": options.ffn or None,
            },
            "data": {"seq_len": options.length},
            "diffusion": {"block_size": options.block},
            "train": {"steps": 1, "global_batch_size": options.batch, "micro_batch_size": options.batch},
        }
    )
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(0, options.vocab - 1, (options.batch, options.length), generator=generator)
    clean = CleanBatch(tokens_BL=tokens_BL, index_B=torch.arange(options.batch))
    noise = Noise(
        seed=1, mask_id=options.vocab - 1, group_size=options.batch, block_size=options.block, interval=Interval()
    )
    device = rank_device(0) if options.device == "cuda" else torch.device("cpu")
    # As each device trains.
    dtype = torch.bfloat16 if options.device == "cuda" or precision == "bf16" else torch.float32
    return StepCase(config, clean, noise.corrupt(clean, config.diffusion), dtype, device)


def shipped_step(problem: StepCase, vocab: int, backend: str) -> tuple[Callable[[], Tensor], ParallelModel, str]:
    """(one forward and backward of the shipped path, its model, its attention backend)."""
    config = problem.config
    if not dist.is_initialized():
        # megatron wants a process group, also for one rank.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    topology = join(config.parallel, rank=0, world_size=1, device=problem.device)
    request = AttentionRequest(
        device_type=problem.device.type,
        dtype=problem.dtype,
        batch=problem.clean.tokens_BL.shape[0],
        rows=Visibility.pair(config.data.seq_len, config.diffusion.block_size),
        num_heads=config.model.num_heads,
        num_kv_heads=config.model.kv_heads,
        head_dim=config.model.head_width,
    )
    chosen = choose(backend, request)
    vocabulary = vocabulary_of(config, size=vocab, mask_id=vocab - 1)
    model = ParallelModel(
        config, vocabulary, topology, backends=dict.fromkeys(block_sizes(config), chosen), dtype=problem.dtype
    )
    batch = pair_batch(problem.clean, [problem.noisy], model.layout).to(problem.device)

    def step() -> Tensor:
        # Both sides make their gradients anew, as after an optimizer step.
        model.root.zero_grad(set_to_none=True)
        weighted_sum = model.chunks[0](batch)[0]
        loss = weighted_sum / problem.tokens
        loss.backward()
        return loss.detach()

    return step, model, chosen.label


def naive_step(
    problem: StepCase, vocab: int, model: ParallelModel, attention: str
) -> tuple[Callable[[], Tensor], nn.Module]:
    """One forward and backward of the form most code ships, with the shipped model's weights."""
    # The same weights under plain names: the comparison is of forms, not of models.
    plain = plain_twin(problem.config, vocab, model).to(problem.device, problem.dtype)
    length, block = problem.config.data.seq_len, problem.config.diffusion.block_size
    attend = NAIVE_ATTENTION[attention](length, block, problem.device)
    ids = torch.cat([problem.noisy.noisy_BL, problem.clean.tokens_BL], dim=1).to(problem.device)
    position = torch.arange(length, device=problem.device).repeat(2)[None]
    target = problem.clean.tokens_BL.to(problem.device)
    weight = problem.noisy.weight_BL.to(problem.device)

    def step() -> Tensor:
        plain.zero_grad(set_to_none=True)
        # All 2 L rows pass every layer and get logits, of which the noisy half's are kept.
        logits = plain.lm_head(run_layers(plain.model, ids, position, attend))[:, :length].float()
        logits = logits.index_fill(-1, torch.tensor([vocab - 1], device=problem.device), float("-inf"))
        log_probs = F.log_softmax(logits, dim=-1)
        loss = -(log_probs.gather(-1, target[..., None])[..., 0] * weight).sum() / problem.tokens
        loss.backward()
        return loss.detach()

    return step, plain


def dense_attention(length: int, block: int, device: torch.device) -> NaiveAttend:
    """SDPA under a (2L)^2 boolean mask."""
    sees = pair_sees(blocks_of(torch.arange(length, device=device)[None], block))[0]

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True).transpose(1, 2)

    return attend


def flex_attention_whole(length: int, block: int, device: torch.device) -> NaiveAttend:
    """FlexAttention over all 2L rows under the same rule."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_noisy, k_noisy = q < length, k < length
        q_block, k_block = (q % length) // block, (k % length) // block
        own = (q_block == k_block) & (q_noisy == k_noisy)
        past = ~k_noisy & (k_block < q_block)
        return own | past

    table = create_block_mask(rule, None, None, 2 * length, 2 * length, device=device.type)
    # Static shapes: the form at its best.
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=table, enable_gqa=True).transpose(1, 2)

    return attend


NAIVE_ATTENTION: Mapping[str, Callable[[int, int, torch.device], NaiveAttend]] = {
    "naive": dense_attention,
    "naive-flex": flex_attention_whole,
}
"""The attention of the form most code ships, by the name under which it is compared."""


def plain_twin(config: Config, vocab: int, model: ParallelModel) -> PlainBD3:
    """The plain model with the parallel model's weights."""
    shape, table = config.model, NameTable(config.model, vocab)
    block_size = config.diffusion.block_size
    plain = PlainBD3(
        plain_config(shape, vocab_size=vocab, seq_len=config.data.seq_len, block_size=block_size, mask_id=vocab - 1)
    )
    state: dict[str, Tensor] = {}
    for name, parameter in model.root.named_parameters():
        state.update(table.to_plain(name, parameter.detach()))
    plain.load_state_dict(state)
    return plain


def check_equal(
    problem: StepCase, losses: tuple[Tensor, Tensor], model: ParallelModel, plain: nn.Module, vocab: int
) -> str:
    """Losses (shipped, naive) and gradients of both sides agree, or the benchmark ends here."""
    ours, theirs = losses
    loss_error = abs(float(ours - theirs)) / float(theirs)
    table, worst = NameTable(problem.config.model, vocab), 0.0
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    for name, parameter in model.root.named_parameters():
        if parameter.grad is None:
            continue
        for plain_name, grad in table.to_plain(name, parameter.grad).items():
            reference = grads[plain_name].float()
            worst = max(worst, float((grad.float() - reference).abs().max() / reference.abs().max()))
    # Before anything is timed.
    if loss_error > LOSS_TOLERANCE[problem.dtype]:
        raise RangeError(f"the two sides disagree: loss {float(ours)} against {float(theirs)}; nothing was timed.")
    return f"loss differs by {loss_error:.1e} (relative), the worst gradient by {worst:.1e} of its largest element"


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("step", __doc__, repeats=5)
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the shipped and naive step on CPU"
    )
    parser.add_argument("--official", type=Path, help="a checkout of kuleshov-group/bd3lms, with --style paper")
    parser.add_argument("--against", choices=tuple(NAIVE_ATTENTION), default="naive")
    parser.add_argument("--backend", default="auto", help="attention backend of the shipped path")
    parser.add_argument("--style", choices=("modern", "paper"), default="modern")
    for name, value in {
        "layers": 4,
        "hidden": 256,
        "heads": 4,
        "kv-heads": 0,
        "ffn": 0,
        "length": 512,
        "block": 16,
        "vocab": 8192,
        "batch": 4,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_step, arguments)


def measure_step(options: argparse.Namespace) -> Iterator[Note]:
    """Compare all forms, then time them, with the allocator as the system ships it and as `bd3 train` sets it."""
    problem = make_problem(options, precision=options.precision)
    ours, model, label = shipped_step(problem, options.vocab, options.backend)
    theirs, plain = naive_step(problem, options.vocab, model, options.against)
    equal = check_equal(problem, (ours(), theirs()), model, plain, options.vocab)
    steps = {"shipped": ours, options.against: theirs}
    if options.official is not None:
        steps["official"] = _official(options, problem, plain)
        if abs(float(steps["official"]() - theirs())) > LOSS_TOLERANCE[problem.dtype] * float(theirs()):
            raise RangeError("the official model's loss is another one; nothing was timed.")
    peaks = {name: peak_bytes(step) for name, step in steps.items()} if options.device == "cpu" else {}
    as_is = harness.interleave(steps, repeats=options.repeats, device=options.device)
    # from here on the process keeps freed memory, and cannot go back
    keep_freed_memory()
    kept = harness.interleave(steps, repeats=options.repeats, device=options.device)
    rows = [
        (
            name,
            harness.milliseconds(as_is[name]),
            harness.milliseconds(kept[name]),
            f"{problem.tokens / statistics.median(kept[name]):,.0f}",
            f"{peaks[name] / harness.MIB:,.0f}" if peaks else "-",
        )
        for name in steps
    ]
    header = ("step", "forward + backward, ms", "ms, freed memory kept", "data tokens/s", "peak beyond weights, MiB")
    notes = [_ratios(name, label, as_is, kept, peaks) for name in steps if name != "shipped"]
    if options.device == "cuda":
        notes.append(f"peak memory of both together {peak_memory_bytes(problem.device) / 2**30:.1f} GiB")
    shape = f"{options.layers} layers, h{options.hidden}, L{options.length}, S{options.block}, V{options.vocab}"
    title = f"step, {shape}, batch {options.batch}, {str(problem.dtype).removeprefix('torch.')}"
    yield Note(title, f"{harness.table(header, rows)}\n\n{'; '.join([*notes, equal])}")


def _ratios(
    name: str,
    label: str,
    as_is: Mapping[str, Sequence[float]],
    kept: Mapping[str, Sequence[float]],
    peaks: Mapping[str, int],
) -> str:
    """How many times as fast the shipped step is, by what is done to the allocator, and its share of the peak."""
    plain, both = (harness.speedup(seconds, "shipped", against=name) for seconds in (as_is, kept))
    ships = statistics.median(as_is[name]) / statistics.median(kept["shipped"])
    said = (
        f"shipped ({label}) is {plain:.2f} times as fast as {name} without keep_freed_memory, {both:.2f} with it for both, "
        f"{ships:.2f} as each ships"
    )
    return said if not peaks else f"{said}, at {peaks['shipped'] / peaks[name]:.2f} of its peak memory"


def peak_bytes(step: Callable[[], Tensor]) -> int:
    """Most bytes alive at once that a step makes, gradients included and weights not."""
    with LiveBytes() as live:
        step()
    return live.peak


def _official(options: argparse.Namespace, problem: StepCase, plain: nn.Module) -> Callable[[], Tensor]:
    if problem.dtype != torch.float32:
        raise UsageError("--official runs in fp32; leave --precision out.")
    model = official_model(options.official, problem.config, plain.state_dict(), options.vocab).to(problem.device)
    ids = torch.cat([problem.noisy.noisy_BL, problem.clean.tokens_BL], dim=1).to(problem.device)
    target, weight = problem.clean.tokens_BL.to(problem.device), problem.noisy.weight_BL.to(problem.device)
    return official_step(model, ids, target, weight, mask_id=options.vocab - 1)


if __name__ == "__main__":
    sys.exit(main())
