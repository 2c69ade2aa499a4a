"""An exported folder speaks for itself: transformers 4.5x and 5.x keep its contract in a fresh process without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.sampling.generate import Sampler
from tests.tolerances import FOREIGN_LOGITS
from tests.unit.hf.models import tiny_config, tiny_model
from tests.unit.sampling.folders import write_tokenizer

OLDER = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
"""The last 4.x and the releases it asks for; torch and safetensors are the environment's."""

PROMPT = [2, 3, 5, 7, 11]

CONTRACT = Path(__file__).with_name("folder_contract.py")


@pytest.fixture(scope="module")
def older(root: Path) -> Path:
    """A folder of packages with transformers 4.x, made beside the environment and kept."""
    folder = Path(sys.prefix) / "transformers-4"
    wanted = "\n".join(OLDER)
    stamp = folder / "requirements.txt"
    if not (stamp.is_file() and stamp.read_text("utf-8") == wanted):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*command, *OLDER], capture_output=True, text=True, cwd=root)
        if done.returncode:
            pytest.skip(f"no package index gave {OLDER[0]}: {done.stderr.strip().splitlines()[-1]}")
        stamp.write_text(wanted, "utf-8")
    return folder


def told(folder: Path, environment: Mapping[str, str], packages: Path | None, tmp_path: Path) -> dict[str, Any]:
    """What a fresh process says of the folder."""
    path = {} if packages is None else {"PYTHONPATH": str(packages)}
    kept = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    modules = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, str(CONTRACT), str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env=kept | path | modules | {"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def contract_folder(tmp_path: Path) -> Path:
    """A folder as `folder_contract.py` expects it; its output table is its token table."""
    state = tiny_model(4, style="tied").state_dict()
    del state["lm_head.weight"]
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    write_folder(state, tiny_config(4, style="tied"), tmp_path / "hf", tokenizer_dir=tokenizer)
    return tmp_path / "hf"


def test_both_generations_of_transformers_keep_the_folders_contract(
    tmp_path: Path, older: Path, clean_environment: Mapping[str, str]
) -> None:
    folder = contract_folder(tmp_path)
    new = told(folder, clean_environment, None, tmp_path)
    old = told(folder, clean_environment, older, tmp_path)
    assert (old["version"].split(".")[0], new["version"].split(".")[0]) == ("4", "5")
    for found in (old, new):
        broken = {name: said for name, said in found["results"].items() if said != "ok"}
        assert not broken and len(found["results"]) >= 25, broken
    torch.testing.assert_close(torch.tensor(old["logits"]), torch.tensor(new["logits"]), rtol=0, atol=FOREIGN_LOGITS)
    ours = Sampler.from_pretrained(folder).generate(PROMPT, num_tokens=6, seed=4, stop_at_eos=False)[0].tokens
    assert old["text"] == new["text"] == PROMPT + list(map(int, ours))
