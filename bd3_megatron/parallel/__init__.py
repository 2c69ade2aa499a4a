"""Parallel: the grid as an object. The only room that calls megatron's initialize_model_parallel."""
