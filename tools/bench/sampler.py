"""Times the sampler against a decoder that recomputes as the official one does, and reports its own figures.

    python -m tools.bench.sampler                                 # CPU, GPT-2-small shape, context 960, S 4 and 16
    python -m tools.bench.sampler --block-size 16 --repeats 2
    python -m tools.bench.sampler --device cuda --dtype bfloat16 --batch 1 64 --graphs
    python -m tools.bench.sampler --long 100000                   # memory of a text far beyond the trained length

Both decoders hold the same weights, fill one block a turn behind the same context, and are first held against the plain
model's logits. Targets on CPU: S 4 at least 8x, S 16 at least 7x, 10x aimed at; forwards a token 1.0 with first-hitting.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Iterator, Sequence

import torch

from bd3_megatron.command import CommandParser
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.decoding_options_bd3 import DecodingOptions
from bd3_megatron.hf.forward_bd3 import EagerForward, Forward, ReplayedForward, record_graph
from bd3_megatron.hf.generation_bd3 import BlockEvent, Decoder, Request
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.sampling.figures import copy_bandwidth, weight_bytes
from bd3_megatron.sampling.packed_linear import pack_linear_layers
from tools.bench import harness
from tools.bench.harness import Note
from tools.bench.official_form import OfficialForm

# GPT-2's context, and a text that fills most of it: the cache matters most at its end.
LENGTH, CONTEXT = 1024, 960
TOLERANCE = 2e-4  # fp32 logits of order 1 after 12 layers, sums in another order
OURS, THEIRS = "sampler", "official form"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.run_benchmark(build_parser(), measure_sampler, arguments)


def measure_sampler(options: argparse.Namespace) -> Iterator[Note]:
    """Check both decoders, then time them."""
    if options.long:
        yield Note("a text far beyond the trained length", long_text(options))
    elif options.device == "cpu":
        yield Note(f"time a token, context {CONTEXT}, batch 1, fp32", against_official(options))
    else:
        yield Note(f"tokens a second, context {CONTEXT}, {options.dtype}", throughput(options))


def build_parser() -> CommandParser:
    """The command line."""
    parser = harness.benchmark_parser("sampler", __doc__, repeats=3)
    parser.add_argument("--block-size", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batches for --device cuda")
    parser.add_argument("--vocab-size", type=int, default=50258)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--graphs", action="store_true", help="record and replay forwards (cuda)")
    parser.add_argument("--long", type=int, default=0, metavar="TOKENS", help="generate this many with a tiny model")
    return parser


def new_model(options: argparse.Namespace, block_size: int, *, length: int = LENGTH) -> PlainBD3:
    """A random model in the paper's style; the mask token is the last."""
    config = BD3Config(
        vocab_size=options.vocab_size,
        style="paper",
        num_hidden_layers=options.layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.heads,
        max_position_embeddings=length,
        block_size=block_size,
        mask_token_id=options.vocab_size - 1,
    )
    model = PlainBD3(config).to(device=options.device, dtype=getattr(torch, options.dtype))
    return model.eval().requires_grad_(False)


def packed(model: PlainBD3) -> PlainBD3:
    """The same weights as the sampler holds them on this device."""
    # Packing changes the model in place; the comparison needs the plain one as well.
    own = copy.deepcopy(model)
    pack_linear_layers(own, is_tied=False)
    return own


def new_decoder(model: PlainBD3, *, window: str = "recomputed", with_graphs: bool = False) -> Decoder:
    """First-hitting without filters."""
    forward: Forward = EagerForward(model.model, model.lm_head)
    if with_graphs:
        forward = ReplayedForward(model.model, model.lm_head, record_graph)
    options = DecodingOptions(window=window)
    return Decoder(model.model, model.lm_head, options, mask_id=mask_id_of(model), forward=forward)


def mask_id_of(model: PlainBD3) -> int:
    """The last row of the table."""
    return model.model.shape.vocab_size - 1


def request(model: PlainBD3, num_given: int, num_tokens: int, key: int) -> Request:
    """A prompt of arbitrary tokens."""
    generator = torch.Generator().manual_seed(key)
    given = torch.randint(mask_id_of(model), (num_given,), generator=generator)
    return Request(tuple(given.tolist()), num_tokens, key)


def against_official(options: argparse.Namespace) -> str:
    """The table of --device cpu."""
    rows: list[list[object]] = []
    for size in options.block_size:
        model = new_model(options, size)
        # The block before the context is decided first, untimed: it carries the prompt.
        asked = request(model, CONTEXT - size, (options.repeats + 2) * size, size)
        own = packed(model)
        decoder = new_decoder(own)
        events = decoder.run([asked])
        official = OfficialForm(model, mask_id_of(model), torch.Generator().manual_seed(size))
        first = next(events).tokens
        # Both begin behind the same context.
        official.prefill(torch.tensor([[*asked.ids, *first]]))
        errors = logit_errors(model, own, official, [*asked.ids, *first])
        forwards_before = decoder.counts.denoising
        seconds = harness.interleave(
            {OURS: events.__next__, THEIRS: official.next_block}, repeats=options.repeats, device=options.device
        )
        forwards = (decoder.counts.denoising - forwards_before) / ((options.repeats + 1) * size)
        for name in (OURS, THEIRS):
            ratio = harness.speedup(seconds, name, against=THEIRS)
            a_token = [second / size for second in seconds[name]]
            # The official form needs one forward a token and one more a block to commit it.
            own_forwards = f"{forwards:.3f}" if name == OURS else f"{(size + 1) / size:.3f}"
            rows.append(
                [size, name, harness.milliseconds(a_token), own_forwards, f"{ratio:.2f}x", f"{errors[name]:.1e}"]
            )
    return harness.table(["S", "decoder", "ms a token", "forwards a token", "against", "logit error"], rows)


@torch.inference_mode()
def logit_errors(model: PlainBD3, own: PlainBD3, official: OfficialForm, context: list[int]) -> dict[str, float]:
    """Largest difference of each decoder's logits for the next all-masked block to the plain model's.

    Raises:
        RuntimeError: one of them is wrong, and timing it would mean nothing.
    """
    size = model.model.shape.block_size
    block = torch.full((1, size), mask_id_of(model))
    whole = torch.cat([torch.tensor([context]), block], dim=1)
    plain_1SV = model(whole)[:, -size:]
    errors = {
        OURS: (own(whole)[:, -size:] - plain_1SV).abs().max().item(),
        THEIRS: (official.logits(block) - plain_1SV).abs().max().item(),
    }
    # Before anything is timed: a wrong decoder's speed means nothing.
    if max(errors.values()) > TOLERANCE:
        raise RuntimeError(f"logits differ from the plain model's by {errors}, more than {TOLERANCE}.")
    return errors


def throughput(options: argparse.Namespace) -> str:
    """The table of an accelerator: wall time of whole runs after a first block."""
    rows: list[list[object]] = []
    bandwidth = copy_bandwidth(torch.device(options.device))
    for size in options.block_size:
        model = new_model(options, size)
        read_bytes = weight_bytes(model.model, model.lm_head, model.model.embed_tokens.weight)
        for batch in options.batch:
            decoder = new_decoder(model, with_graphs=options.graphs)
            seconds = [
                timed_run(decoder, [request(model, CONTEXT - 512, 512, key) for key in range(batch)])
                for _ in range(options.repeats + 1)
            ]
            # The first run compiles and records.
            median = statistics.median(seconds[1:])
            tokens = batch * (512 - size)
            # Every forward reads all weights once; a decoder cannot be faster than that.
            bound = (512 - size) * read_bytes / bandwidth / median
            cache_mib = f"{decoder.counts.cache_bytes / 2**20:.0f}"
            rows.append([size, batch, f"{tokens / median:.0f}", f"{bound:.1%}", cache_mib])
    return harness.table(["S", "batch", "tokens a second", "share of weight-read bound", "cache MiB"], rows)


def timed_run(decoder: Decoder, requests: list[Request]) -> float:
    """Wall seconds of a run after its first block (which carries the prompts)."""
    events: Iterator[BlockEvent] = decoder.run(requests)
    for _ in requests:
        next(events)
    start = time.perf_counter()
    for _ in events:
        continue
    return time.perf_counter() - start


def long_text(options: argparse.Namespace) -> str:
    """Peak memory and time while a tiny model writes a long text, in both windows."""
    tiny = argparse.Namespace(**{**vars(options), "vocab_size": 512, "hidden_size": 32, "heads": 2, "layers": 2})
    rows: list[list[object]] = []
    for window in ("recomputed", "evicted"):
        model = new_model(tiny, 16, length=64)
        decoder = new_decoder(model, window=window)
        start, count, early_kib = time.perf_counter(), 0, 0
        for event in decoder.run([request(model, 1, options.long, 1)]):
            count += len(event.tokens)
            # After the first hundredth everything that is made once is made.
            if early_kib == 0 and count >= options.long // 100:
                early_kib = peak_kib()
        seconds = time.perf_counter() - start
        grown_mib = (peak_kib() - early_kib) / 1024
        rows.append(
            [window, count, f"{count / seconds:.0f}", f"{decoder.counts.cache_bytes / 1024:.0f}", f"{grown_mib:.1f}"]
        )
    header = ["window", "tokens", "tokens a second", "cache KiB", "peak memory grown after 1 % of the text, MiB"]
    return harness.table(header, rows)


def peak_kib() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    raise SystemExit(main())
