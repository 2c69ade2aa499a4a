"""bd3_megatron: block-diffusion language-model pretraining on megatron-core and DeepSpeed.

This file holds the version and imports nothing, so that `bd3 --help` and the launchers answer
at once. The packages and which may import which are mapped in README.md and enforced by tests/test_architecture.py.
"""

__version__ = "0.1.0"
