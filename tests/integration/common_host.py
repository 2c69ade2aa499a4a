"""Run transformers' own common model and configuration tests on our classes.

    pip download --no-deps --no-binary transformers transformers==5.23.0 && tar xf transformers-5.23.0.tar.gz
    python tests/integration/common_host.py transformers-5.23.0

The source distribution ships the common tests without what two of them import: generation tests and export tests, for
which empty classes stand, and one table of common keyword arguments. Needs accelerate and parameterized.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

STANDINS = {
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": 'config_common_kwargs = {"return_dict": False, "output_hidden_states": True}\n',
}


def main(source: Path) -> int:
    """Copy the tests beside our adapter and run them; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        shutil.copytree(source / "tests", tests)
        for name, text in STANDINS.items():
            (tests / name).parent.mkdir(exist_ok=True)
            (tests / name).write_text(text, encoding="utf-8")
        shutil.copy(Path(__file__).with_name("common_adapter.py"), tests / "test_bd3.py")
        for found in (tests, *(path for path in tests.rglob("*") if path.is_dir())):
            (found / "__init__.py").touch()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "tests/test_bd3.py"]
        # their `tests` goes before ours, which an editable installation offers too
        paths = os.pathsep.join([folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
