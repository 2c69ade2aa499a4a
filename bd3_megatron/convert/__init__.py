"""Translations of weights between formats: our exported folder, the training checkpoint, the official BD3-LM files.

Names, layouts and exactness live here; the meaning of a checkpoint's bytes does not. This file imports nothing.
"""
