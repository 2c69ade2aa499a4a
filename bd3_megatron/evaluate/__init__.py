"""How good a trained model is: likelihood with standard errors, zero-shot tables, generated text under a scoring model.

One noise plan, one set of sums and one estimate serve the training grid, exported folders and documents. Metrics of
training are computed in train/. This file imports nothing.
"""
