"""Who is to blame for a step that does not end, told from what the ranks say of themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from bd3_megatron.config.schema import WatchConfig
from bd3_megatron.process.watchdog import OUTSIDE, HangReport, Watchdog, blamed, where


def report(rank: int, collective: str) -> HangReport:
    return HangReport(rank=rank, node=f"n{rank}", step=4, collective=collective, location=f"file.py:{rank} in f")


def test_a_rank_outside_of_a_collective_is_to_blame() -> None:
    assert blamed([report(0, "all_reduce"), report(1, OUTSIDE), report(2, "all_reduce")], 3) == (
        "rank 1 (node n1) is in no collective, at file.py:1 in f; the others wait in all_reduce"
    )


def test_a_rank_that_says_nothing_is_to_blame() -> None:
    assert blamed([report(0, "all_reduce"), report(2, "all_reduce")], 3) == (
        "rank 1 does not answer any more and the others wait in all_reduce"
    )
    assert blamed([report(0, OUTSIDE)], 2) == "rank 1 does not answer any more"


def test_a_rank_in_another_collective_is_to_blame() -> None:
    assert blamed([report(0, "all_reduce"), report(1, "barrier"), report(2, "all_reduce")], 3) == (
        "rank 1 (node n1) is in barrier, at file.py:1 in f; the others wait in all_reduce"
    )


def test_nobody_in_a_collective_is_everybody() -> None:
    assert blamed([report(0, OUTSIDE), report(1, OUTSIDE)], 2) == (
        "rank 0 (node n0) is in no collective, at file.py:0 in f; rank 1 (node n1) is in no collective, at file.py:1 in f"
    )


def test_a_stack_tells_its_collective_and_the_line_of_ours(tmp_path: Path) -> None:
    folder = tmp_path / "bd3_megatron"
    folder.mkdir()
    code = "def step(call):\n    return call()\n"
    space: dict[str, object] = {}
    exec(compile(code, str(folder / "loop.py"), "exec"), space)
    assert where(space["step"](sys._getframe)) == (OUTSIDE, "bd3_megatron/loop.py:2 in step")  # type: ignore[operator]
    library = "def all_reduce(call):\n    return call()\n"
    exec(compile(library, dist.distributed_c10d.__file__, "exec"), space)
    frame = space["step"](lambda: space["all_reduce"](sys._getframe))  # type: ignore[operator]
    assert where(frame) == ("all_reduce", "bd3_megatron/loop.py:2 in step")
    assert where(None) == (OUTSIDE, "unknown")


def test_a_wait_for_a_device_is_told_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "waiter.py").write_text("def agreed(told):\n    return told.item()\n")
    space: dict[str, object] = {}
    exec(compile((tmp_path / "waiter.py").read_text(), str(tmp_path / "waiter.py"), "exec"), space)

    class Told:
        item = staticmethod(sys._getframe)

    assert where(space["agreed"](Told))[0] == "agreed"  # type: ignore[operator]


def test_the_limit_is_the_larger_of_the_floor_and_a_multiple_of_the_median(tmp_path: Path) -> None:
    watchdog = Watchdog(WatchConfig(hang_factor=1e9, hang_seconds=7.0), tmp_path, rank=0, world_size=1)
    assert watchdog.limit_seconds == 7.0, "before the first step"
    watchdog.step_done(1)
    watchdog.step_done(2)
    assert watchdog.limit_seconds > 7.0


def test_a_run_that_ends_leaves_no_word(tmp_path: Path) -> None:
    watchdog = Watchdog(WatchConfig(hang_factor=2.0, hang_seconds=60.0), tmp_path, rank=0, world_size=1)
    with watchdog.watching(0):
        watchdog.step_done(1)
    assert not list(tmp_path.iterdir())
