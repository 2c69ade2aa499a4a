"""Broken and odd configurations by the thousand, drawn from a seed: each must be accepted, or refused in one sentence.

A case is a configuration file, overrides, a cluster profile or a recipe, damaged in one of several ways. It goes through
what users run: loading, validation, the local launcher's plan, the SLURM launcher's dry run with the planner's prediction,
the grid search, stored configurations, requests of prepared text. `python -m tests.fuzz_configs SEED COUNT` prints what
misbehaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from bd3_megatron.config.load import config_from_tree, load_config, to_tree
from bd3_megatron.config.ranges import Range
from bd3_megatron.config.schema import Config
from bd3_megatron.config.validate import validate
from bd3_megatron.config.yaml_file import parse_yaml
from bd3_megatron.data.recipe import Recipe, load_recipe
from bd3_megatron.errors import SENTENCE_CHARACTERS, BD3Error
from bd3_megatron.planner.machines import machine_of
from bd3_megatron.planner.plans import rank_plans
from launch import local, slurm

ROOT = Path(__file__).resolve().parents[1]
CASE_SECONDS = 5.0
"""Processor time that counts as a hang; a case takes a few hundredths."""
SEARCH_EVERY = 20
STORED_EVERY = 5
"""Cases of which one is also searched, or written and read again: both take longer than all the rest."""
NOW = datetime(2026, 1, 2, 3, 4, 5)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, -(2**63), 10**30, 10**5000, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e300,
    float("nan"), float("inf"), -float("inf"), "", " ", "~", "~/x", "a\nb", "a\x00b", "\ud800", "é" * 300, "x" * 10_000, "/",
    "../" * 50, "/dev/null", "/etc/passwd/x", "1e-3", "nan", "1_000", "0x10", "010", "2024-01-31", "12:30:00", "yes", "null",
    "${HOME}", "$(reboot)", "; rm -rf /", "builtin:none", "!!int 3", "&a [1]", "*a", "{a: 1, a: 2}", "[" * 300, [], {}, [[]], [1],
    [0.3, 0.8], [0.8, 0.3], [1, 2, 3], ["a", 1], {"a": 1}, {"a": {"b": {"c": 1}}}, {"": 0}, {"~": 1}, [None], [{}],
    list(range(3000)),
)  # fmt: skip


RECIPE_OF_ALL = b"""\
about: every key
sources:
  train: {text: [a.txt, notes/], documents: line}
  valid:
    dataset: some/name
    name: en
    split: train[:10]
    column: meta.body
    filters:
      - {column: lang, one_of: [en, de]}
      - {column: score, at_least: 3, at_most: 9.5, matches: "^a+$", equals: 4}
    streaming: true
    data_files: "*.jsonl"
    revision: main
    rows_per_part: 100
  more: {builtin: python-docs}
tokenizer: sentencepiece
vocab_size: 2048
valid_fraction: 0.1
detokenizer: ptb
packing:
  train: {append_eos: true, wrap_special: false}
"""
"""No shipped recipe has all keys."""


class Hang(BaseException):
    """A case took too long; nothing that catches exceptions may swallow it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Files as bytes and what is typed."""

    number: int
    kind: str
    config: bytes
    overrides: tuple[str, ...]
    profile: bytes
    arguments: tuple[str, ...]
    stored: Any
    """A tree as a manifest holds it, damaged; None in cases of other kinds."""
    recipe: bytes


@dataclasses.dataclass(frozen=True)
class Finding:
    """One case that misbehaved."""

    case: Case
    what: str

    def __str__(self) -> str:
        typed = " ".join([*self.case.overrides, *self.case.arguments])[:200]
        return f"case {self.case.number} ({self.case.kind}) {typed!r}: {self.what}"


def cases(seed: int, count: int) -> Iterator[Case]:
    """Cases of a seed; case n does not depend on how many are asked for."""
    configs = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    profiles = [path.read_bytes() for path in sorted((ROOT / "configs/cluster").glob("*.yaml"))]
    recipes = [path.read_bytes() for path in sorted((ROOT / "configs/data").glob("*.yaml"))]
    fields = list(fields_of(Config, ""))
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        kind = draw.choice([*KINDS])
        whole = Case(
            number=number,
            kind=kind,
            config=draw.choice(configs),
            overrides=("model.vocab_size=300",),
            profile=draw.choice(profiles),
            arguments=(),
            stored=None,
            recipe=RECIPE_OF_ALL if draw.random() < 0.5 else draw.choice(recipes),
        )
        yield KINDS[kind](draw, whole, fields)


Fields = list[tuple[str, Any]]


def fields_of(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """(key, annotation) of every key."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        inner = next(
            (a for a in (hint, *typing.get_args(hint)) if isinstance(a, type) and dataclasses.is_dataclass(a)), None
        )
        yield f"{prefix}{name}", hint
        if inner is not None and typing.get_origin(hint) is not tuple:
            yield from fields_of(typing.cast(type, inner), f"{prefix}{name}.")


def legal_or_near(draw: random.Random, hint: Any) -> Any:
    """A value that the annotation allows, or one just beside it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        law = next((law for law in args[1:] if isinstance(law, Range)), None)
        return legal_or_near(draw, args[0]) if law is None else number_near(draw, law, whole=args[0] is int)
    if origin in (types.UnionType, typing.Union):
        return legal_or_near(draw, draw.choice(args))
    if origin is typing.Literal:
        return draw.choice(args)
    if origin is tuple:
        size = draw.randrange(4) if args[-1] is Ellipsis else len(args)
        return [legal_or_near(draw, args[0]) for _ in range(size)]
    if origin is dict:
        return {draw.choice("abc"): legal_or_near(draw, args[1]) for _ in range(draw.randrange(3))}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        inner = [pair for pair in fields_of(typing.cast(type, hint), "") if "." not in pair[0]]
        return {name: legal_or_near(draw, kind) for name, kind in inner if draw.random() < 0.7}
    texts: dict[Any, Any] = {bool: draw.random() < 0.5, int: draw.randrange(9), float: draw.random(), type(None): None}
    return texts.get(hint, draw.choice(["a", "bytes", "runs/x", "train"]))


def number_near(draw: random.Random, law: Range, *, whole: bool) -> float:
    """Often small, sometimes the greatest legal number, sometimes beside an edge."""
    low, high = law.lower, law.upper
    inside = [low, high, (low + high) / 2, draw.uniform(low, high), draw.uniform(low, min(high, 100))]
    found: float = draw.choice([*inside, low - 1, high + 1, 0, 1, 2, 3, 4, 8, 16, 64])
    return int(found) if whole else float(found)


def typed(value: Any) -> str:
    """A value as someone types it in an override."""
    if isinstance(value, str):
        return value
    try:
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
    except ValueError:
        # Python writes no int of more than 4300 digits
        return "9" * 5000


def override_odd(draw: random.Random, case: Case, fields: Fields) -> Case:
    chosen = [f"{draw.choice(fields)[0]}={typed(draw.choice(ODD))}" for _ in range(draw.randint(1, 2))]
    return dataclasses.replace(case, overrides=(*case.overrides, *chosen))


def override_near(draw: random.Random, case: Case, fields: Fields) -> Case:
    leaves = [pair for pair in fields if "." in pair[0]]
    chosen = [draw.choice(leaves) for _ in range(draw.randint(1, 5))]
    return dataclasses.replace(
        case, overrides=(*case.overrides, *(f"{name}={typed(legal_or_near(draw, hint))}" for name, hint in chosen))
    )


def override_grid(draw: random.Random, case: Case, fields: Fields) -> Case:
    axes = ["parallel.tp", "parallel.pp", "parallel.vpp", "parallel.cp", "parallel.dp", "train.global_batch_size"]
    axes += ["train.micro_batch_size", "model.num_layers", "data.seq_len", "diffusion.block_size", "model.num_heads"]
    sizes = [1, 1, 2, 2, 3, 4, 5, 7, 8, 12, 16, 64, 100, 512, 1000, 4096, 10_000, 10**6]
    chosen = [f"{axis}={draw.choice(sizes)}" for axis in draw.sample(axes, draw.randint(1, 6))]
    arguments = draw.choice([(), ("--nodes", str(draw.choice(sizes))), ("--ranks-per-node", str(draw.choice(sizes)))])
    return dataclasses.replace(case, overrides=(*case.overrides, *chosen), arguments=arguments)


def override_noise(draw: random.Random, case: Case, fields: Fields) -> Case:
    pieces = ["model", "run.dir", "x" * 500, "1e9", *"a.=[{'\"#-:é \n", "&x", "!!", "--"]
    return dataclasses.replace(case, overrides=("".join(draw.choices(pieces, k=draw.randint(1, 12))),))


def damaged(draw: random.Random, content: bytes) -> bytes:
    """A file with lines or bytes lost, doubled, moved or replaced."""
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    position = draw.randrange(len(content))
    odd = [
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b": ",
        b"- ",
        b"&a ",
        b"*a",
        b"!!x ",
        b"|\n",
        *map(str.encode, "\t[}'\"#%"),
    ]
    inserted = content[:position] + draw.choice(odd) + content[position:]
    return draw.choice(
        [
            b"".join(lines[:place] + lines[place + 1 :]),
            b"".join(lines[:place] + [lines[place]] * 2 + lines[place + 1 :]),
            b"".join(draw.sample(lines, len(lines))),
            content[:position],
            inserted,
            inserted,
            content[:position] + bytes(draw.randrange(256) for _ in range(draw.randint(1, 8))) + content[position:],
            content * 2,
            content.replace(b": ", b":", 1),
            content.replace(b"  ", draw.choice([b" ", b"\t", b"   "])),
            draw.choice(
                [b"", b"3", b"[]", b"base: config.yaml", b"base: ..", b"base: 3", b"a: " + b"[" * 2000, b"x" * 70_000]
            ),
        ]
    )


def damage_config(draw: random.Random, case: Case, fields: Fields) -> Case:
    return dataclasses.replace(case, config=damaged(draw, case.config))


def damage_profile(draw: random.Random, case: Case, fields: Fields) -> Case:
    return dataclasses.replace(case, profile=damaged(draw, case.profile))


def replace_in_profile(draw: random.Random, case: Case, fields: Fields) -> Case:
    return dataclasses.replace(case, profile=with_odd_value(draw, case.profile))


def replace_in_config(draw: random.Random, case: Case, fields: Fields) -> Case:
    return dataclasses.replace(case, config=with_odd_value(draw, case.config))


def with_odd_value(draw: random.Random, content: bytes) -> bytes:
    tree = yaml.safe_load(content)
    put_somewhere(draw, tree, draw.choice(ODD))
    with contextlib.suppress(ValueError, yaml.YAMLError):
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    return content.replace(b"1", b"9" * 5000, 1)


def damage_recipe(draw: random.Random, case: Case, fields: Fields) -> Case:
    return dataclasses.replace(case, recipe=damaged(draw, case.recipe))


def replace_in_recipe(draw: random.Random, case: Case, fields: Fields) -> Case:
    return dataclasses.replace(case, recipe=with_odd_value(draw, case.recipe))


def near_recipe(draw: random.Random, case: Case, fields: Fields) -> Case:
    tree = {"about": "near", **legal_or_near(draw, Recipe)}
    return dataclasses.replace(case, recipe=yaml.safe_dump(tree).encode())


def damage_stored(draw: random.Random, case: Case, fields: Fields) -> Case:
    tree = to_tree(load_config(ROOT / "configs/debug_cpu.yaml"))
    put_somewhere(draw, tree, draw.choice(ODD))
    return dataclasses.replace(case, stored=tree)


def put_somewhere(draw: random.Random, tree: Any, value: Any) -> None:
    """Replace, add or rename one entry somewhere in a tree."""
    while True:
        keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and draw.random() < 0.8:
            tree = tree[key]
            continue
        if isinstance(tree, dict) and draw.random() < 0.15:
            tree[draw.choice(["zzz", "num_layer", "x" * 5000, "", "é"])] = tree.pop(key)
        else:
            tree[key] = value
        return


KINDS: dict[str, Callable[[random.Random, Case, Fields], Case]] = {
    "override_odd": override_odd,
    "override_near": override_near,
    "override_grid": override_grid,
    "override_noise": override_noise,
    "damage_config": damage_config,
    "damage_profile": damage_profile,
    "replace_in_config": replace_in_config,
    "replace_in_profile": replace_in_profile,
    "damage_stored": damage_stored,
    "damage_recipe": damage_recipe,
    "replace_in_recipe": replace_in_recipe,
    "near_recipe": near_recipe,
}


def run_case(case: Case, folder: Path) -> Iterator[str]:
    """What is wrong with how a case is answered: nothing, or sentences.

    Args:
        case: to be answered.
        folder: an empty one, and the working directory.
    """
    (folder / "config.yaml").write_bytes(case.config)
    (folder / "site.yaml").write_bytes(case.profile)
    (folder / "recipe.yaml").write_bytes(case.recipe)
    before = sorted(str(path) for path in folder.rglob("*"))
    for answer in answers_of(case):
        try:
            with bounded(CASE_SECONDS):
                answer(case, folder)
        except BD3Error as error:
            said = str(error)
            if len(said) > SENTENCE_CHARACTERS or "\n" in said:
                yield f"{answer.__name__} refuses in {len(said)} characters: {said[:100]!r}"
        except SystemExit as ended:
            # argparse has said what is wrong with the command line
            if ended.code != 2:
                yield f"{answer.__name__} ends with {ended.code!r}"
        except Hang:
            yield f"{answer.__name__} hangs"
        except Exception as error:
            yield f"{answer.__name__} raises {type(error).__name__} at {place_of(error)}: {str(error)[:100]!r}"
    if sorted(str(path) for path in folder.rglob("*")) != before:
        yield "something was written"


Answer = Callable[[Case, Path], None]


def answers_of(case: Case) -> tuple[Answer, ...]:
    """What a case goes through: all that reads what is damaged in it."""
    if case.kind.endswith("stored"):
        return (answer_stored,)
    if case.kind.endswith("recipe"):
        return (answer_recipe,)
    return (answer_slurm,) if case.kind.endswith("profile") else (answer_local, answer_slurm, answer_search)


def answer_local(case: Case, folder: Path) -> None:
    """`bd3 train` until a process would start, and the stored form of what would run."""
    local.local_launch(str(folder / "config.yaml"), case.overrides, {"CUDA_VISIBLE_DEVICES": ""})
    if case.number % STORED_EVERY == 0:
        config = load_config(folder / "config.yaml", case.overrides)
        stored = yaml.safe_dump(to_tree(config), sort_keys=False)
        assert config_from_tree(parse_yaml(stored, "stored")) == config, "the stored configuration is another one"


def answer_slurm(case: Case, folder: Path) -> None:
    """`launch/slurm.py --dry-run`."""
    arguments = ["--cluster", str(folder / "site.yaml"), *case.arguments]
    with contextlib.redirect_stderr(open("/dev/null", "w")) as nowhere, nowhere:
        options = slurm.build_parser().parse_intermixed_args([str(folder / "config.yaml"), *arguments, *case.overrides])
    slurm.plan_lines(slurm.submission_of(options, folder, NOW))


def answer_search(case: Case, folder: Path) -> None:
    """`tools/plan.py` on one device."""
    if case.number % SEARCH_EVERY == 0:
        config = load_config(folder / "config.yaml", case.overrides)
        rank_plans(config, 1, machine_of("a100-80g", peak_tflops=312.0))


def answer_stored(case: Case, folder: Path) -> None:
    """What resuming does with a checkpoint's manifest."""
    validate(config_from_tree(case.stored))


def answer_recipe(case: Case, folder: Path) -> None:
    """What `tools/prepare_data.py --recipe` does before it reads any text."""
    load_recipe(folder / "recipe.yaml").request(folder / "out")


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise Hang in a body that uses more processor time, whatever the load of the machine."""

    def hang(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def place_of(error: BaseException) -> str:
    """File and line of ours where an error began."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))]
    ours = [f for f in frames if ".venv" not in f.filename] or traceback.extract_tb(error.__traceback__)
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def findings(seed: int, count: int, folder: Path) -> tuple[list[Finding], Counter[str]]:
    """Run cases.

    Args:
        seed, count: as of `cases`.
        folder: an empty one to work in.

    Returns:
        What misbehaved, and how many cases of each kind ran.
    """
    found: list[Finding] = []
    kinds: Counter[str] = Counter()
    # of the paper's configurations
    shutil.copytree(ROOT / "configs/base", folder / "base")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for case in cases(seed, count):
            kinds[case.kind] += 1
            found += [Finding(case, what) for what in run_case(case, folder)]
    finally:
        os.chdir(before)
    return found, kinds


def main(arguments: list[str]) -> int:
    """`python -m tests.fuzz_configs SEED COUNT`: print findings; 1 where there are any."""
    seed, count = map(int, arguments)
    with tempfile.TemporaryDirectory() as folder:
        found, kinds = findings(seed, count, Path(folder))
    print("\n".join(map(str, found)))
    print(json.dumps({"findings": len(found), **kinds}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
