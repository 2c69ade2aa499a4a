"""The counts that README's development section states hold for the shipped files."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from tests.source_tree import ROOT, SHIPPED, Source, body_lines, import_cycles, sources, unused_public_names
from tests.test_words import names_with_two_meanings

ROW = re.compile(r"^\| (.+) \| at (most|least) ([\d.]+) \|$", re.MULTILINE)

KIND_COMPARED = re.compile(r"(?:objective|kind)\s*[!=]=\s*[\"']")


def measured() -> dict[str, float]:
    """Every count of the table by its name there."""
    files = sources(*SHIPPED)
    by_package = {
        p: comment_density([s for s in files if folder_of(s) == p]) for p in sorted(set(map(folder_of, files)))
    }
    return {
        "public names that two files define": len(names_with_two_meanings()),
        "public names that only tests use": len(set(unused_public_names())),
        "import cycles between files, late imports included": len(import_cycles(files)),
        "comparisons of an objective or a kind with a text": sum(len(KIND_COMPARED.findall(s.text)) for s in files),
        "lines of the longest file": max(s.text.count("\n") for s in files),
        "lines of the longest function": max(body_lines(f) for s in files for f in s.functions),
        "lines of the longest module docstring, commands left out": max(map(docstring_lines, files)),
        "comment lines in 100 lines": comment_density(files),
        "comment lines in 100 lines of the package with the fewest": min(by_package.values()),
        "comment lines in 100 lines of the package with the most": max(by_package.values()),
    }


def folder_of(source: Source) -> str:
    """The folder below the package that a file is in, or the top folder."""
    parts = source.path.split("/")
    return "/".join(parts[:2]) if parts[0] == "bd3_megatron" and len(parts) > 2 else parts[0]


def comment_density(files: Sequence[Source]) -> float:
    """Comment lines in 100 lines of some files."""
    lines = [line.strip() for source in files for line in source.text.splitlines()]
    return 100 * sum(line.startswith("#") and not line.startswith("#!") for line in lines) / max(1, len(lines))


def docstring_lines(source: Source) -> int:
    """Lines of a module's docstring; the indented ones that show how a tool is run do not count."""
    if ast.get_docstring(source.tree) is None:
        return 0
    first = source.tree.body[0]
    written = source.text.splitlines()[first.lineno - 1 : first.end_lineno]
    return sum(not line.startswith("    ") and line != '"""' for line in written)


def test_the_counts_of_the_readme_hold() -> None:
    bounds = {name: (side, float(bound)) for name, side, bound in ROW.findall((ROOT / "README.md").read_text("utf-8"))}
    counts = measured()
    assert set(bounds) == set(counts)
    for name, count in counts.items():
        side, bound = bounds[name]
        assert count <= bound if side == "most" else count >= bound, f"{name}: {count}, README says at {side} {bound}"
