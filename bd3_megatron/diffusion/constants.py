"""Numbers of the diffusion process that torch-free files need too."""

from __future__ import annotations

# Evaluation uses it too unless told otherwise; another value makes another bound on the likelihood.
MIN_T = 1e-3
"""Smallest noise level: every loss weight diverges at t = 0. As in the official code (`sampling_eps`)."""
SEARCH_WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Widths of the candidate intervals of a search, as in the paper."""
