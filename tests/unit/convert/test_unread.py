"""A foreign checkpoint is data: what it pickles is kept as it stands, and what it wants to run is refused."""

from __future__ import annotations

import pickle
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.convert.unread import Unread, plain_value, read_foreign
from bd3_megatron.errors import CheckpointError


class Calls:
    """Unpickling it the ordinary way calls `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class of a library that is not installed when the file is read."""
    module = types.ModuleType("far_library")
    made = type("Config", (), {"__module__": "far_library", "__qualname__": "Config"})
    module.Config = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "far_library", module)
    return made


def test_objects_of_other_libraries_keep_their_state_and_their_class_is_not_loaded(
    foreign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = foreign()
    node.block_size, node.kind = 4, int
    torch.save({"weights": torch.ones(2), "config": node, "extra": defaultdict(list, a=[1])}, tmp_path / "a.ckpt")
    monkeypatch.delitem(sys.modules, "far_library")
    content, names = read_foreign(tmp_path / "a.ckpt")
    assert names == ["far_library.Config"] and "far_library" not in sys.modules
    assert isinstance(content["config"], Unread) and content["config"].state == {"block_size": 4, "kind": int}
    assert content["extra"] == {"a": [1]} and torch.equal(content["weights"], torch.ones(2))


def test_calls_of_other_libraries_are_kept_and_not_made(foreign: Any, tmp_path: Path) -> None:
    torch.save({"x": Calls(foreign, 1, "two")}, tmp_path / "a.ckpt")
    content, _ = read_foreign(tmp_path / "a.ckpt")
    assert content["x"].arguments == (1, "two")


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "builtins.eval", "builtins.getattr", "builtins.open", "shutil.rmtree"]
)
def test_a_file_that_would_run_code_of_python_is_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    module, function = name.split(".")
    __import__(module)
    proof = tmp_path / "proof"
    proof.mkdir()
    payload = Calls(getattr(sys.modules[module], function), f"rmdir {proof}" if module == "os" else str(proof))
    torch.save({"weights": torch.ones(2), "payload": payload}, tmp_path / "hostile.ckpt")
    with pytest.raises(CheckpointError, match=rf"would call [\w.]+{function} when unpickled, .* do not use it"):
        read_foreign(tmp_path / "hostile.ckpt")
    assert proof.is_dir()


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="is no whole file of torch.save"):
        read_foreign(tmp_path / "plain.pkl")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match="is no whole file of torch.save .*torchscript checkpoint"):
        read_foreign(tmp_path / "program.pt")
    torch.save({"a": torch.ones(4)}, tmp_path / "good.pt")
    data = bytearray((tmp_path / "good.pt").read_bytes())
    at = data.index(b"data.pkl") + 80
    data[at : at + 40] = b"\xff" * 40
    (tmp_path / "bad.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="bad.pt is damaged"):
        read_foreign(tmp_path / "bad.pt")


def test_unread_configuration_nodes_say_what_they_hold() -> None:
    node = Unread()
    node.__setstate__({"_content": {"block_size": 4, "inner": [1, "a", object()]}})
    assert plain_value(node) == {"block_size": 4, "inner": [1, "a", None]}
    assert plain_value(node, depth=0) is None
    assert plain_value(Unread()) is None
