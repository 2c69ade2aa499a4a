"""The table of mutations stays true: every entry names one line, and every test it names is there."""

from __future__ import annotations

import pytest

from tests.mutations import ROOT, Mutation, mutated, read_mutations

MUTATIONS = read_mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.old[:40]}")
def test_a_mutation_names_one_line_and_tests_that_exist(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text("utf-8")
    assert mutated(mutation, text) != text
    for test in mutation.tests:
        if test.startswith("tests/"):
            file, _, name = test.partition("::")
            source = (ROOT / file).read_text("utf-8")
            assert f"def {name.partition('[')[0]}(" in source or not name, test


def test_there_are_enough_of_every_kind() -> None:
    assert len(MUTATIONS) >= 60
    wanted = {"step", "objective", "gradients", "clip", "EMA", "learning rate", "noise", "visibility", "head"}
    assert wanted | {"checkpoint restore", "data order"} <= {m.subject for m in MUTATIONS}
