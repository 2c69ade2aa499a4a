"""Write an exported folder: what transformers, the sampler and other engines load.

It holds config.json with the remote-code map, generation_config.json, safetensors, every file of the plain model and the
tokenizer's files where there are any; loading it needs torch, transformers and safetensors, and nothing of this package.
Parameters whose names or shapes are not exactly the configuration's are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.convert.folder import copy_files, published
from bd3_megatron.convert.plain_source import PlainSource, StateSource
from bd3_megatron.convert.stream import SHARD_BYTES, stream_weights
from bd3_megatron.data.special_ids import check_special_ids
from bd3_megatron.diffusion.objective import objective_named
from bd3_megatron.errors import ConversionError, counted
from bd3_megatron.files import write_json, write_text
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.sampling.folder import MODEL_TYPE

AUTO_MAP = {
    "AutoConfig": "configuration_bd3.BD3Config",
    "AutoModel": "modeling_bd3.BD3Model",
    "AutoModelForMaskedLM": "modeling_bd3.BD3ForMaskedLM",
    "AutoModelForCausalLM": "modeling_bd3.BD3ForCausalLM",
}
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
# Files of a model folder that are not its tokenizer.
NOT_TOKENIZER_NAMES = frozenset({"config.json", "generation_config.json", "training_args.json", "README.md"})
NOT_TOKENIZER_SUFFIXES = frozenset({".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".h5", ".msgpack", ".py", ".md"})


def write_folder(
    state: Mapping[str, Tensor],
    config: BD3Config,
    out: Path,
    *,
    tokenizer_dir: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """`stream_folder` of a state in memory.

    Args:
        state: plain names (see hf/plain_bd3.py); exactly the parameters of `config`, without `lm_head.weight` when tied.
        config, out, tokenizer_dir, dtype: as `stream_folder`.
    """
    return stream_folder(StateSource(state), config, out, tokenizer_dir=tokenizer_dir, dtype=dtype)


def stream_folder(
    source: PlainSource,
    config: BD3Config,
    out: Path,
    *,
    tokenizer_dir: Path | None = None,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    card: str | None = None,
    check: Callable[[Path], object] | None = None,
) -> list[str]:
    """Write a folder that `AutoModelForMaskedLM.from_pretrained(..., trust_remote_code=True)` loads.

    Args:
        source: exactly the parameters of `config`.
        config: shape and meaning of the model.
        out: the folder; an older exported folder there is replaced.
        tokenizer_dir: whose tokenizer files are copied; None: none.
        dtype: of the stored weights.
        shard_bytes: size of one weight file.
        card: text of README.md; None: none is written.
        check: called with the finished folder before it gets its name; its error keeps `out` as it was.

    Returns:
        Names of the tokenizer files copied, sorted.

    Raises:
        ConversionError: a missing, unknown or misshapen parameter, a dtype without a name, or an `out` that is not ours.
        TokenizerError: special ids that no model can have.
        FileError: `out` cannot be written, or another process is writing it.
    """
    if dtype not in DTYPE_NAMES:
        raise ConversionError(f"dtype={dtype} cannot be exported; use {', '.join(DTYPE_NAMES.values())}.")
    # Before the first byte: a mask that is another special token cannot be seen in the weights.
    check_ids(config, "the model")
    shapes = checked_shapes(source, config)
    with published(Path(out), model_type=MODEL_TYPE) as staging:
        write_json(staging / "config.json", config_json(config, dtype))
        write_json(staging / "generation_config.json", generation_json(config))
        stream_weights(staging, shapes, source.tensor, dtype=dtype, shard_bytes=shard_bytes)
        copy_files(model_files_dir(), staging, is_model_file)
        if card is not None:
            write_text(staging / "README.md", card)
        copied = [] if tokenizer_dir is None else copy_files(Path(tokenizer_dir), staging, is_tokenizer_file)
        # Before the rename: what does not prove equal is never seen under its name.
        if check is not None:
            check(staging)
    return copied


def check_ids(config: BD3Config, where: str) -> None:
    """Refuse special ids outside the vocabulary, and a mask that is another special token too.

    Raises:
        TokenizerError: names them.
    """
    ids = {name: getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad", "mask")}
    check_special_ids(ids, config.vocab_size, where)


def model_files_dir() -> Path:
    """Where the files that travel with a folder live."""
    return Path(__file__).resolve().parent.parent / "hf"


def is_model_file(path: Path) -> bool:
    """Whether a file of the folder above is one of those that travel."""
    is_foreign = path.stem.startswith("configuration_") and path.stem != "configuration_bd3"
    return path.suffix == ".py" and path.name != "__init__.py" and not is_foreign


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file of a model or tokenizer folder belongs to its tokenizer."""
    if path.name.startswith(".") or path.name in NOT_TOKENIZER_NAMES or path.suffix in NOT_TOKENIZER_SUFFIXES:
        return False
    return not path.name.endswith(".index.json")


def expected_shapes(config: BD3Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored parameter of a configuration, in the model's order."""
    # The model's own parameters, without memory: the list cannot differ from what loads it.
    with torch.device("meta"):
        model = PlainBD3(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def checked_shapes(source: PlainSource, config: BD3Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of `config`, after comparing them with the source's.

    Raises:
        ConversionError: names the first parameters that differ.
    """
    expected, there = expected_shapes(config), set(source.names())
    missing, unknown = sorted(set(expected) - there), sorted(there - set(expected))
    if missing or unknown:
        raise ConversionError(
            f"the source lacks {counted(len(missing), 'parameter')} {missing[:3]} and has {len(unknown)} unknown {unknown[:3]}; "
            f"it must hold exactly those of style={config.style} with {counted(config.num_hidden_layers, 'layer')}."
        )
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ConversionError(
                f"{name} has shape {list(source.shape(name))}; the configuration asks for {list(shape)}."
            )
    return expected


def config_json(config: BD3Config, dtype: torch.dtype) -> dict[str, object]:
    """Content of config.json. The dtype goes under the key that both transformers 4.5x and 5.x read."""
    # Only our own fields: transformers' configurations carry dozens of defaults of its version.
    described = {name: value for name, value in vars(config).items() if name in CONFIG_FIELDS}
    return {
        "architectures": ["BD3ForCausalLM" if not objective_named(config.objective).has_noise else "BD3ForMaskedLM"],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        **dict(sorted(described.items())),
        # Read by 4.5x and 5.x alike; 5.x alone would say dtype.
        "torch_dtype": DTYPE_NAMES[dtype],
    }


CONFIG_FIELDS = frozenset(
    {
        *("vocab_size", "style", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "intermediate_size", "qk_norm", "tie_word_embeddings", "layer_norm_eps", "rope_theta"),
        *("max_position_embeddings", "block_size", "mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("objective", "residual_dropout", "initializer_range", "logit_alignment", "prefix_attention", "block_grid"),
        *("partial_rotary_factor", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("shared_expert_intermediate_size", "first_k_dense_replace", "score_function", "norm_topk_prob", "n_group"),
        *("topk_group", "routed_scaling_factor", "router_bias", "evaluation"),
        "tokenizer_fingerprint",
    }
)


def generation_json(config: BD3Config) -> dict[str, object]:
    """Content of generation_config.json: token ids, and the model's own distribution, which is no default of transformers."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    drawn: dict[str, object] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return drawn | {name: value for name, value in ids.items() if value is not None}
