"""What a configuration costs by arithmetic alone: parameters, FLOPs, memory, bytes moved. Torch-free."""
