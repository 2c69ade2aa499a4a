"""Text every Python has: the language reference topics and the docstrings of the standard library.

Contract: one document a topic and one a module, in the order of their names. The text is a function of the installed
Python: another minor version gives another corpus.
Refuses: installations without the standard library's sources.
Costs: about 10 seconds for 4 MB (python-docs); python-topics alone is 0.7 MB in half a second.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from bd3_megatron.errors import ConfigError, DataError, shown

CORPORA = ("python-docs", "python-topics")
# Tests, vendored packages and modules without English (encodings, lib2to3's grammars) are no prose.
_LEFT_OUT = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "encodings", "idle_test", "lib2to3", "idlelib", "turtledemo"}
    | {"_vendor", "_bundled", "__pycache__", "config", "ensurepip", "pydoc_data", "lib-dynload"}
)
_TOPICS = "topics"


def builtin_items(name: str) -> list[str]:
    """What a built-in corpus consists of, in order: relative paths of modules, and "topics".

    Raises:
        ConfigError: unknown corpus.
        DataError: this Python comes without its sources.
    """
    if name not in CORPORA:
        raise ConfigError(f"built-in corpus {shown(name)} is not known; use {' or '.join(CORPORA)}.")
    root = _library()
    if not (root / "pydoc_data" / "topics.py").is_file():
        raise DataError(f"{root} holds no pydoc_data/topics.py; install Python's standard library or give --text.")
    if name == "python-topics":
        return [_TOPICS]
    # Sorted: a file system lists files in any order, and the order of documents must not depend on it.
    modules = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [_TOPICS] + [
        str(m) for m in modules if not _LEFT_OUT & set(m.parts) and not m.parts[0].startswith("config-")
    ]


def builtin_documents(item: str) -> Iterator[str]:
    """The documents of one item of `builtin_items`."""
    if item == _TOPICS:
        yield from _topics()
        return
    text = _module_text(_library() / item, item.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    if text:
        yield text


def _topics() -> Iterator[str]:
    # Parsed and never imported, so nothing runs.
    tree = ast.parse((_library() / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).values()


def _module_text(path: Path, module: str) -> str:
    with warnings.catch_warnings():
        # Old modules hold escapes that today's parser warns about.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return ""
    return "\n\n".join(_docstrings(tree, module))


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield f"{name}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
