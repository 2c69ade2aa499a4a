"""What docstrings and the front-page documents name in backticks exists: files, names of code, configuration keys, commands.

A file is looked for from the repository, the package and the folder of the docstring; a name among what the file itself says
and what it could import. What stands elsewhere (upstream files, files that a run writes, foreign names) is listed here.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.source_tree import ROOT, SHIPPED, Source, docstrings, dotted, imported_modules, sources

DOCUMENTS = ("README.md", ".github/CONTRIBUTING.md")
CODE = (*SHIPPED, "tests")
SCHEMA = "bd3_megatron/config/schema.py"
QUOTED = re.compile(r"``?([^`]+)``?")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[\w./*{}<>-]*\w\.(?:py|md|ya?ml|jsonl?|sh|txt|jinja|csv|idx|bin|safetensors|pt|html|png)\b")
OPTION = re.compile(r"--[a-z][a-z-]+")
PROGRAMS = {"bd3", "python", "bash", "torchrun"}

UPSTREAM_FILES = {
    "distributed/tensor/experimental/_context_parallel/_attention.py": "torch",
    "nn/attention/flex_attention.py": "torch",
    "torch/_weights_only_unpickler.py": "torch",
    "torch/serialization.py": "torch",
    "deepspeed/checkpoint/constants.py": "deepspeed",
    "deepspeed/checkpoint/ds_to_universal.py": "deepspeed",
    "ds_to_universal.py": "deepspeed/checkpoint",
    "universal_checkpoint.py": "deepspeed/checkpoint",
    "runtime/bf16_optimizer.py": "deepspeed",
    "runtime/checkpoint_engine/checkpoint_engine.py": "deepspeed",
    "runtime/zero/stage_1_and_2.py": "deepspeed",
    "stage3.py": "deepspeed/runtime/zero",
    "megatron/core/datasets/indexed_dataset.py": "megatron/core",
    "mlp.py": "megatron/core/transformer",
    "p2p_communication.py": "megatron/core/pipeline_parallel",
    "parallel_state.py": "megatron/core",
    "pipeline_parallel/schedules.py": "megatron/core",
    "tensor_parallel/layers.py": "megatron/core",
    "tensor_parallel/mappings.py": "megatron/core",
    "tensor_parallel/random.py": "megatron/core",
    "transformer/attention.py": "megatron/core",
    "transformer/torch_norm.py": "megatron/core",
    "transformer_layer.py": "megatron/core/transformer",
    "utils.py": "megatron/core",
    "configuration_llama.py": "transformers/models/llama",
    "configuration_qwen2.py": "transformers/models/qwen2",
    "configuration_qwen3.py": "transformers/models/qwen3",
}
"""File as a docstring names it -> folder of the installed packages it is relative to (or that its own path begins with)."""

UPSTREAM_ELSEWHERE = {
    "diffusion.py": "kuleshov-group/bd3lms",
    "metrics.py": "kuleshov-group/bd3lms",
    "noise_schedule.py": "kuleshov-group/bd3lms",
    "models/dit.py": "kuleshov-group/bd3lms",
    "models/ema.py": "kuleshov-group/bd3lms",
    "configuration_bd3lm.py": "kuleshov-group's folders on the Hub",
    "modeling_bd3lm.py": "kuleshov-group's folders on the Hub",
    "configuration_sdar.py": "JetAstra/SDAR's folders on the Hub",
    "modeling_llada2_moe.py": "inclusionAI's folders on the Hub",
    "lmdeploy/pytorch/configurations/sdar.py": "InternLM/lmdeploy",
    "pytorch/configurations/sdar.py": "InternLM/lmdeploy",
    "python/sglang/srt/dllm/config.py": "sgl-project/sglang",
    "training/training.py": "NVIDIA/Megatron-LM, which the package megatron-core leaves out",
}
"""File -> the project that has it; none of them is installed beside the tests."""

WRITTEN = {
    "a run": {
        "config.yaml",
        "config.N.yaml",
        "metrics.jsonl",
        "status.json",
        "rank-N.txt",
        "lease.json",
        "job.json",
        "job.sh",
    },
    "a checkpoint": {
        "manifest.json",
        "rank_00003.json",
        "fp32.pt",
        "step.pt",
        "optimizer_state.pt",
        "mp_rank_00_model_states.pt",
    },
    "a timeline": {"step_STEP_rank_RANK.json"},
    "a data set": {"header.json", "part-00000.bin", "part-00000.idx", "PREFIX.bin", "PREFIX.idx"},
    "a tokenizer": {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    },
    "an exported folder": {"config.json", "generation_config.json", "model.safetensors", "README.md"},
    "tests/run.sh --mutations": {"mutations.md"},
    "a report": {"report.html", "results.md", "results.json", "samples.txt"},
    "the user": {"book.txt", "a.txt", "corpus.jsonl", "chats.jsonl", "NAME.yaml", "NAME.md"},
}
"""Files that are made, not shipped: who makes them -> their names, without folders."""

FOREIGN_NAMES = {
    "AutoModelForCausalLM": "transformers",
    "AutoModelForMaskedLM": "transformers",
    "trust_remote_code": "transformers",
    "set_seed": "transformers",
    "generate": "transformers' method of every model that can",
    "_convert_mask_to_block_mask": "torch.nn.attention.flex_attention",
    "WrappedTorchNorm": "megatron.core.transformer.torch_norm",
    "sampling_eps": "a configuration key of kuleshov-group/bd3lms",
    "errno": "the attribute of OSError",
    "Annotated": "typing",
    "initialize": "deepspeed",
    "initialize_model_parallel": "megatron.core.parallel_state",
}
"""Names that the shipped code never says, and where they are."""

LITERALS = {
    "base:": "the one key of a configuration file that is no section",
    "field: a -> b": "the form of a line of output",
    ".NAME.partial": "the form of a folder's name",
    ".logits": "an attribute of whatever model is given",
    "model.": "the prefix of a state dictionary's keys",
    "backbone.*": "a pattern of a state dictionary's keys",
    "decoder.layers.<layer of the whole model>...": "a pattern of a state dictionary's keys",
    "<svg>": "an element of SVG",
    '"event": "start"': "a line of metrics.jsonl",
    'with span("forward"):': "a statement",
    "apptainer exec": "a site's command",
    "module load": "a site's command",
    "sbatch --test-only": "SLURM's command",
    "touch FILE": "a command of every shell",
    "KillWait": "a setting of SLURM",
    "scancel": "SLURM's command",
    ".venv": "the folder that tests/run.sh makes",
    "builtin:NAME": "the form of a source of text",
    "builtin:python-docs": "a source of text that every Python has",
    "package: imperative subject": "the form of a commit's first line",
    "fast": "the kind that tokenizer_fast.py writes down",
    "wide": "a case of tools/bench/plan.py",
    "_b": "the end of a variable's name in the kernels",
    "_r": "the end of a variable's name in the kernels",
    "_h": "the end of a variable's name in the kernels",
}
"""What is no name, no file and no command of ours, with the reason why a sentence quotes it."""


def members(owner: ast.Module | ast.ClassDef) -> set[str]:
    """Names that a file or a class defines at its own level."""
    found: set[str] = set()
    for node in owner.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


@cache
def owners() -> dict[str, set[str]]:
    """What may stand left of a dot -> what may stand right of it: files by their stem, folders, classes, sections of a config."""
    found: dict[str, set[str]] = {}
    for source in sources(*SHIPPED):
        path = Path(source.path)
        found.setdefault(path.stem, set()).update(members(source.tree))
        found.setdefault(path.parent.name, set()).add(path.stem)
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef):
                own = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and dotted(n.value) == "self"}
                found.setdefault(node.name, set()).update(members(node) | own)
    for section, name in sections():
        found.setdefault(section, set()).update(found[name])
    return found


def sections() -> Iterator[tuple[str, str]]:
    """(key, class) of every section of a run's configuration."""
    schema = next(s for s in sources(*SHIPPED) if s.path == SCHEMA)
    config = next(n for n in schema.tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    for field in config.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.annotation, ast.Name):
            yield dotted(field.target), field.annotation.id


@cache
def importable() -> frozenset[str]:
    """Every name that a file may import or take from an object, libraries and the values of configuration keys included."""
    libraries = {m.split(".")[0] for s in sources(*CODE) for m, _ in imported_modules(s)}
    values = said_in_code(next(s for s in sources(*SHIPPED) if s.path == SCHEMA))
    return frozenset(
        libraries.union(
            owners(), *owners().values(), values, dir(builtins), FOREIGN_NAMES, ("self", "cls", "true", "false", "null")
        )
    )


@cache
def said_in_code(source: Source) -> frozenset[str]:
    """What a file says in code: names, attributes, arguments, keywords, imported names and whole string constants."""
    said: set[str] = set()
    for node in source.nodes:
        for field in ("id", "attr", "arg", "name", "asname", "module", "value"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                said |= {value, *value.split(".")}
    return frozenset(said)


def file_exists(text: str, folder: Path) -> bool:
    """Whether a file that a sentence names is shipped, made, or upstream (looked up where that package is installed)."""
    name = text.split(":")[0]
    if any((base / name).is_file() for base in (ROOT, ROOT / "bd3_megatron", folder)):
        return True
    if name in UPSTREAM_FILES:
        found = find_spec(UPSTREAM_FILES[name].split("/")[0])
        base = Path(next(iter(found.submodule_search_locations))).parent if found else ROOT
        return (base / name).is_file() or (base / UPSTREAM_FILES[name] / name).is_file()
    return name in UPSTREAM_ELSEWHERE or any(Path(name).name in made for made in WRITTEN.values())


def unknown_names(code: ast.AST, said: frozenset[str]) -> Iterator[str]:
    """Names of a piece of code that neither the file says nor another file defines."""
    known = said | importable()
    for node in ast.walk(code):
        if isinstance(node, ast.Name) and len(node.id) > 1 and node.id not in known:
            yield node.id
        elif isinstance(node, ast.keyword) and node.arg is not None and node.arg not in known:
            yield node.arg
        elif isinstance(node, ast.Attribute):
            left = dotted(node.value).rpartition(".")[2]
            # `visibility.clean_rows`: where the file has a variable of that name, it need not be the file visibility.py
            owned = importable() if left in said else owners().get(left, importable())
            if node.attr not in said | owned | set(FOREIGN_NAMES):
                yield ast.unparse(node)


def unknown_in_command(words: list[str]) -> Iterator[str]:
    """What this repository does not have of a command line: the file, the module, the subcommand, the options."""
    spoken = frozenset().union(*(said_in_code(s) for s in sources(*SHIPPED)))
    cli = next(said_in_code(s) for s in sources(*SHIPPED) if s.path == "bd3_megatron/cli.py")
    if words[0] == "bd3" and not words[1].startswith("-") and words[1] not in cli:
        yield f"bd3 {words[1]}"
    if words[0] in ("python", "bash"):
        target = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        if not (ROOT / target).is_file():
            yield target
    scripts = " ".join(p.read_text("utf-8") for p in (*(ROOT / "tests").glob("*.sh"), *(ROOT / "launch").glob("*.sh")))
    yield from (o for o in OPTION.findall(" ".join(words)) if o not in spoken and o not in scripts)


def unknown_in(text: str, said: frozenset[str], folder: Path) -> list[str]:
    """What does not exist of a text in backticks."""
    text = " ".join(text.split())
    words = text.split(" ")
    if text in said or text in LITERALS or text in PROGRAMS:
        return []
    if words[0] in PROGRAMS and len(words) > 1:
        return list(unknown_in_command(words))
    if FILE.match(words[0]) or OPTION.match(words[0]):
        options = unknown_in_command(["", *words])
        return [*options, *([] if OPTION.match(words[0]) or file_exists(words[0], folder) else [words[0]])]
    if "/" in text and " " not in text:
        places = (ROOT / text, ROOT / f"{text}.py", ROOT / "bd3_megatron" / text, ROOT / f"bd3_megatron/{text}.py")
        return [] if any(p.exists() for p in (*places, folder / text)) else [text]
    try:
        return list(unknown_names(ast.parse(text), said))
    except SyntaxError:
        return [text]


def test_what_docstrings_name_in_backticks_exists() -> None:
    wrong = []
    for source in sources(*SHIPPED):
        said, folder = said_in_code(source), (ROOT / source.path).parent
        for line, text in docstrings(source):
            for quoted in QUOTED.findall(text):
                wrong += [f"{source.path}:{line} `{quoted}`: no {u}" for u in unknown_in(quoted, said, folder)]
    assert not wrong, "\n".join(wrong)


def test_files_that_docstrings_name_exist() -> None:
    wrong = []
    for source in sources(*CODE):
        for line, text in docstrings(source):
            folder = (ROOT / source.path).parent
            missing = [f for f in FILE.findall(text) if not any(file_exists(n, folder) for n in (f, f.lstrip("./")))]
            wrong += [f"{source.path}:{line} names {f}" for f in missing]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if (ROOT / d).is_file()])
def test_what_documents_name_in_backticks_exists(document: str) -> None:
    text = FENCED.sub("", (ROOT / document).read_text("utf-8"))
    said = frozenset().union(*(said_in_code(s) for s in sources(*SHIPPED)))
    wrong = [f"`{q}`: no {u}" for q in QUOTED.findall(text) for u in unknown_in(q, said, ROOT)]
    assert not wrong, f"{document}:\n" + "\n".join(wrong)


def test_no_entry_of_the_lists_above_is_idle() -> None:
    texts = [text for s in sources(*CODE) for _, text in docstrings(s)]
    texts += [(ROOT / d).read_text("utf-8") for d in DOCUMENTS if (ROOT / d).is_file()]
    told = " ".join(" ".join(texts).split())
    listed = [*UPSTREAM_FILES, *UPSTREAM_ELSEWHERE, *FOREIGN_NAMES, *LITERALS]
    idle = [name for name in listed if " ".join(name.split()) not in told]
    assert not idle, f"no sentence names {idle}"
