"""Model: megatron-core's transformer block with the pair [noisy; clean], its own embedding, positions and head."""
