"""status.json is one line that bash can read."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from bd3_megatron.process.status import write_status

ROOT = Path(__file__).resolve().parents[3]


def test_a_status_is_written_whole_and_replaces_the_last_one(tmp_path: Path) -> None:
    write_status(tmp_path / "run", "stopped", reason="signal", step=3)
    write_status(tmp_path / "run", "finished", reason="finished", step=9)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["status.json"]
    record = json.loads((tmp_path / "run/status.json").read_text())
    assert (record["status"], record["reason"], record["step"]) == ("finished", "finished", 9)


def test_the_batch_script_reads_every_value_whatever_the_reason_says(tmp_path: Path) -> None:
    reason = 'a "quoted" path, {braces}: 5 of 7\nand a second line'
    write_status(tmp_path, "failed", reason=reason, step=12)
    body = (ROOT / "launch/templates/job.sh").read_text()
    function = body[body.index("value_of() {") : body.index("}\n", body.index("value_of() {")) + 2]
    script = f"status={tmp_path}/status.json\n{function}\nfor key in status step reason nothing; do value_of $key; done"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["failed", "12", "a 'quoted' path, {braces}: 5 of 7 and a second line"]
