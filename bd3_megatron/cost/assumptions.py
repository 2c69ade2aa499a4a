"""What arithmetic on costs must be told about the engine: precision, what is fused, sizes of chunks and buckets."""

from __future__ import annotations

from dataclasses import dataclass

from bd3_megatron.config.schema import Config

FP32 = 4


def head_chunk_bytes(device: str, *, is_sharded: bool = False) -> int:
    """fp32 logits that the head holds at a time on "cuda" or "cpu"; the working set is one and a half of them.

    Args:
        device: type of the device.
        is_sharded: tensor-parallel ranks share the vocabulary.
    """
    if device == "cpu":
        return 32 * 2**20
    # every chunk of a shared vocabulary costs two all-reduces, so that all rows go in one wherever 2 GiB allow
    return 2**31 if is_sharded else 2**29


@dataclass(frozen=True, kw_only=True)
class EngineAssumptions:
    """What arithmetic must be told about the engine; the defaults describe it on a GPU."""

    precision: str = "bf16"
    """bf16 or fp32."""
    fused: bool = True
    """Activation of the MLP fused (GPU); on CPU it is not."""
    head_chunk_bytes: int = head_chunk_bytes("cuda")
    """fp32 logits of the rows that exist at a time; under bf16 half as much again in low precision."""
    reduce_bucket_elements: int = 50_000_000
    """Elements of a ZeRO-2/3 reduction bucket."""

    @property
    def element_bytes(self) -> int:
        return 2 if self.precision == "bf16" else FP32


def engine_assumptions(device: str, config: Config, *, reduce_bucket_elements: int = 50_000_000) -> EngineAssumptions:
    """Assumptions on "cuda" or "cpu" at the configuration's precision."""
    auto = "bf16" if device == "cuda" else "fp32"
    precision = auto if config.train.precision == "auto" else config.train.precision
    return EngineAssumptions(
        precision=precision,
        fused=device == "cuda",
        head_chunk_bytes=head_chunk_bytes(device, is_sharded=config.parallel.tp > 1),
        reduce_bucket_elements=reduce_bucket_elements,
    )
