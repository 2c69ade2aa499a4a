"""Odd configurations are accepted or refused in one sentence: no traceback, no hang, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz_configs import KINDS, findings


@pytest.mark.parametrize(
    ("seed", "count"), [(17, 500), pytest.param(18, 10_000, marks=[pytest.mark.fuzz, pytest.mark.timeout(3600)])]
)
def test_no_odd_configuration_misbehaves(seed: int, count: int, tmp_path: Path) -> None:
    found, kinds = findings(seed, count, tmp_path)
    assert set(kinds) == set(KINDS) and sum(kinds.values()) == count
    assert not found, "\n".join(map(str, found[:20]))
