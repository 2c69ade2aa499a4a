"""The model that several files ask, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluate.planted import trained_folder


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported folder of the model that was trained on the planted rule."""
    return trained_folder(tmp_path_factory.mktemp("planted"))
