"""The source files as the tests of architecture, words and counts read them: text and syntax trees; nothing runs the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("bd3_megatron", "launch", "tools")
"""Folders whose files users run."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One parsed file."""

    path: str
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """Every node of the tree; kept, because walking it costs as much as parsing it."""
        return tuple(ast.walk(self.tree))

    @cached_property
    def functions(self) -> tuple[Function, ...]:
        return tuple(n for n in self.nodes if isinstance(n, Function))

    @property
    def package(self) -> str:
        parts = Path(self.path).parts
        return Path(parts[1]).stem if parts[0] == "bd3_megatron" else parts[0]

    @property
    def module(self) -> str:
        """The dotted name under which others import the file."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def sources(*folders: str) -> tuple[Source, ...]:
    """Every Python file under the folders; each is parsed once a process."""
    paths = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    return tuple(parsed(p) for p in paths)


@cache
def parsed(path: Path) -> Source:
    text = path.read_text("utf-8")
    return Source(str(path.relative_to(ROOT)), text, ast.parse(text))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute; "?" for what is neither a name nor an attribute of one."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def body_lines(function: Function) -> int:
    """Lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def imported_modules(source: Source) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything that a file imports, late and TYPE_CHECKING imports included; relative names resolved.

    `from a import b` yields `a.b`, for b may be a module: who asks for files takes the longest name that is one.
    """
    package = source.module if source.path.endswith("__init__.py") else source.module.rpartition(".")[0]
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")
                base = ".".join([*outer[: len(outer) + 1 - node.level], *([base] if base else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def import_cycles(files: tuple[Source, ...]) -> list[list[str]]:
    """Every set of files each of which reaches all others of the set by imports, sorted; a file that imports itself counts."""
    # a package's `__init__.py` imports nothing (a test), so that importing it on the way to a file closes no circle
    known = {s.module for s in files}
    graph = {
        s.module: {m for name, _ in imported_modules(s) for m in (name, name.rpartition(".")[0]) if m in known}
        for s in files
    }
    reached = {module: reachable(graph, module) for module in graph}
    sets = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(s) for s in sets)


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """What can be reached from a file by one import or more."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting.extend(graph[module])
    return seen


PUBLIC_FOR_OTHERS = {
    "KeepingEngine": "DeepSpeed calls its checkpoint engine",
    "DeepSpeedMpu": "DeepSpeed asks it for groups",
    "ModelChunk": "megatron's schedules call set_input_tensor",
    "HarnessModel": "lm-evaluation-harness calls its model",
    "BD3Model": "transformers asks for tables",
    "BD3LanguageModel": "transformers asks for tables",
}
"""Classes some of whose methods another package calls."""


def words_used(file: Source) -> Iterator[tuple[str, int]]:
    """(word, line) of every name, attribute, import and dotted text of a file: whatever may stand for a definition."""
    for node in file.nodes:
        match node:
            case ast.Name():
                yield node.id, node.lineno
            case ast.Attribute():
                yield node.attr, node.lineno
            case ast.alias():
                yield node.name, node.lineno
            case ast.Constant(value=str(text)):
                yield from ((word, node.lineno) for word in text.replace(":", ".").split(".") if word.isidentifier())


def unused_public_names() -> list[str]:
    """Public functions, classes and methods of the package that no shipped file uses beside their own definition."""
    shipped = sources(*SHIPPED)
    used: dict[str, set[tuple[str, int]]] = {}
    for file in shipped:
        for word, line in words_used(file):
            used.setdefault(word, set()).add((file.path, line))
    in_templates = " ".join(p.read_text("utf-8") for p in (ROOT / "bd3_megatron").rglob("*.jinja"))
    found = []
    for file in sources("bd3_megatron"):
        classes = [n for n in file.tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        methods = [
            (c.name, n) for c in classes if c.name not in PUBLIC_FOR_OTHERS for n in c.body if isinstance(n, Function)
        ]
        for owner, node in [("", n) for n in file.tree.body if isinstance(n, Function | ast.ClassDef)] + methods:
            own = range(node.lineno, (node.end_lineno or 0) + 1)
            elsewhere = [1 for path, line in used.get(node.name, ()) if path != file.path or line not in own]
            if not (node.name.startswith("_") or elsewhere or f".{node.name}(" in in_templates):
                found.append(f"{file.path}: {owner and owner + '.'}{node.name}")
    return found


def docstrings(source: Source) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring: of the file, its classes, functions and attributes (a string that stands under one)."""
    for node in source.nodes:
        for statement in getattr(node, "body", ()) if not isinstance(node, ast.Lambda | ast.IfExp) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                if isinstance(statement.value.value, str):
                    yield statement.lineno, statement.value.value
