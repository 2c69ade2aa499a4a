"""Write an exported folder: what transformers, the sampler and other engines load.

Decides the folder's content: config.json with the remote-code map, safetensors (one file, or shards with an index),
generation_config.json, every file of the plain model, and the tokenizer's files where there are any. The folder is
self-contained: loading it needs torch, transformers and safetensors, and nothing of this package. It appears whole or
not at all. Refuses a state whose names or shapes are not exactly the configuration's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bd3_megatron.checkpoint.files import write_safetensors
from bd3_megatron.convert.folder import copy_files, published
from bd3_megatron.errors import ConversionError
from bd3_megatron.files import write_json
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.plain_bd3 import PlainBD3
from bd3_megatron.sampling.folder import MODEL_TYPE

SHARD_BYTES = 8 * 2**30
AUTO_MAP = {
    "AutoConfig": "configuration_bd3.BD3Config",
    "AutoModel": "modeling_bd3.BD3ForMaskedLM",
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
    """Write `state` as a folder that `AutoModelForMaskedLM.from_pretrained(..., trust_remote_code=True)` loads.

    Args:
        state: plain names (see hf/plain_bd3); exactly the parameters of `config`, without `lm_head.weight` when tied.
        config: shape and meaning of the model.
        out: the folder; an older exported folder there is replaced.
        tokenizer_dir: a folder whose tokenizer files are copied; None = the folder has no tokenizer.
        dtype: dtype of the stored weights.

    Returns:
        Names of the tokenizer files copied, sorted.

    Raises:
        ConversionError: a missing, unknown or misshapen parameter, a dtype without a name, or an `out` that is not ours.
    """
    if dtype not in DTYPE_NAMES:
        raise ConversionError(f"dtype={dtype} cannot be exported; use {', '.join(DTYPE_NAMES.values())}.")
    check_state(state, config)
    tensors = {name: tensor.detach().to(device="cpu", dtype=dtype).contiguous() for name, tensor in state.items()}
    with published(Path(out), model_type=MODEL_TYPE) as staging:
        write_json(staging / "config.json", config_json(config, dtype))
        write_json(staging / "generation_config.json", generation_json(config))
        write_weights(tensors, staging)
        copy_files(model_files_dir(), staging, lambda path: path.suffix == ".py" and path.name != "__init__.py")
        if tokenizer_dir is None:
            return []
        return copy_files(Path(tokenizer_dir), staging, is_tokenizer_file)


def model_files_dir() -> Path:
    """Where the files that travel with a folder live."""
    return Path(__file__).resolve().parent.parent / "hf"


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file of a model or tokenizer folder belongs to its tokenizer."""
    if path.name.startswith(".") or path.name in NOT_TOKENIZER_NAMES or path.suffix in NOT_TOKENIZER_SUFFIXES:
        return False
    return not path.name.endswith(".index.json")


def expected_shapes(config: BD3Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored parameter of a configuration, in the model's order."""
    with torch.device("meta"):
        model = PlainBD3(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_state(state: Mapping[str, Tensor], config: BD3Config) -> None:
    """Refuse a state that is not exactly the configuration's.

    Raises:
        ConversionError: names the first offenders.
    """
    expected = expected_shapes(config)
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unknown:
        raise ConversionError(
            f"state lacks {len(missing)} parameters {missing[:3]} and has {len(unknown)} unknown ones {unknown[:3]}; "
            f"it must hold exactly those of style={config.style} with {config.num_hidden_layers} layers."
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ConversionError(
                f"{name} has shape {list(state[name].shape)}; the configuration asks for {list(shape)}."
            )


def config_json(config: BD3Config, dtype: torch.dtype) -> dict[str, object]:
    """Content of config.json. The dtype goes under the key that both transformers 4.5x and 5.x read."""
    described = {name: value for name, value in vars(config).items() if name in CONFIG_FIELDS}
    return {
        "architectures": ["BD3ForCausalLM" if config.objective == "ar" else "BD3ForMaskedLM"],
        "auto_map": dict(AUTO_MAP),
        "model_type": MODEL_TYPE,
        **dict(sorted(described.items())),
        "torch_dtype": DTYPE_NAMES[dtype],
    }


CONFIG_FIELDS = frozenset(
    {
        *("vocab_size", "style", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "intermediate_size", "qk_norm", "tie_word_embeddings", "layer_norm_eps", "rope_theta"),
        *("max_position_embeddings", "block_size", "mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("objective", "residual_dropout", "initializer_range", "logit_alignment", "prefix_attention", "block_grid"),
    }
)


def generation_json(config: BD3Config) -> dict[str, object]:
    """Content of generation_config.json: token ids only; decoding options are arguments of `generate`."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def write_weights(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """model.safetensors, or shards of at most SHARD_BYTES with model.safetensors.index.json."""
    shards: list[dict[str, Tensor]] = [{}]
    filled_bytes = total_bytes = 0
    for name, tensor in tensors.items():
        size_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and filled_bytes + size_bytes > SHARD_BYTES:
            shards.append({})
            filled_bytes = 0
        shards[-1][name] = tensor
        filled_bytes, total_bytes = filled_bytes + size_bytes, total_bytes + size_bytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file_name, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
