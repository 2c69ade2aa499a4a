"""An exported folder speaks for itself: transformers 4.5x and 5.x load it in a fresh process without this package."""

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

from bd3_megatron.checkpoint.layout import step_name
from bd3_megatron.convert.from_checkpoint import convert_checkpoint
from bd3_megatron.sampling.generate import Sampler
from tests.tolerances import FOREIGN_LOGITS
from tests.unit.convert.models import run_config, whole_checkpoint

OLDER = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
"""The last 4.x and the releases it asks for; torch and safetensors are the environment's."""

PROMPT = [2, 3, 5, 7, 11, 13, 17, 19]

FRESH = """
import json, sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        ours = name.split(".")[0] in {"bd3_megatron", "launch", "tools", "megatron", "deepspeed"}
        return None if ours else super().find_spec(name, path, target)

sys.meta_path = [
    Absent if finder is PathFinder else finder
    for finder in sys.meta_path
    if "editable" not in repr(finder).lower()
]
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

folder, prompt = sys.argv[1], json.loads(sys.argv[2])
masked = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
causal = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokens = torch.tensor([prompt])
with torch.no_grad():
    logits = masked(input_ids=torch.full_like(tokens, masked.config.mask_token_id), context_ids=tokens).logits
    text = causal.generate(tokens, max_new_tokens=6, seed=4)
assert not [name for name in sys.modules if name.split(".")[0] == "bd3_megatron"]
print(json.dumps({"version": transformers.__version__, "logits": logits[0].tolist(), "text": text[0].tolist()}))
"""


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


def folder_of(style: dict[str, Any], tmp_path: Path) -> Path:
    """A random checkpoint of a run, converted."""
    run = tmp_path / "run"
    whole_checkpoint(run / "checkpoints" / step_name(3), run_config(run, model=style))
    convert_checkpoint(run, tmp_path / "hf")
    return tmp_path / "hf"


def told(folder: Path, environment: Mapping[str, str], packages: Path | None, tmp_path: Path) -> dict[str, Any]:
    """What a fresh process says of the folder."""
    path = {} if packages is None else {"PYTHONPATH": str(packages)}
    kept = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    modules = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), json.dumps(PROMPT)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=kept | path | modules | {"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("style", [{"tie_embeddings": True}, {"style": "paper", "num_kv_heads": 4, "qk_norm": False}])
def test_both_generations_of_transformers_load_and_sample(
    style: dict[str, Any], tmp_path: Path, older: Path, clean_environment: Mapping[str, str]
) -> None:
    folder = folder_of(style, tmp_path)
    new = told(folder, clean_environment, None, tmp_path)
    old = told(folder, clean_environment, older, tmp_path)
    assert (old["version"].split(".")[0], new["version"].split(".")[0]) == ("4", "5")
    torch.testing.assert_close(torch.tensor(old["logits"]), torch.tensor(new["logits"]), rtol=0, atol=FOREIGN_LOGITS)
    ours = Sampler.from_pretrained(folder).generate(PROMPT, num_tokens=6, seed=4)[0].tokens
    assert old["text"] == new["text"] == PROMPT + list(map(int, ours))
