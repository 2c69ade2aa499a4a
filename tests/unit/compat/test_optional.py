"""Optional packages are known by the class that would be used; an unrelated project of the same name is called by its name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bd3_megatron.compat import optional
from bd3_megatron.errors import ConfigError


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages before all others; nothing of these names is loaded."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] in optional.PROBES]:
        monkeypatch.delitem(sys.modules, name)
    for name in optional.PROBES:
        (tmp_path / name).mkdir()
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] in optional.PROBES]:
        del sys.modules[name]


def test_the_unrelated_apex_is_named_and_left_alone(packages: Path) -> None:
    (packages / "apex/__init__.py").write_text("def main(): ...\n")
    assert optional.find("apex") is None
    with pytest.raises(
        ConfigError, match=r"^apex was asked for, but the installed `apex` is not NVIDIA Apex .*`auto`\.$"
    ):
        optional.require("apex")


def test_the_right_apex_is_found_by_its_optimizer(packages: Path) -> None:
    (packages / "apex/optimizers.py").write_text("class FusedAdam: ...\n")
    (packages / "apex/__init__.py").write_text("")
    assert optional.find("apex").__name__ == optional.require("apex").__name__ == "FusedAdam"


def test_a_package_that_does_not_import_is_as_good_as_absent(packages: Path) -> None:
    (packages / "apex/__init__.py").write_text("raise OSError('libcudart.so is missing')\n")
    assert optional.find("apex") is None


def test_an_absent_package_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "PROBES", {"no_such_package": ("no_such_package.optimizers", "Adam")})
    with pytest.raises(ConfigError, match=r"^no_such_package was asked for, but no_such_package is not installed"):
        optional.require("no_such_package")
