"""Our universal form is DeepSpeed's: its converter makes the same tensors, its loader reads them."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint.layout import STATE_DIR, step_name
from bd3_megatron.checkpoint.load import load
from bd3_megatron.checkpoint.read import open_together
from bd3_megatron.checkpoint.save import save
from bd3_megatron.checkpoint.universal import ZERO_DIR, universal_form
from bd3_megatron.config.schema import Config
from bd3_megatron.errors import CheckpointError
from bd3_megatron.parallel.topology import Topology
from tests.ranks.checkpoint_runs import build, steps, tiny
from tests.ranks.harness import run_ranks


def made_by_deepspeed(checkpoint: Path, out: Path) -> Path:
    """Run DeepSpeed's converter in this process."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = SimpleNamespace(
        input_folder=str(checkpoint / STATE_DIR),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    ds_to_universal.main(arguments)
    return out


@pytest.mark.parametrize("style", ["modern", pytest.param("paper", marks=pytest.mark.matrix)])
def test_it_equals_what_deepspeeds_converter_makes(style: str, tmp_path: Path) -> None:
    config = tiny(tp=2, pp=2, style=style)

    def on_rank(topology: Topology) -> None:
        engine = build(config, topology)
        steps(engine, 0, 2)
        save(engine, tmp_path, step=2, samples_consumed=8, config=config, train_state={})

    run_ranks(on_rank, config.parallel)
    ours = universal_form(open_together(tmp_path / step_name(2))) / ZERO_DIR
    theirs = made_by_deepspeed(tmp_path / step_name(2), tmp_path / "theirs") / ZERO_DIR
    names = sorted(str(p.relative_to(theirs)) for p in theirs.rglob("*.pt"))
    assert names == sorted(str(p.relative_to(ours)) for p in ours.rglob("*.pt"))
    for name in names:
        if name == "optimizer_state.pt":
            continue
        one, other = (torch.load(folder / name, weights_only=True) for folder in (ours, theirs))
        if name.endswith("step.pt"):
            assert float(one) == float(other) == 2.0
            continue
        assert torch.equal(one["param"], other["param"]), name
        replicated = "cat_dim" not in one
        assert replicated or one["cat_dim"] == other["cat_dim"], name
        assert one.get("param_n_sub_params", 1) == other.get("param_n_sub_params", 1), name


def test_deepspeeds_loader_reads_it(tmp_path: Path) -> None:
    source, target = tiny(dp=2), tiny(tp=2)

    def first(topology: Topology) -> Any:
        engine = build(source, topology)
        steps(engine, 0, 2)
        save(engine, tmp_path, step=2, samples_consumed=8, config=source, train_state={})
        universal_form(open_together(tmp_path / step_name(2)))
        return steps(engine, 2, 4)

    def second(topology: Topology) -> Any:
        engine = build(target, topology)
        engine.engine._config.load_universal_checkpoint = True
        form = tmp_path / f"{step_name(2)}.universal"
        engine.engine.load_checkpoint(str(form.parent), tag=form.name)
        return steps(engine, 2, 4)

    expected, found = run_ranks(first, source.parallel)[0], run_ranks(second, target.parallel)[0]
    assert torch.allclose(torch.tensor(expected), torch.tensor(found), rtol=0, atol=1e-6)


def test_a_form_of_another_checkpoint_is_made_anew(tmp_path: Path) -> None:
    config = tiny()

    def on_rank(topology: Topology) -> Any:
        engine, made = build(config, topology), []
        for _ in range(2):
            save(engine, tmp_path, step=1, samples_consumed=4, config=config, train_state={})
            form = universal_form(open_together(tmp_path / step_name(1)))
            name = f"{ZERO_DIR}/decoder.final_layernorm.weight/fp32.pt"
            made.append((form / name).stat().st_mtime_ns)
            again = universal_form(open_together(tmp_path / step_name(1))) / name
            made.append(again.stat().st_mtime_ns)
            steps(engine, 0, 1)
        return made

    first, first_again, second, second_again = run_ranks(on_rank, config.parallel)[0]
    assert first == first_again != second == second_again


def test_loading_opens_each_sidecar_a_fixed_number_of_times(tmp_path: Path) -> None:
    source, target = tiny(dp=4), tiny(dp=2)

    def first(topology: Topology) -> None:
        save(build(source, topology), tmp_path, step=0, samples_consumed=0, config=source, train_state={})

    def loaded(config: Config) -> list[int]:
        def on_rank(topology: Topology) -> int:
            engine, opened = build(config, topology), []
            # every opening of a file by this process, whoever asks for it
            sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
            load(engine, tmp_path / step_name(0))
            return sum(Path(name).name.startswith("rank_") and name.endswith(".json") for name in opened)

        return run_ranks(on_rank, config.parallel)

    run_ranks(first, source.parallel)
    # each rank: one of the four for all, its own to compare the layout, and its own to read its files
    assert loaded(source) == [3, 3, 3, 3]
    # on another grid the ranks share the four, and no rank has one of its own
    assert loaded(target) == [2, 2]


def test_a_form_for_which_there_is_no_space_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / step_name(1)
    config = tiny()
    run_ranks(
        lambda topology: save(
            build(config, topology), tmp_path, step=1, samples_consumed=4, config=config, train_state={}
        ),
        config.parallel,
    )
    reader = open_together(path)
    needed = 4 * len(reader.kinds()) * sum(reader.tensor(name).numel() for name in reader.names())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * needed, 0, needed))
    with pytest.raises(
        CheckpointError, match=r"^the universal form could not be made: .* GiB free and a checkpoint needs"
    ):
        universal_form(reader)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["LATEST", path.name]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * needed, 0, int(1.06 * needed)))
    form = universal_form(reader)
    assert sum(found.stat().st_size for found in form.rglob("*.pt")) > needed
