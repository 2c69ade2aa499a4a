"""Packaging of bd3_megatron: what is installed, what it needs, and the `bd3` command.

Decides the lower bounds; the one tested set of versions is launch/constraints.txt. Refuses nothing. Apex is absent on
purpose: the package index's `apex` is an unrelated project (README names the source build of NVIDIA's).
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version written in the package's `__init__.py`; read as text because importing it needs it installed."""
    found = re.search(
        r'^__version__ = "([^"]+)"$', (ROOT / "bd3_megatron/__init__.py").read_text("utf-8"), re.MULTILINE
    )
    if found is None:
        raise RuntimeError("bd3_megatron/__init__.py holds no __version__ line.")
    return found.group(1)


setup(
    name="bd3-megatron",
    version=version(),
    description="Block-diffusion language-model pretraining on megatron-core and DeepSpeed",
    long_description=(ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["bd3_megatron", "bd3_megatron.*", "launch"]),
    package_data={
        "bd3_megatron": ["py.typed"],
        "bd3_megatron.report": ["*.jinja"],
        "launch": ["*.sh", "*.txt", "templates/*"],
    },
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16,<0.17",
        # below 0.19.8 engine.step() does not reduce gradients that the pipeline schedule accumulated itself
        "deepspeed>=0.19.8",
        "datasets>=3.0",
        "sentencepiece>=0.2",
        "transformers>=4.50",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "wandb>=0.18",
        "PyYAML>=6.0",
        "tqdm>=4.66",
        "numpy>=1.26",
        # .jsonl.zst corpora
        "zstandard>=0.22",
        # the report page
        "Jinja2>=3.1",
    ],
    extras_require={
        "test": ["pytest>=8.0", "pytest-timeout>=2.3", "ruff>=0.8", "mypy>=1.13", "types-PyYAML"],
        "tensorboard": ["tensorboard>=2.15"],
        # bd3 evaluate --tasks
        "eval": ["lm_eval>=0.4.13"],
        # needs nvcc and an installed torch: pip install --no-build-isolation .[cuda]
        "cuda": ["flash-attn>=2.7", "transformer-engine[pytorch]>=2.0"],
    },
    entry_points={"console_scripts": ["bd3=bd3_megatron.cli:main"]},
)
