"""The sampler for people: prompts and files in, text out, on one device.

What to do with tokens is decided in hf/ (the engine that also travels with an exported folder); here are folders,
tokenizers, batches of prompts, stop strings, streaming and the command line. Neither megatron nor DeepSpeed may be
imported here. This file imports nothing.
"""
