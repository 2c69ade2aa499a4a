"""The quickstart's decisions: which grid, whether it goes on, what its summary says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bd3_megatron.errors import ConfigError, LaunchError
from launch import quickstart


def planned(folder: Path, *arguments: str) -> quickstart.Quickstart:
    return quickstart.quickstart_of(quickstart.build_parser().parse_args(["--out", str(folder), *arguments]))


def test_a_grid_names_some_axes_and_leaves_the_others_at_one(tmp_path: Path) -> None:
    parallel = planned(tmp_path / "q", "--grid", "pp=2").config.parallel
    assert (parallel.tp, parallel.pp, parallel.dp) == (1, 2, 1)


def test_the_default_grid_is_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "visible_gpus", lambda: 0)
    assert planned(tmp_path / "q").config.parallel.world_size() == 4


@pytest.mark.parametrize(("gpus", "grid"), [(1, (1, 1)), (2, (2, 1)), (3, (2, 1)), (4, (2, 2)), (8, (2, 2))])
def test_the_grid_fits_the_gpus_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, grid: tuple[int, int]
) -> None:
    monkeypatch.setattr(quickstart, "visible_gpus", lambda: gpus)
    parallel = planned(tmp_path / "q").config.parallel
    assert (parallel.tp, parallel.dp) == grid


@pytest.mark.parametrize("grid", ["tp", "tp=", "zz=2", "tp=1;dp=2x", "tp=1,tp=2"])
def test_what_is_no_grid_is_refused(grid: str) -> None:
    with pytest.raises(ConfigError):
        quickstart.quickstart_of(quickstart.build_parser().parse_args(["--grid", grid]))


def test_planning_writes_nothing(tmp_path: Path) -> None:
    planned(tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_the_same_settings_go_on_and_others_start_anew_beside_the_old(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    assert quickstart.begin(planned(folder, "--steps", "3")) == f"quickstart: starts in {folder}"
    (folder / "data").mkdir()
    (folder / "checkpoints").mkdir()
    assert "starts anew (nothing was saved yet)" in quickstart.begin(planned(folder, "--steps", "3"))
    (folder / "checkpoints/LATEST").touch()
    assert quickstart.begin(planned(folder, "--steps", "3")) == f"quickstart: resumes in {folder}"
    kept = (folder / quickstart.MARK).read_text()
    (folder / quickstart.MARK).write_text(kept[:9])
    with pytest.raises(LaunchError, match="is damaged .not JSON.; name another --out, or remove"):
        quickstart.begin(planned(folder, "--steps", "3"))
    (folder / quickstart.MARK).write_text(kept)
    said = quickstart.begin(planned(folder, "--steps", "4"))
    assert said == (
        f"quickstart: starts anew in {folder}, because the settings differ; the earlier run is now {tmp_path}/q.1"
    )
    assert (tmp_path / "q.1/checkpoints/LATEST").exists() and not (folder / "checkpoints").exists()
    assert (folder / "data").is_dir(), "the tokens serve again"


def test_the_summary_reads_the_record() -> None:
    records = [
        {"step": 0, "throughput/peak_source": "measured"},
        {"step": 0, "eval/perplexity": 2000.0},
        {"step": 5, "throughput/data_tokens_per_second": 4000.0, "throughput/mfu": 0.25},
        {"step": 10, "throughput/data_tokens_per_second": 5000.0, "throughput/mfu": 0.35},
        {"step": 10, "eval/perplexity": 250.0},
    ]
    assert quickstart.perplexity_line(records) == (
        "2,000.0 before, 250.0 after training, on held-out text: 8.0 times lower"
    )
    assert quickstart.throughput_line(records) == "4,500 data tokens/s, MFU 30.0% (peak: measured)"
    assert quickstart.perplexity_line(records[:2]) == "was not measured before and after"
    assert quickstart.throughput_line(records[:2]) == "was not measured"
    unknown = [{"throughput/data_tokens_per_second": 4000.0, "throughput/mfu": None}]
    assert quickstart.throughput_line(unknown) == "4,000 data tokens/s, MFU unknown (unknown)"
