"""Our universal form is DeepSpeed's: its converter makes the same tensors, its loader reads them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bd3_megatron.checkpoint.layout import STATE_DIR, step_name
from bd3_megatron.checkpoint.save import save
from bd3_megatron.checkpoint.universal import ZERO_DIR, universal_form
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
        save(engine, tmp_path, step=2, samples_consumed=0, config=config, train_state={})

    run_ranks(on_rank, config.parallel)
    ours = universal_form(tmp_path / step_name(2)) / ZERO_DIR
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
        save(engine, tmp_path, step=2, samples_consumed=0, config=source, train_state={})
        universal_form(tmp_path / step_name(2))
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
            save(engine, tmp_path, step=1, samples_consumed=0, config=config, train_state={})
            form = universal_form(tmp_path / step_name(1))
            name = f"{ZERO_DIR}/decoder.final_layernorm.weight/fp32.pt"
            made.append((form / name).stat().st_mtime_ns)
            again = universal_form(tmp_path / step_name(1)) / name
            made.append(again.stat().st_mtime_ns)
            steps(engine, 0, 1)
        return made

    first, first_again, second, second_again = run_ranks(on_rank, config.parallel)[0]
    assert first == first_again != second == second_again
