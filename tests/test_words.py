"""One word, one meaning, and words of the field: public names that two files define, and words that mean something only to us."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator

import pytest

from bd3_megatron.config.load import RENAMED
from tests.source_tree import ROOT, SHIPPED, sources

ENTRY_POINTS = {"main", "add_arguments", "build_parser", "run", "work"}
"""Functions that every command has under the same name, so that a reader knows where it begins."""

SAME_SEAM = {
    "attend": "every attention backend is a file with this function",
    "refuse": "every attention backend is a file with this function",
    "executed_pairs": "what a backend computes, asked of its file or of cost/pairs.py",
    "uniform": "rng.py gives the function of hf/philox.py the purposes of this package",
    "MAX_SEED": "rng.py passes on the limit of hf/philox.py",
}
"""Public names that several files define because one caller uses them through one seam, with the reason."""

RESERVED = set("step stage plan phase describe search choice finding record candidates block mask schedule".split())
"""Words with one meaning each (README): two files may not define them, in any case and not in the plural."""

FORBIDDEN = {
    "judg(e|es|ed|ing|ement)": "reference implementation, or the verb that says what is compared",
    "sights?": "visibility, attention mask",
    "lanes?": "work stream, shard of a stream",
    "contestants?": "candidate",
    "off(ence|ender)s?": "violation",
    "strangers?": "excess file, unknown name",
    "doomed": "to be deleted",
    "habits?": "engine assumption",
    "houses?": "the package, the repository",
    "rooms?": "package, folder; space, bytes left",
    "doors?": "entry point, interface",
    "guests?": "the library by its name",
}
"""Words that are ours alone, and what the field says instead."""


def public_names() -> dict[str, list[str]]:
    """Public functions, classes and constants at the top of the shipped files -> the files that define them."""
    found: dict[str, list[str]] = defaultdict(list)
    for source in sources(*SHIPPED):
        for node in source.tree.body:
            for name in defined(node):
                if not name.startswith("_"):
                    found[name].append(source.path)
    return found


def defined(node: ast.stmt) -> Iterator[str]:
    """Names that a statement at the top of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
    yield from (n.id for n in names if isinstance(n, ast.Name))


def names_with_two_meanings() -> dict[str, list[str]]:
    names = public_names().items()
    return {n: files for n, files in names if len(files) > 1 and n not in ENTRY_POINTS and n not in SAME_SEAM}


def test_a_public_name_is_defined_in_one_file() -> None:
    twice = names_with_two_meanings()
    assert not twice, "names with two meanings: " + "; ".join(f"{n}: {', '.join(f)}" for n, f in sorted(twice.items()))


def test_reserved_words_name_one_thing() -> None:
    used = defaultdict(set)
    for name, files in public_names().items():
        for word in RESERVED & {name.lower(), name.lower().removesuffix("s"), name.lower() + "s"}:
            used[word] |= {(name, file) for file in files}
    twice = {w: sorted(where) for w, where in used.items() if len({file for _, file in where}) > 1}
    assert not twice, "\n".join(f"{word}: {where}" for word, where in sorted(twice.items()))


def texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every file but this one, which names the words; results of benchmarks are a diary."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: what belongs to the tree cannot be told from what was built in it")
    for path in listed.stdout.splitlines():
        is_checked = not path.startswith("tools/bench/results/") and path != "tests/test_words.py"
        if is_checked and (ROOT / path).is_file():
            try:
                yield path, (ROOT / path).read_text("utf-8")
            except UnicodeDecodeError:
                continue


def forbidden_words(text: str) -> list[str]:
    """`line: word (say ...)` of every forbidden word, also as a part of an identifier."""
    found: list[str] = []
    # most files have none: one search without borders says so
    if not re.search("|".join(FORBIDDEN), text, re.IGNORECASE):
        return found
    for number, line in enumerate(text.splitlines(), 1):
        # the refusal of a key that older versions had must name it
        for key in RENAMED:
            line = line.replace(f'"{key}": ', "")
        apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", line).replace("_", " ")
        for pattern, instead in FORBIDDEN.items():
            found += [f"{number}: {m[0]} (say: {instead})" for m in re.finditer(rf"(?i)\b{pattern}\b", apart)]
    return found


def test_files_speak_the_words_of_the_field() -> None:
    found = {path: words for path, text in texts() if (words := forbidden_words(text))}
    assert not found, "\n".join(f"{path}:{w}" for path, words in sorted(found.items()) for w in words)


def test_forbidden_words_are_found_inside_identifiers() -> None:
    found = forbidden_words("num_lanes = StreamLane(doorway, JudgedBy, 'no room')")
    assert sorted(w.split()[1] for w in found) == ["Judged", "Lane", "lanes", "room"]
