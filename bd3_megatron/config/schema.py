"""The shape of a run's configuration: frozen dataclasses, every field documented under itself with its unit.

Each field has one name, one type, one legal range and one default, all of them here; configs/README.md is generated from
this file. A field whose default is null is derived (its text says how, a property here computes it) or switched off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from bd3_megatron.config.axes import AxesConfig
from bd3_megatron.config.data import DataConfig
from bd3_megatron.config.experts import ExpertsConfig
from bd3_megatron.config.ranges import MOST_STEPS, MOST_TOKENS, Matches, PathText, Range
from bd3_megatron.diffusion.constants import MIN_T, SEARCH_WIDTHS

NoiseLevel = Annotated[float, Range(MIN_T, 1)]
Decay = Annotated[float, Range(0, 1, open_upper=True)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: PathText
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, logs. Relative paths are relative to the caller."""
    # the key of the counter-based generator has 48 bits
    seed: Annotated[int, Range(0, 2**48 - 1)] = 1
    """Seeds initial weights, data order and noise; each draws from its own purpose of the counter-based generator."""
    overridden: tuple[str, ...] = ()
    """Keys that were named on the command line (filled in when the file is loaded): a resumed run may change these."""
    reinterpret: bool = False
    """Resume although a setting changed that gives the stored weights another meaning (heads, norms, rotary base, objective,
    special ids, tokenizer); heeded only where the command line names it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    style: Literal["paper", "modern"] = "modern"
    """paper: LayerNorm, biased tanh-GELU MLP, bias-free attention, head with bias. modern: RMSNorm, SwiGLU, no bias."""
    # launchers list the layers of every stage, so their number is bounded
    num_layers: Annotated[int, Range(1, 10_000)]
    """Transformer layers over all pipeline stages."""
    hidden_size: Annotated[int, Range(1, 1e6)]
    """Width D of the residual stream."""
    num_heads: Annotated[int, Range(1, 10_000)]
    """Query heads N."""
    num_kv_heads: Annotated[int, Range(1, 10_000)] | None = None
    """Key/value heads G (grouped-query attention); null: as many as query heads."""
    # rotary positions turn channels in pairs
    head_dim: Annotated[int, Range(2, 10_000, even=True)] | None = None
    """Channels H of one head; null: hidden_size / num_heads."""
    ffn_hidden_size: Annotated[int, Range(1, 1e7)] | None = None
    """MLP width; null: 4 D (paper), or 8/3 D rounded up to a multiple of 64 (modern), equal in parameters."""
    qk_norm: bool = False
    """RMSNorm on queries and keys per head (modern style only), as Qwen3 has it."""
    tie_embeddings: bool = False
    """One table for embedding and head. The paper's code keeps two although its yaml says otherwise."""
    dropout: Annotated[float, Range(0, 1, open_upper=True)] = 0.0
    """Probability of dropping a residual-branch output (the paper trains with 0.1); none on attention weights."""
    # at 1 all channels turn at one speed, below it the last ones turn fastest
    rope_base: Annotated[float, Range(1, 1e12, open_lower=True)] = 10000.0
    """Base of the rotary frequencies."""
    # LLaDA2 has 0.5
    rotary_fraction: Annotated[float, Range(1e-4, 1)] = 1.0
    """Share of a head's channels, the first ones, that positions turn; the rest carry none."""
    # 0 would divide by 0 where a row is constant
    layer_norm_eps: Annotated[float, Range(1e-12, 0.1)] = 1e-5
    """Added to the variance in every norm."""
    # from matrices of zeros no gradient comes, and the logits' products of far smaller ones vanish in fp32
    init_std: Annotated[float, Range(1e-8, 1)] = 0.02
    """Standard deviation of initial matrices; residual projections get init_std / sqrt(2 num_layers)."""
    # the mask id and one id to mask
    vocab_size: Annotated[int, Range(2, 1e8)] | None = None
    """Ids the model knows, mask id included; null: what the prepared data's tokenizer says."""
    vocab_multiple: Annotated[int, Range(1, 1e6)] = 128
    """Table rows are padded to this multiple; must be a multiple of tp, and stays fixed when a run changes its grid."""
    experts: ExpertsConfig | None = None
    """Mixture of experts in place of the MLP (modern style only); null: dense."""

    @property
    def rotary_width(self) -> int:
        """Channels of a head that positions turn."""
        return round(self.head_width * self.rotary_fraction)

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer`, from 0, is a mixture of experts."""
        return self.experts is not None and layer >= self.experts.leading_dense_layers

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ffn_width(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return 4 * self.hidden_size if self.style == "paper" else -(-8 * self.hidden_size // 3 // 64) * 64


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    block_size: Annotated[int, Range(1, 1e8)]
    """Diffusion block S of this phase."""
    steps: Annotated[int, Range(1, MOST_STEPS)] | None = None
    """Length in optimizer steps; the last phase may leave both out and runs to the end."""
    tokens: Annotated[int, Range(1, MOST_TOKENS)] | None = None
    """Length in clean tokens, instead of steps."""
    interval: tuple[NoiseLevel, NoiseLevel] | None = None
    """Clipped noise interval of this phase, which no search changes; null: diffusion.interval, or what a search finds."""
    axes: AxesConfig | None = None
    """Axes of this phase, all of them; null: diffusion.axes."""
    # factors above 1 are a way to start anew with a higher rate
    lr_start: Annotated[float, Range(0, 1000)] = 1.0
    """Factor on the learning rate at the phase's first update."""
    lr_end: Annotated[float, Range(0, 1000)] = 1.0
    """Factor it tends to, linearly, at the phase's end."""
    lr_warmup_steps: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Updates at the phase's beginning over which the factor rises from 0."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    # others compare nothing with these names: config/objective.py makes the object
    objective: Literal["block", "ar"] = "block"
    """block: block diffusion (S = seq_len is MDLM). ar: next-token prediction, causal, through the same engine."""
    block_size: Annotated[int, Range(1, 1e8)] = 16
    """Tokens S denoised together; any divisor of seq_len."""
    noise_schedule: Literal["loglinear", "cosine", "square", "sqrt", "log"] = "loglinear"
    """Mask probability as a function of t; loglinear is p = t."""
    interval: tuple[NoiseLevel, NoiseLevel] | None = None
    """Noise levels are drawn from [beta, omega] (clipped schedule).
    null: [1e-3, 1], and [1, 1] (everything masked, the exact likelihood) at block size 1."""
    resample: bool = False
    """Redraw blocks whose masked fraction leaves the interval, as the paper does. Biases the loss: off by default."""
    never_mask_first: bool = False
    """Keep position 0 visible (the paper's ignore_bos)."""
    axes: AxesConfig = field(default_factory=AxesConfig)
    """What else an objective decides, an axis a key; the defaults are BD3-LM."""
    views: Annotated[int, Range(1, 1000)] = 1
    """Noisy copies that share one clean pass."""
    search_every_steps: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Search the variance-minimising interval this often; 0: never."""
    # the paper scores a hundred of them
    search_batches: Annotated[int, Range(1, 1e6)] = 100
    """Held-out batches of global_batch_size scored in one search; fewer where less text is held out."""
    # narrower intervals hold too few draws to be compared; 1 is the full interval, a candidate in every search
    search_widths: tuple[Annotated[float, Range(0.01, 1, open_upper=True)], ...] = SEARCH_WIDTHS
    """Widths of the candidate intervals."""
    phases: tuple[PhaseConfig, ...] = ()
    """Curriculum over block sizes; empty: one phase with block_size."""

    def interval_at(self, block_size: int) -> tuple[float, float]:
        """The interval in force where a phase names none."""
        if self.interval is not None:
            return self.interval
        return (1.0, 1.0) if block_size == 1 else (MIN_T, 1.0)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    backend: Literal["auto", "dense", "structured", "flex", "triton"] = "auto"
    """auto takes the fastest backend that accepts the request; dense is the reference implementation."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tp: Annotated[int, Range(1, 1000)] = 1
    """Tensor-parallel ranks: matrices and vocabulary are cut."""
    pp: Annotated[int, Range(1, 1000)] = 1
    """Pipeline stages."""
    vpp: Annotated[int, Range(1, 1000)] | None = None
    """Model chunks per pipeline stage (interleaved schedule); null: one."""
    cp: Annotated[int, Range(1, 10_000)] = 1
    """Context-parallel ranks: both streams are cut along the sequence."""
    ep: Annotated[int, Range(1, 4096)] = 1
    """Expert-parallel ranks: experts are dealt to neighbouring ranks of a pipeline stage, over tp, cp and dp."""
    dp: Annotated[int, Range(1, 1e6)] | None = None
    """Data-parallel replicas; null: what the other axes leave of the world (1 when started locally)."""
    sequence_parallel: bool = False
    """Cut the residual stream along the sequence between tensor-parallel regions."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage; 0 means 1, because DeepSpeed's own stage 0 gets the gradient norm wrong."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory."""
    overlap_grad_reduce: bool = True
    """Sum gradients over data-parallel ranks during the last backward (ZeRO 1); off: all at its end."""
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """What sums of gradients over data-parallel ranks travel in (ZeRO 1); bf16 halves the bytes and rounds each partial sum."""
    layers_per_stage: tuple[Annotated[int, Range(1, 10_000)], ...] = ()
    """Layers of each pipeline stage; empty: balanced, with embedding and head counted as layers' work."""
    # twice watch.hang_seconds: a collective that gives up first names no rank
    collective_timeout_seconds: Annotated[int, Range(1, 1e6)] = 1200
    """A rank that waits longer than this in a collective fails by name; the watchdog must speak first (watch.hang_seconds)."""

    @property
    def model_ranks(self) -> int:
        return self.tp * self.pp * self.cp

    @property
    def replicas(self) -> int:
        """dp, or where it is open as few as expert-parallel ranks need: one without them."""
        return self.dp or self.ep // math.gcd(self.ep, self.tp * self.cp)

    def world_size(self) -> int:
        return self.model_ranks * self.replicas


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: Annotated[int, Range(1, MOST_STEPS)] | None = None
    """Optimizer updates of the whole run."""
    tokens: Annotated[int, Range(1, MOST_TOKENS)] | None = None
    """Clean tokens of the whole run, instead of steps."""
    global_batch_size: Annotated[int, Range(1, 1e7)] = 512
    """Sequences per optimizer update over all ranks."""
    # memory of activations grows with it, results do not depend on it
    micro_batch_size: Annotated[int, Range(1, 1e6)] = 1
    """Sequences per forward pass of one rank."""
    warmup_batch_size: Annotated[int, Range(1, 1e7)] | None = None
    """Start with this many sequences a step and grow linearly, in multiples of it, to global_batch_size; null: no warm-up."""
    batch_warmup_steps: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Steps of the batch-size warm-up."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPU, fp32 on CPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Computed again in the backward, not kept: norms, attention and MLP activation (selective), whole layers (full)."""
    recompute_layers: Annotated[int, Range(1, 10_000)] | None = None
    """So many first layers of each pipeline stage (of each chunk where interleaved) do so; null: all."""
    skip_dead_rows: bool = True
    """Compute only what the loss can see; off computes every row of every layer, for debugging."""
    # a loss at the median is no spike
    spike_factor: Annotated[float, Range(1, 1e6, open_lower=True, or_zero=True)] = 0.0
    """A loss above this multiple of the recent steps' median is a spike (ZeRO 1 only); 0: nobody looks."""
    spike_action: Literal["skip", "rollback"] = "skip"
    """skip: leave the batch out. rollback: return to the newest checkpoint and go on behind the batch."""
    max_skipped_steps: Annotated[int, Range(1, MOST_STEPS)] = 10
    """So many updates in a row that had to be left out (loss or gradient not finite, or a spike) end the run."""
    stop_file: PathText | None = None
    """Training saves and stops when this file appears, and removes it."""

    @property
    def recomputes(self) -> bool:
        """Something is computed again in the backward."""
        return self.recompute != "none"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["auto", "torch", "apex"] = "auto"
    """AdamW of torch, fused (auto, torch), or NVIDIA Apex's where it is installed."""
    # far beyond any rate that trains, on both sides: the bounds are there for slips of the exponent
    lr: Annotated[float, Range(1e-12, 1000)] = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "wsd", "inverse_sqrt"] = "constant"
    """After the warm-up; wsd: stable, then linear decay over the last decay_fraction of the run."""
    warmup_steps: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Linear warm-up; step 0 uses lr / warmup_steps (the official code's first step has lr 0)."""
    # below 0 the schedule would end in gradient ascent
    min_lr_ratio: Annotated[float, Range(0, 1)] = 0.0
    """Final learning rate as a share of lr (cosine, wsd)."""
    decay_fraction: Annotated[float, Range(0, 1)] = 0.1
    """Share of the steps in which wsd decays."""
    # at 1 a moment never forgets its first value, which is 0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's moment decays."""
    # far smaller ones vanish in fp32, and 0 / 0 follows where a gradient was always 0
    adam_eps: Annotated[float, Range(1e-30, 1)] = 1e-8
    """Adam's denominator term."""
    weight_decay: Annotated[float, Range(0, 1000)] = 0.0
    """Decoupled decay of matrices and tables; norms and biases are never decayed."""
    # clipped to far less, gradients vanish beside adam_eps
    clip_grad_norm: Annotated[float, Range(1e-8, 1e9, or_zero=True)] = 1.0
    """Global gradient norm is clipped to this; 0: never."""
    # at 1 the average would stay at the initial weights
    ema_decay: Decay = 0.9999
    """Exponential moving average of the fp32 parameters, warmed up as min(decay, (1+n)/(10+n)); 0: none."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: Annotated[int, Range(0, MOST_STEPS)] = 1000
    """Save this often, and at the end; 0: only at the end."""
    keep_last: Annotated[int, Range(0, 1e6)] = 2
    """Newest checkpoints kept, and the newest one that is known to give a finite loss; 0: all."""
    keep_every_steps: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Checkpoints at multiples of this are never deleted; 0: none is special."""
    asynchronous: bool = False
    """Write while the next steps run."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every_steps: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Evaluate held-out perplexity this often; 0: never during training."""
    # an evaluation of nothing would divide by 0
    num_sequences: Annotated[int, Range(1, 1e9)] = 256
    """Held-out sequences scored in one evaluation; of a mixture, as many of each part."""
    draws: Annotated[int, Range(1, 1e6)] = 1
    """Noise draws per sequence, stratified in t."""
    at_start_and_end: bool = False
    """Also evaluate before the first step and after the last."""
    official: bool = False
    """The official code's conventions: one draw, t in [1e-3, 1], the first token not counted."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: Annotated[int, Range(1, MOST_STEPS)] = 10
    """Write a record (and print) this often."""
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Mirror metrics.jsonl to Weights & Biases."""
    # what the tracker itself refuses, but only after the model is built
    wandb_project: Annotated[str, Matches(r"[^/\\#?%:\s]{1,128}", "a name without blanks and / \\ # ? % :")] = (
        "bd3_megatron"
    )
    """Project name there."""
    tensorboard: bool = False
    """Mirror metrics.jsonl to TensorBoard event files where that package is installed."""
    profile_steps: tuple[Annotated[int, Range(1, MOST_STEPS)], ...] = ()
    """Steps whose torch profiler trace is written to run.dir/profile."""


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    peak_tflops: Annotated[float, Range(1e-6, 1e9)] | None = None
    """Peak of one device at the training precision; null: from the table of known devices, measured on CPU."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    preflight: bool = True
    """Check versions, devices, collectives and the run folder on all ranks before the first step."""
    leak_check: bool = True
    """Prove by autograd, before the first step, that no noisy block sees what it must not."""
    # below 1 the limit would lie under the usual step
    hang_factor: Annotated[float, Range(1, 1e6, or_zero=True)] = 0.0
    """Fail with every rank's stacks when a step takes this multiple of the median; 0: off."""
    # an evaluation or a save counts as a step; see the table of times in README.md
    hang_seconds: Annotated[float, Range(0.1, 1e7)] = 600.0
    """Least time a step may take before it counts as hung."""


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    throughput: ThroughputConfig = field(default_factory=ThroughputConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
