"""bd3_megatron: block-diffusion language-model pretraining on megatron-core and DeepSpeed.

The door plate of the package: it holds the version and imports nothing, so that `bd3 --help` and the launchers answer
at once. The rooms and who may import whom are mapped in README.md and enforced by tests/test_architecture.py.
"""

__version__ = "0.1.0"
