"""From a corpus to exact, restartable batches: tokenizers, shards on disk, packing, order, mixtures, loaders, streams.

Two halves meet at the shard folder. Offline (tokenizer*, sentencepiece_model, sources, detokenizers, prepare, shards)
turns text into tokens once and imports no torch. Online (packing, order, mixture, sampler, loader, streaming) turns an
index, which counts samples in the order of consumption, into a row of exactly L tokens: a function, with no state but
the number of samples consumed. Noise does not live here (diffusion/), nor does the grid (parallel/).
"""
