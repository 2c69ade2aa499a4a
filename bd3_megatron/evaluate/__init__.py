"""What a trained model is worth: likelihood with error bars, zero-shot tables, generated text under a judge.

One estimator (noise_plan, scoring, perplexity) serves the training grid and exported folders; no metric of training is
computed here. This door plate imports nothing.
"""
