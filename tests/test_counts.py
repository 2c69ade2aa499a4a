"""The counts that README's development section states hold for the shipped files."""

from __future__ import annotations

import re

from tests.source_tree import ROOT, SHIPPED, body_lines, import_cycles, sources
from tests.test_words import names_with_two_meanings

ROW = re.compile(r"^\| (.+) \| at (most|least) ([\d.]+) \|$", re.MULTILINE)


def measured() -> dict[str, float]:
    """Every count of the table by its name there."""
    files = sources(*SHIPPED)
    lines = [line.strip() for s in files for line in s.text.splitlines()]
    comments = sum(line.startswith("#") and not line.startswith("#!") for line in lines)
    return {
        "public names that two files define": len(names_with_two_meanings()),
        "import cycles between files, late imports included": len(import_cycles(files)),
        "lines of the longest file": max(s.text.count("\n") for s in files),
        "lines of the longest function": max(body_lines(f) for s in files for f in s.functions),
        "comment lines in 100 lines": 100 * comments / len(lines),
    }


def test_the_counts_of_the_readme_hold() -> None:
    bounds = {name: (side, float(bound)) for name, side, bound in ROW.findall((ROOT / "README.md").read_text("utf-8"))}
    counts = measured()
    assert set(bounds) == set(counts)
    for name, count in counts.items():
        side, bound = bounds[name]
        assert count <= bound if side == "most" else count >= bound, f"{name}: {count}, README says at {side} {bound}"
