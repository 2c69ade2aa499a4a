"""Numbers of the diffusion process that torch-free files need too."""

from __future__ import annotations

MIN_T = 1e-3
"""Smallest noise level: every loss weight diverges at t = 0. As in the official code (`sampling_eps`)."""
